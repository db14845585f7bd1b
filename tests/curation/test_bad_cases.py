"""Error weights and greedy removal of near repetitions, by hand and by definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.curation.bad_cases import distinct_cases, error_weights


def test_weights_by_hand() -> None:
    np.testing.assert_allclose(error_weights(np.array([0.75, 0.51, 0])), [0.2273, 0.3182, 0.4545], atol=5e-5)
    np.testing.assert_allclose(error_weights(np.array([1, 0.5, 0.5])), [0, 0.5, 0.5])
    np.testing.assert_allclose(error_weights(np.ones(4)), 0.25)
    with pytest.raises(ValueError, match=r"accuracies must be in \[0, 1\]"):
        error_weights(np.array([0.5, 1.1]))


def test_near_repetitions_by_hand() -> None:
    ten = "one two three four five six seven eight nine ten"
    texts = [ten, f"{ten} eleven", "another text", "Another, text!", ten.upper(), "", "?!"]
    # 10 of 11 words are more than .9; case and punctuation count for nothing, and two texts without words are equal.
    for seed in range(10):
        kept = distinct_cases(texts, 0.9, np.random.default_rng(seed))
        assert len(kept) == 3
        assert len({0, 1, 4} & set(kept)) == len({2, 3} & set(kept)) == len({5, 6} & set(kept)) == 1
    assert distinct_cases(texts, 1.0, np.random.default_rng(0)) == list(range(7))
    assert distinct_cases([], 0.9, np.random.default_rng(0)) == []


def jaccard(one: str, other: str) -> float:
    a, b = set(one.split()), set(other.split())
    return len(a & b) / len(a | b) if a | b else 1.0


@given(st.lists(st.lists(st.sampled_from("abcdef")).map(" ".join), max_size=12), st.floats(0, 1), st.integers(0, 99))
def test_kept_texts_differ_and_others_are_like_one_of_them(texts: list[str], similarity: float, seed: int) -> None:
    kept = distinct_cases(texts, similarity, np.random.default_rng(seed))
    likeness = [[jaccard(one, other) for other in texts] for one in texts]
    assert all(likeness[i][j] <= similarity for i in kept for j in kept if i != j)
    assert all(any(likeness[i][j] > similarity for j in kept) for i in range(len(texts)) if i not in kept)
