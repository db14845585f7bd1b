"""Which trial comes next: one that was left, or a new one at the search's next mixture."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from duet_jax import kept
from duet_jax.display import Display
from duet_jax.distributed.processes import lead, stop_if_told
from duet_jax.errors import Overtaken, StudyError
from duet_jax.recall import recall
from duet_jax.search import Search
from duet_jax.search.constraints import round_counts
from duet_jax.study import Study
from duet_jax.trial import Trial
from duet_jax.workers import Worker

MOST_FAILURES = 3
# Seconds between looks at what people rate, and at what workers do that may die.
PAUSE, LONG_PAUSE = 1.0, 15.0


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """Why there is no trial yet, and seconds until the next look."""

    reason: str
    pause: float


def next_trial(study: Study, search: Search, worker: Worker | None, display: Display) -> Trial | None:
    """The next trial to work on, or None at the end; a worker's is claimed by it. All processes of a run ask.

    It waits while as many trials as people rate at once are with them, and at the end while other workers are at
    trials, in case they die.

    Raises:
      StudyError: the last trials diverged, and the next would, too; or another process goes by the worker's name.
    """
    said = ""
    # The first process looks, and all wait, so that all can be stopped.
    while isinstance(found := lead(_look, study, search, worker), _Waiting):
        if found.reason != said:
            display.say(found.reason)
            said = found.reason
        stop_if_told()
        time.sleep(found.pause)
    return found


def _look(study: Study, search: Search, worker: Worker | None) -> Trial | _Waiting | None:
    people, waiting, pause = study.config.task.people, "", PAUSE
    if worker is not None:
        worker.check()
    rated = [trial for trial in study.trials() if trial.status == "pending" and trial.stage == "trained"]
    if people is None or len(rated) < people.open:
        trial = _left(study, worker) or new_trial(study, search, "proposed", worker)
        if trial is not None:
            return trial
        if worker is not None and (busy := unfinished(study)):
            holders = ", ".join(sorted({str(trial.worker) for trial in busy}))
            waiting = f"nothing is left to begin; in case they die, this worker waits for {holders}"
            pause = LONG_PAUSE
    if people is not None and rated:
        numbers = ", ".join(str(trial.trial) for trial in rated)
        waiting = f"ratings are awaited of trial {numbers}: duet serve {study.folder}"
        pause = PAUSE
    return _Waiting(waiting, pause) if waiting else None


def unfinished(study: Study) -> list[Trial]:
    """The trials of ours that were not seen through: to feedback, to people, or to the export that others score."""
    kind, found = study.config.task.kind, []
    for trial in study.trials():
        handed_over = kind == "people" or (kind == "external" and kept.export(study, trial.trial).exists())
        if trial.status == "pending" and (trial.stage == "proposed" or (trial.stage == "trained" and not handed_over)):
            found.append(trial)
    return found


def new_trial(study: Study, search: Search, stage: str, worker: Worker | None = None) -> Trial | None:
    """Opens a trial at the search's next mixture; None when a study that trains ("proposed") has all its rounds.

    The proposal takes seconds while the search compiles, so it is made beside those of others. If what it is made of
    has changed when it is done, it is made anew.
    """
    while True:
        trials = study.trials()
        if stage == "proposed" and _all_rounds(study, trials):
            return None
        proposal = _propose(study, search, trials)
        if list(map(_known, study.trials())) != list(map(_known, trials)):
            continue
        try:
            name = None if worker is None else worker.name
            return study.new_trial(**proposal, stage=stage, worker=name, number=len(trials))
        except FileExistsError:
            # Another process has opened it; a network's file system will list it soon.
            time.sleep(PAUSE)


def _left(study: Study, worker: Worker | None) -> Trial | None:
    """The first trial that nobody is at, claimed; a run alone claims only what workers have had."""
    for trial in unfinished(study):
        if worker is None and trial.claim == 0:
            return trial
        if worker is None or worker.gone(trial.worker):
            # Another worker may be faster, or somebody may tell the trial.
            with suppress(Overtaken):
                trial = study.claim(trial, None if worker is None else worker.name)
                kept.inherit(study, trial)
                return trial
    return None


def _all_rounds(study: Study, trials: Sequence[Trial]) -> bool:
    if len(trials) >= MOST_FAILURES and all(trial.diverged for trial in trials[-MOST_FAILURES:]):
        raise StudyError(
            f"The last {MOST_FAILURES} trials of {study.address} failed ({trials[-1].error}); "
            f"lower training.learning_rate, or the range of it that is searched, and start a new study."
        )
    return sum(trial.status in ("pending", "completed") for trial in trials) >= study.config.rounds


def _known(trial: Trial) -> tuple[Any, ...]:
    """What of a trial changes and proposals depend on."""
    return trial.status, trial.feedback, trial.diverged


def _propose(study: Study, search: Search, trials: Sequence[Trial]) -> dict[str, Any]:
    """What is new in the next trial, as `Study.new_trial` takes it."""
    names, config = study.domain_names, study.config
    number = len(trials)
    state, *_ = recall(search, study)
    # The search keeps away from what was abandoned as from what is under way; what failed may come back.
    avoided = [trial for trial in trials if trial.status in ("pending", "abandoned") or trial.diverged]
    mixture, diagnostics = search.ask(
        state,
        key=jax.random.fold_in(jax.random.key(config.seed), number),
        pending=np.array([[trial.mixture[name] for name in names] for trial in avoided]).reshape(-1, len(names)),
        pending_settings=[trial.settings for trial in avoided],
    )
    counts = round_counts(mixture, diagnostics.settings.get("budget", config.budget), search.constraints)
    # What is trained on is what the surrogate hears of: whole examples.
    realised = counts / counts.sum()
    words = np.random.SeedSequence([config.seed, number]).generate_state(3)
    return {
        "mixture": {name: float(share) for name, share in zip(names, realised, strict=True)},
        "counts": {name: int(count) for name, count in zip(names, counts, strict=True)},
        "settings": diagnostics.settings,
        "proposal": {
            "mean": diagnostics.mean,
            "stderr": diagnostics.stderr,
            "acquisition": diagnostics.acquisition if math.isfinite(diagnostics.acquisition) else None,
            "gap": diagnostics.gap if math.isfinite(diagnostics.gap) else None,
            "origin": diagnostics.origin,
        },
        "seeds": dict(zip(("sample", "training", "feedback"), map(int, words), strict=True)),
    }
