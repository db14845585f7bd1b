"""What a study has cost: trainings, tokens, device-seconds, and the time from its beginning to its last news."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from duet_jax.trial import Trial


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of all trainings that were finished, those of failed trials too.

    Attributes:
      trainings: how many there were.
      tokens: prompt and response tokens trained on, all epochs, padding not counted.
      seconds: of trainings with their validation, one after the other; of one that was resumed, its last run alone.
      device_seconds: the same times the devices that took part; None where the number of devices is not known of all.
      devices: most that took part in one; None where it is not known of any.
      elapsed: seconds from the first proposal to the last thing that happened; breaks count.
      waiting: seconds that trained models waited for their scores, in all: several may wait at the same time.
    """

    trainings: int
    tokens: int
    seconds: float
    device_seconds: float | None
    devices: int | None
    elapsed: float
    waiting: float


def cost(trials: Sequence[Trial], metrics: Sequence[Mapping[str, Any]]) -> Cost:
    """Adds up the trials of a study.

    Args:
      trials: all of them.
      metrics: logged steps, in the order of their trials.
    """
    devices = {row["trial"]: int(row["devices"]) for row in metrics if row.get("devices")}
    trained = [(trial.trial, trial.training) for trial in trials if trial.training is not None]
    seconds = {number: float(training.get("seconds") or 0.0) for number, training in trained}
    known = [devices[number] for number, _ in trained if number in devices]
    moments = [datetime.datetime.fromisoformat(moment) for trial in trials for moment in trial.times.values()]
    return Cost(
        trainings=len(trained),
        tokens=sum(int(training.get("tokens") or 0) for _, training in trained),
        seconds=sum(seconds.values()),
        device_seconds=sum(seconds[number] * devices[number] for number in seconds)
        if len(known) == len(trained)
        else None,
        devices=max(known, default=None),
        elapsed=(max(moments) - min(moments)).total_seconds() if moments else 0.0,
        waiting=sum(spans(trial).get("scoring", 0.0) for trial in trials),
    )


def spans(trial: Trial) -> dict[str, float]:
    """Wall time of a trial's stages, seconds: until it was trained, and from then until its score was told."""
    ends = [trial.times.get(name) for name in ("proposed", "trained", "told")]
    moments = [None if end is None else datetime.datetime.fromisoformat(end) for end in ends]
    found = {}
    for name, start, end in zip(("training", "scoring"), moments, moments[1:], strict=False):
        if start is not None and end is not None:
            found[name] = max((end - start).total_seconds(), 0.0)
    return found
