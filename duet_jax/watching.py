"""What sees the steps of a study's trainings: the display, the study's metrics, trackers and the profiler."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duet_jax.display import Display
from duet_jax.distributed.processes import first, lead, several
from duet_jax.errors import StudyError
from duet_jax.leases import BEAT
from duet_jax.metering import Meter, find_peak, watching_compilations
from duet_jax.profiling import profiling
from duet_jax.study import Study
from duet_jax.tracking import Log, Tracking
from duet_jax.training.reports import StepReport
from duet_jax.trial import Trial

# Steps between looks whether the trial is still ours, of several processes, which must all look at the same step.
LOOK = 32


@dataclasses.dataclass(frozen=True)
class Watch:
    """Sees the trainings of one process; `watching` makes it."""

    study: Study
    display: Display
    meter: Meter
    tracking: Tracking
    after_step: Callable[[bool], None]

    def steps(self, trial: Trial, log: Log) -> Callable[[StepReport], None]:
        """What is called after each step of a trial's training.

        It raises a StudyError once another worker has the trial, so that no more time is lost on it.
        """
        owner = {} if trial.worker is None else {"worker": trial.worker, "claim": trial.claim}
        looked = time.monotonic()

        def on_step(report: StepReport) -> None:
            nonlocal looked
            if first():
                self.display.step(trial.trial, report)
                row = {**dataclasses.asdict(report), **self.meter.read(report)}
                self.study.append_metrics([{"trial": trial.trial, **owner, **row}])
                log(report.step, row)
                self.after_step(report.step == report.steps)
            due = report.step % LOOK == 0 if several() else time.monotonic() - looked > BEAT
            if self.study.remote and report.step % self.study.config.training.checkpoint_every == 0:
                # Another machine that goes on from this step's checkpoint has the steps before it from there.
                lead(self.study.share_metrics, trial)
            if owner and due:
                looked = time.monotonic()
                if not lead(self.study.holds, trial):
                    raise StudyError(f"Trial {trial.trial} was taken over.")

        return on_step


@contextmanager
def watching(study: Study, display: Display, tracking: Tracking, dtype: Any, profile: Path | None) -> Iterator[Watch]:
    """Watches what is trained inside.

    Args:
      study: whose metrics.jsonl is written.
      display: what a person sees.
      tracking: opens the runs of a tracker.
      dtype: what matrix products are computed in.
      profile: folder for a trace of a few steps, or None.
    """
    peak = find_peak(dtype)
    display.say(f"mfu is of {peak}")
    with watching_compilations() as compilations, profiling(profile if first() else None, display.say) as after_step:
        yield Watch(study, display, Meter(peak, compilations), tracking, after_step)
