"""What a person sees while a study runs: one line a finished round, and a live line for the round at work."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from duet_jax.training.sft import StepReport
from duet_jax.trial import Trial, words
from duet_jax.types import Feedback

# Seconds between lines about work that takes long, where there is no terminal.
PAUSE = 30.0


class Display:
    """Progress on a terminal; without one a line a finished round, and one every half minute of other work.

    Nothing is printed when quiet. Where workers share the rounds, no time left is told: none knows the others' pace.
    """

    def __init__(self, rounds: int, *, quiet: bool = False, shared: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._rounds = rounds
        self._shared = shared
        self._seconds: list[float] = []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Prints a line above the live one."""
        self.console.print(line, markup=False)

    def stage(self, trial: int, name: str) -> None:
        """Begins a stage of a round, such as training."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        description = f"round {trial + 1}/{self._rounds} {name}"
        self._task = self._progress.add_task(description, total=None, note=self._left(trial))

    def step(self, trial: int, report: StepReport) -> None:
        """Shows a training step."""
        if self._task is not None:
            note = f"loss {report.loss:.3f}  {report.tokens / report.step_seconds:.0f} tokens/s"
            left = self._left(trial, report)
            self._progress.update(
                self._task, completed=report.step, total=report.steps, note=f"{note}  {left}".rstrip()
            )

    def work(self, name: str, done: int, of: int) -> None:
        """Shows how far something other than a round has come, such as a selector's scores."""
        if not self.console.is_terminal:
            if time.monotonic() - self._printed >= PAUSE:
                self._printed = time.monotonic()
                self.say(f"{name}: {done} of {of}")
            return
        if self._task is not None and self._progress.tasks[0].description != name:
            self._progress.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._progress.add_task(name, total=of, note="")
        self._progress.update(self._task, completed=done, total=of)

    def round(
        self,
        trial: Trial,
        loss: float,
        feedback: Feedback,
        best: tuple[int, float],
        seconds: float,
    ) -> None:
        """Prints a finished round: mixture, settings, training loss, feedback, and the best so far."""
        self._seconds.append(seconds)
        number = trial.trial + 1
        error = "" if feedback.stderr is None else f" ± {feedback.stderr:.2g}"
        self.say(
            f"round {number:>2}/{self._rounds}  {shares(trial.mixture, trial.settings)}  loss {loss:.3f}  "
            f"feedback {feedback.value:.4g}{error}  best {best[1]:.4g} (round {best[0] + 1})  {seconds:.0f} s"
            + ("" if self._shared or number >= self._rounds else f"  {self._left(number)}")
        )

    def _left(self, trial: int, report: StepReport | None = None) -> str:
        """Time until the last round ends, from the mean of the rounds so far and the steps of this one."""
        if self._shared or not (self._seconds or report):
            return ""
        remaining: float = self._rounds - trial
        one = sum(self._seconds) / max(len(self._seconds), 1)
        if report is not None:
            # A resumed training has taken steps before this process began.
            remaining -= report.step / report.steps
            one = one or report.steps * report.step_seconds
        return f"{datetime.timedelta(seconds=round(max(remaining, 0.0) * one))} left"


def shares(mixture: Mapping[str, float], settings: Mapping[str, Any] | None = None) -> str:
    """A mixture in words, largest share first, and then settings; domains without a share are left out."""
    ordered = sorted(mixture.items(), key=lambda pair: -pair[1])
    line = " · ".join(f"{name} {share:.0%}" for name, share in ordered if share > 0)
    chosen = " · ".join(f"{name} {value}" for name, value in words(settings or {}).items())
    return f"{line}  {chosen}".rstrip()
