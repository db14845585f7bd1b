"""Calibration and risk-coverage curves, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.curation.calibrated import calibration, selective


def test_calibration_by_hand() -> None:
    found = calibration(np.array([0.05, 0.1, 0.15, 0.9, 1.0]), np.array([0, 0, 1, 1, 0]), bins=10)
    np.testing.assert_allclose(found.confidence, [0.05, 0.125, 0.95])
    np.testing.assert_allclose(found.accuracy, [0, 0.5, 0.5])
    assert found.answers.tolist() == [1, 2, 2]
    assert found.error == pytest.approx((0.05 + 2 * 0.375 + 2 * 0.45) / 5)


def test_calibrated_confidence_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.75], 4)
    assert calibration(confidence, np.array([1, 0, 0, 0, 1, 1, 1, 0])).error == 0


def test_selective_accuracy_by_hand() -> None:
    found = selective(np.array([0.9, 0.1, 0.8, 0.3]), np.array([1, 0, 0, 1]))
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.accuracy, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(found.threshold, [0.9, 0.8, 0.3, 0.1])
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_equally_sure_answers_count_in_expectation() -> None:
    found = selective(np.full(4, 0.5), np.array([1, 1, 1, 0]))
    np.testing.assert_allclose(found.accuracy, 0.75)
    assert found.area == pytest.approx(0.25)


def test_the_best_order_has_the_least_area() -> None:
    # Of n answers m are wrong: with these last, the risk is 0 up to n - m and then i wrong of n - m + i.
    n, m = 10, 4
    right = np.arange(n) < n - m
    best = selective(np.linspace(1, 0, n), right).area
    assert best == pytest.approx(sum(i / (n - m + i) for i in range(1, m + 1)) / n)
    assert selective(np.linspace(0, 1, n), right).area > selective(np.full(n, 0.5), right).area > best


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
def test_curves_hold_together(rows: list, bins: int) -> None:
    confidence, right = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    curve, found = calibration(confidence, right, bins), selective(confidence, right)
    assert curve.answers.sum() == len(rows) and 0 <= curve.error <= 1
    assert curve.accuracy @ curve.answers == pytest.approx(right.sum())
    assert found.accuracy[-1] == pytest.approx(right.mean()) and 0 <= found.area <= 1
    assert np.all(np.diff(found.threshold) <= 0)


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        calibration(np.array([0.5]), np.array([1, 0]))
    with pytest.raises(ValueError, match="confidence must lie in"):
        selective(np.array([1.5]), np.array([1]))
