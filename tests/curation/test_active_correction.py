"""Which labels are replaced, checked and left out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.curation.active_correction import review

P = [np.array(row) for row in ([0.995, 0.005], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.3, 0.5], [0.1, 0.9])]
LABELS = np.array([1, 1, 0, 1, 0, 0])
TRUSTED = np.array([False, False, False, False, False, True])


def test_a_round_by_hand() -> None:
    found = review(P, LABELS, TRUSTED, correct_above=0.99, budget=1, drop=1)
    np.testing.assert_allclose(found.suspicion, [0.99, 0.8, 0.2, 0.0, 0.3, 0.8], atol=1e-12)
    # Row 3 is as the model has it, and people have answered row 5.
    assert (found.correct.tolist(), found.query.tolist(), found.drop.tolist()) == ([0], [1], [4])
    assert found.predicted.tolist() == [0, 0, 1, 1, 2, 1]
    more = review(P, LABELS, TRUSTED, correct_above=1.0, budget=9, drop=9)
    assert (more.correct.tolist(), more.query.tolist(), more.drop.tolist()) == ([], [0, 1, 4, 2], [])


def test_nothing_is_done_without_budget_and_confidence() -> None:
    found = review(P, LABELS, TRUSTED, correct_above=1.0, budget=0, drop=0)
    assert not len(found.correct) and not len(found.query) and not len(found.drop)


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(0, 20), st.floats(0, 1))
def test_actions_exclude_each_other_and_leave_people_alone(seed: int, budget: int, drop: int, above: float) -> None:
    rng = np.random.default_rng(seed)
    probabilities = [rng.dirichlet(np.full(rng.integers(2, 5), 0.3)) for _ in range(15)]
    labels = np.array([rng.integers(len(part)) for part in probabilities])
    trusted = rng.random(15) < 0.3
    found = review(probabilities, labels, trusted, correct_above=above, budget=budget, drop=drop)
    touched = np.concatenate([found.correct, found.query, found.drop])
    assert len(set(touched.tolist())) == len(touched) and not trusted[touched].any()
    assert (found.predicted[touched] != labels[touched]).all()
    assert len(found.query) <= budget and len(found.drop) <= drop
    order = found.suspicion[np.concatenate([found.query, found.drop])]
    assert (np.diff(order) <= 0).all()
