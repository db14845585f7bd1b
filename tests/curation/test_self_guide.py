"""Filters and prompts of self-written examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax._curate_config import NOISE
from duet_jax.curation.self_guide import input_prompt, is_noise, output_prompt, within


def test_window_by_hand() -> None:
    # Mean 17.5 and standard deviation 12.99: up to 43.5 within two deviations, up to 30.5 within one.
    assert within([10, 10, 10, 40], 2.0).tolist() == [True] * 4
    assert within([10, 10, 10, 40], 1.0).tolist() == [True, True, True, False]
    assert within([7, 7, 7], 0.5).all() and within([], 2.0).shape == (0,)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.floats(1.0, 5.0))
def test_no_more_are_left_out_than_chebyshev_allows(lengths: list[int], deviations: float) -> None:
    assert np.mean(~within(lengths, deviations)) <= 1 / deviations**2


@pytest.mark.parametrize(
    ("text", "noise"),
    [
        ("", True),
        (" \n", True),
        ("As an AI, I cannot", True),
        ("Sure! Here is one", True),
        ("I'm sorry, but", True),
        ("Output: seven", True),
        ("He was sure of it", False),
        ("The output was good", False),
    ],
)
def test_noise(text: str, noise: bool) -> None:
    assert is_noise(text, NOISE) == noise


def test_prompts() -> None:
    assert input_prompt("Add.", ["1 1"]) == "Add.\n\nHere are inputs of this task.\n\nInput:\n1 1\n\nInput:"
    assert output_prompt("Add.", [("1 1", "2")], "2 3") == "Add.\n\nInput:\n1 1\n\nOutput:\n2\n\nInput:\n2 3\n\nOutput:"
