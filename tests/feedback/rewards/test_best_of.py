"""The expected best of several replies, against all ways of choosing them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from duet_jax.feedback.rewards.best_of import best_of


def test_n9_pass_at_k_in_closed_form():
    five = np.array([[1, 0, 0, 1, 0]])
    assert [float(best_of(five, k)[0]) for k in (1, 2, 3)] == pytest.approx([0.4, 0.7, 0.9])
    assert best_of(np.eye(1, 200), 10) == pytest.approx(0.05)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_it_is_the_mean_over_all_choices(k):
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    choices = np.array(list(itertools.combinations(range(6), k)))
    np.testing.assert_allclose(best_of(rewards, k), rewards[:, choices].max(axis=2).mean(axis=1))


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="k is 3; it must be from 1 to 2"):
        best_of(np.zeros((1, 2)), 3)
