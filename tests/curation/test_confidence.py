"""Confidence in targets: the formulas (C1 to C4), which answers are the same, and configurations that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import ConfidenceConfig
from duet_jax.curation.confidence import (
    combine,
    final_answer,
    known_mean,
    reflection_score,
    same_answer,
    similarity,
)
from duet_jax.errors import ConfigError

NAN = float("nan")


def weights(alpha: float, beta: float, samples: int = 5) -> Any:
    return ConfidenceConfig(alpha=alpha, beta=beta, samples=samples).weights


def consistency(similarities: np.ndarray, matches: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's O: the mean over samples of alpha * s + (1 - alpha) * r."""
    return known_mean(alpha * similarities + (1 - alpha) * matches)


def test_c1_closed_form() -> None:
    s, r = np.array([[1, 0.5]]), np.array([[1.0, 0.0]])
    np.testing.assert_allclose(0.8 * s + 0.2 * r, [[1, 0.4]])
    assert consistency(s, r, 0.8)[0] == pytest.approx(0.7)
    reflected = reflection_score(np.eye(3)[[[0, 2]]])
    assert reflected[0] == 0.75
    mean = {"similarity": s.mean(1), "match": r.mean(1), "reflection": reflected, "likelihood": np.array([NAN])}
    assert combine(mean, weights(0.8, 0.7))[0] == pytest.approx(0.7 * 0.7 + 0.3 * 0.75) == 0.715


def test_c2_similarity_is_symmetric() -> None:
    forward, backward = np.array([0.2]), np.array([0.4])
    assert similarity(forward, backward)[0] == pytest.approx(0.7)
    assert similarity(backward, forward) == similarity(forward, backward)


def test_c3_weights() -> None:
    found = weights(0.8, 0.7)
    expected = {"similarity": 0.56, "match": 0.14, "reflection": 0.30, "likelihood": 0}
    assert found == pytest.approx(expected)


def test_c4_missing_parts_are_left_out() -> None:
    tlm = {"consistency": 0.32, "indicator": 0.01, "reflection": 0.47, "perplexity": 0.20}
    parts = {"consistency": 0.5, "indicator": 0.0, "reflection": 1.0, "perplexity": NAN}
    arrays = {name: np.array([value, NAN, NAN]) for name, value in parts.items()}
    arrays["reflection"][1] = 1.0
    found = combine(arrays, tlm)
    assert found[0] == pytest.approx((0.32 * 0.5 + 0.47) / 0.80) == 0.7875
    assert found[1] == 1.0 and np.isnan(found[2])


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_confidence_is_the_papers_formula_and_in_the_unit_interval(rows, alpha, beta) -> None:
    s, r, reflected = np.array(rows).T
    parts = {"similarity": s[None].mean(1), "match": r[None].mean(1), "reflection": reflected[:1]}
    whole = combine(parts, weights(alpha, min(beta, 0.999)))
    beta = min(beta, 0.999)
    expected = beta * consistency(s[None], r[None], alpha) + (1 - beta) * reflected[:1]
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    assert -1e-12 <= whole[0] <= 1 + 1e-12


def test_empty_samples_count_neither_way() -> None:
    assert consistency(np.array([[1, NAN]]), np.array([[0, NAN]]), 0.8)[0] == pytest.approx(0.8)
    assert np.isnan(consistency(np.full((1, 0), 0.0), np.full((1, 0), 0.0), 0.8)[0])


@pytest.mark.parametrize(
    ("target", "sample", "same"),
    [
        ("Paris", "explanation: the capital.\nanswer: The Paris!", True),
        ("2 + 2 = 4\n#### 4", "It is four; the answer is 4", True),
        ("Paris", "Paris is nice.\nanswer: Rome", False),
        ('{"a": 1, "b": "The X"}', 'Sure: {"b": "x", "a": 1} as asked', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": 1}', "a is 1", False),
        ('{"a": 1}', 'as [asked]: {"a": 1}', True),
        ("[1] is the source. answer: Rome", "answer: Paris", False),
        ("see [1]", "see [1]", True),
        ("-5", "5", False),
        ("x = -5", "x = 5", False),
        ("3.5", "35", False),
        ("1/2", "12", False),
        ("1/2", "answer: 0.50", True),
        ("3.5 m", "35 m", False),
        ("$1,000", "1000", True),
        ('{"a": "-5"}', '{"a": "5"}', False),
        ("A", "answer: a.", True),
        ("A", "the", False),
        ("+", "-", False),
        ("no answer: ", "some answer", False),
    ],
)
def test_final_answers_are_compared(target: str, sample: str, same: bool) -> None:
    assert same_answer(target, sample) is same


def test_the_last_mark_counts() -> None:
    assert final_answer("Answer: 1\nno, the answer is: 2 apples\nso there") == "2 apples"
    assert final_answer(" plain ") == "plain" and final_answer("answer:") == "answer:"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1.5; it must be in \[0, 1\]"),
        ({"samples": 0, "beta": 1.0}, "samples is 0, but beta is 1"),
        ({"contradiction": "nli"}, "model is missing; it is needed where contradiction is 'nli'"),
        ({"function": "a:b"}, "function has no meaning; leave it out where contradiction is 'judge'"),
        ({"sample_template": "{question}"}, "sample_template is '{question}'; it must be a text with {prompt}"),
        ({"reflection_templates": ("{prompt} {",)}, r"reflection_templates.0 is .*, no template"),
        (
            {"contradiction": "python", "function": "a:b", "contradiction_template": "{first} {second}"},
            "contradiction_template has no meaning; leave it out where contradiction is 'python'",
        ),
    ],
)
def test_configurations_that_are_none(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConfidenceConfig(**change)
