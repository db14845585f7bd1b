"""Utilities that selectors compute, kept by a hash of all that they depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax._files import save_array, write
from duet_jax.config import SelectorConfig
from duet_jax.distributed.processes import first, lead
from duet_jax.errors import DataError
from duet_jax.selection import diversity
from duet_jax.selection.clear import clear
from duet_jax.selection.davir import davir, rho
from duet_jax.selection.duplicates import near_duplicates
from duet_jax.selection.el2n import el2n
from duet_jax.selection.influence import influence
from duet_jax.selection.lengths import length, length_matched
from duet_jax.selection.less import less
from duet_jax.selection.loss_band import loss_band
from duet_jax.selection.losses import DETAILS
from duet_jax.selection.nice import nice
from duet_jax.selection.pool import Pool

SELECTORS = {
    "influence": influence,
    "less": less,
    "nice": nice,
    "davir": davir,
    "rho": rho,
    "loss_band": loss_band,
    "el2n": el2n,
    "length": length,
    "length_matched": length_matched,
    "near_duplicates": near_duplicates,
    "log_det": diversity.log_det,
    "facility_location": diversity.facility_location,
    "k_center": diversity.k_center,
    "clear": clear,
}


class Scores(NamedTuple):
    """Scores of all training examples, higher is better.

    Attributes:
      utilities: float64 `[examples]` for each domain, finite, or -inf for an example that must not be chosen.
      details: numbers that they are made of, `[examples]` of all domains in order, by name; of few selectors.
    """

    utilities: tuple[np.ndarray, ...]
    details: Mapping[str, np.ndarray]


def score(pool: Pool, selector: SelectorConfig, folder: Path) -> tuple[np.ndarray, ...]:
    """The utilities of `score_with_details`."""
    return score_with_details(pool, selector, folder).utilities


def score_with_details(pool: Pool, selector: SelectorConfig, folder: Path) -> Scores:
    """Scores of all training examples; from `folder` where they are there already.

    Args:
      pool: what is scored, and for what.
      selector: of a kind that computes.
      folder: of all selections. A folder in it belongs to these scores alone, and holds unfinished work too; those
        of trajectories serve all scores that follow the same training.

    Raises:
      DataError: a domain or a target has no examples, no reply says what to prefer, or a score is not finite.
      FeedbackError: a reward cannot be computed.
    """
    if selector.aims and selector.reference is None:
        _check(pool)
    place = folder / f"{selector.kind}-{pool.digest(selector)[:16]}"
    kept = place / "scores.npy"
    place.mkdir(parents=True, exist_ok=True)
    report = _Report(place / "report.txt", pool.say) if first() else pool.say
    if not lead(kept.is_file):
        found = SELECTORS[selector.kind](dataclasses.replace(pool, say=report), selector, place)
        for name, examples, values in zip(pool.names, pool.train, found, strict=True):
            wrong = np.isnan(values) | (values == np.inf)
            if wrong.any():
                raise DataError(
                    f"domain '{name}': the score of the example '{examples.ids[int(wrong.argmax())]}' is not finite; "
                    f"leave it out, or lower training.learning_rate if its gradient overflows after the warm-up"
                )
        lead(save_array, kept, np.concatenate(found).astype(np.float64))
    ends = np.cumsum([len(examples) for examples in pool.train])[:-1]
    details = {}
    if (place / DETAILS).is_file():
        with np.load(place / DETAILS, allow_pickle=False) as arrays:
            details = dict(arrays)
    return Scores(tuple(np.split(np.load(kept, allow_pickle=False), ends)), details)


class _Report:
    """Says lines and keeps them in a file: what was found out once, such as a sketch's error, is said in every run."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in self.lines:
            say(line)

    def __call__(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
            write(self.path, "".join(f"{each}\n" for each in self.lines))
            self.say(line)


def _check(pool: Pool) -> None:
    for name, examples in pool.sets:
        if not len(examples):
            reason = (
                "the target has no examples; give it some"
                if pool.targets
                else "no example of it is held out to be scored for; raise data.validation_fraction"
            )
            raise DataError(f"'{name}': {reason}")
