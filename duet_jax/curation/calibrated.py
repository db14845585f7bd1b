"""How far confidence can be trusted: calibration, and accuracy among the answers that a model is surest of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """Answers by confidence, in bins of equal width; those without answers are left out.

    Attributes:
      confidence: float64 `[bins]`, mean of each.
      accuracy: float64 `[bins]`, share of right answers.
      answers: int64 `[bins]`, how many they are.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    answers: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3)."""
        return float(np.abs(self.accuracy - self.confidence) @ self.answers / self.answers.sum())


class Selective(NamedTuple):
    """Answers taken from the surest on; equally sure ones are taken together, in expectation over their order.

    Attributes:
      coverage: float64 `[n]`, share of the answers that are given: 1/n, ..., 1.
      accuracy: float64 `[n]`, share of right ones among them.
      threshold: float64 `[n]`, least confidence among them.
    """

    coverage: np.ndarray
    accuracy: np.ndarray
    threshold: np.ndarray

    @property
    def area(self) -> float:
        """Area under the risk-coverage curve: the mean risk over all coverages (Geifman et al. 2019, 1805.08206)."""
        return float(np.mean(1 - self.accuracy))


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> Calibration:
    """Calibration curve.

    Args:
      confidence: `[n]` in [0, 1], n at least 1. A bin holds its lower edge; the last one both.
      right: `[n]`, whether each answer is right, or how far in [0, 1].
      bins: how many.

    Raises:
      ValueError: the arrays do not match, are empty, or a number is not in [0, 1].
    """
    confidence, right = _checked(confidence, right)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    there = count > 0
    sure, accuracy = (np.bincount(place, x, minlength=bins)[there] / count[there] for x in (confidence, right))
    return Calibration(sure, accuracy, count[there])


def selective(confidence: np.ndarray, right: np.ndarray) -> Selective:
    """Risk-coverage curve; arguments as of `calibration`."""
    confidence, right = _checked(confidence, right)
    order = np.argsort(-confidence, kind="stable")
    sure = confidence[order]
    _, group, size = np.unique(-sure, return_inverse=True, return_counts=True)
    mean = (np.bincount(group, right[order]) / size)[group]
    number = np.arange(1, len(sure) + 1)
    return Selective(number / len(sure), np.cumsum(mean) / number, sure)


def _checked(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    if confidence.ndim != 1 or confidence.shape != right.shape or not len(confidence):
        raise ValueError(f"confidence {confidence.shape} and right {right.shape} must be [n] both, n at least 1")
    for name, values in (("confidence", confidence), ("right", right)):
        if not np.all((values >= 0) & (values <= 1)):
            raise ValueError(f"{name} must lie in [0, 1]")
    return confidence, right
