"""What becomes of each training example: its target is kept or corrected, or the example is dropped (CLEAR).

Chen and Mueller 2024 (arXiv 2403.12776), section 3: Auto-Filter keeps the examples whose confidence lies above a
threshold, the median where nothing else is said; Auto-Correct replaces a target where a proposal is judged better with
a confidence above another. All is pure functions of arrays; prompts are never changed. Ours are the rules for equal
confidences and for prompts that come more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np


class Action(StrEnum):
    """What becomes of an example."""

    KEEP = "keep"
    CORRECT = "correct"
    DROP = "drop"


class Filter(NamedTuple):
    """Which of n examples Auto-Filter keeps.

    Attributes:
      kept: bool `[n]`.
      thresholds: float64 `[n]`, gamma of each example.
      beaten: bool `[n]`, examples above their threshold that another example of the same prompt, with another target
        and more confidence, takes the place of.
      level: the groups of which no confidence lies above their quantile, so that those at it are kept.
    """

    kept: np.ndarray
    thresholds: np.ndarray
    beaten: np.ndarray
    level: tuple[str, ...]


class Decision(NamedTuple):
    """One example's fate, with every number that led to it.

    Attributes:
      id: of the example.
      action: what becomes of it.
      confidence: in its target.
      threshold: that the confidence must exceed.
      beaten: whether another target of the same prompt has more confidence.
      proposal: the target proposed in its place, if any was.
      better: whether the judge prefers the proposal, in both positions.
      acceptance: confidence in that, NaN where there was nothing to judge.
      eta: that it must exceed.
    """

    id: str
    action: Action
    confidence: float
    threshold: float
    beaten: bool
    proposal: str | None
    better: bool
    acceptance: float
    eta: float


def auto_filter(
    confidence: np.ndarray,
    pairs: Sequence[tuple[object, str]],
    *,
    groups: Sequence[str] | None = None,
    quantile: float = 0.5,
    threshold: float | None = None,
) -> Filter:
    """Which examples are kept: those with c > gamma.

    Where no confidence of a group lies above its quantile, as when all are equal, those at it are kept (`level`), for
    otherwise nothing would be. Of examples above their thresholds with the same prompt and different targets only those
    of the most confident target are kept.

    Args:
      confidence: c, `[n]`; an example whose confidence is NaN is not kept, and no quantile counts it.
      pairs: prompt, hashable, and target of each.
      groups: a name for each, such as its domain, of those that have a quantile of their own; None: one for all.
      quantile: in [0, 1], linear between two confidences; 0.5 is the median.
      threshold: gamma itself, in place of a quantile.
    """
    confidence = np.asarray(confidence, float)
    known = ~np.isnan(confidence)
    names = np.array(["all"] * len(confidence) if groups is None else list(groups))
    thresholds = np.full(len(confidence), np.nan if threshold is None else threshold)
    above, level = np.zeros(len(confidence), bool), []
    for name in dict.fromkeys(names.tolist()):
        own = (names == name) & known
        if threshold is None and own.any():
            thresholds[own] = np.quantile(confidence[own], quantile)
        above[own] = confidence[own] > thresholds[own]
        if threshold is None and own.any() and not above[own].any():
            # A quantile between equal numbers may be rounded above them.
            above[own] = confidence[own] == confidence[own].max()
            level.append(name)
    # What is not kept anyway takes nobody's place.
    beaten = above & ~_best_of_prompt(np.where(above, confidence, -np.inf), pairs)
    return Filter(above & ~beaten, thresholds, beaten, tuple(level))


def _best_of_prompt(confidence: np.ndarray, pairs: Sequence[tuple[object, str]]) -> np.ndarray:
    """Whether each example's target is that of the most confident example with its prompt (the first of equals)."""
    best: dict[object, int] = {}
    for row, (prompt, _) in enumerate(pairs):
        if prompt not in best or confidence[row] > confidence[best[prompt]]:
            best[prompt] = row
    return np.array([pairs[best[prompt]][1] == target for prompt, target in pairs], bool)


def auto_correct(better: np.ndarray, acceptance: np.ndarray, eta: float) -> np.ndarray:
    """Whether proposals are accepted, bool `[n]`: judged better, with a confidence greater than eta.

    Args:
      better: bool `[n]`.
      acceptance: `[n]`; NaN is not accepted.
      eta: 0.8 in the paper.
    """
    return np.asarray(better, bool) & (np.asarray(acceptance) > eta)


def actions(kept: np.ndarray, corrected: np.ndarray) -> list[Action]:
    """CORRECT where a proposal is accepted, whatever the filter says; else KEEP where that keeps; else DROP."""
    return [
        Action.CORRECT if accepted else Action.KEEP if stays else Action.DROP
        for stays, accepted in zip(kept, corrected, strict=True)
    ]
