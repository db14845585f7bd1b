"""One trial of a study, as its file holds it, and what may become of it."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from duet_jax.errors import FeedbackError, Overtaken, StudyError
from duet_jax.types import Feedback

Status = Literal["pending", "completed", "failed", "abandoned"]


@dataclass(frozen=True)
class Trial:
    """One mixture, and what has become of it.

    Attributes:
      trial: number from 0, also the name of its file.
      status: "pending" until its feedback is told, or until it has "failed" because something outside went wrong,
        so that its mixture may be proposed again, or is "abandoned", so that it is not.
      stage: "proposed" or "asked" (to be trained by somebody else), "trained", "scored".
      mixture: share of the budget by domain name.
      counts: examples by domain name.
      feedback: None, or value, stderr (may be None), independent (whether that error is noise of this trial
        alone, and not the same for all trials), details.
      settings: its own values of the configuration's fields that are searched, and its fidelity, by dotted path.
      proposal: what the search expected: mean, stderr (at the fidelity that counts), acquisition, origin.
      seeds: of everything random in the trial.
      training: what was trained on and how it went; None before that.
      times: UTC, ISO 8601, of "proposed", "trained", "told", "failed" and "abandoned".
      error: why it failed or is abandoned.
      worker: of several that share the study, the one that trains it; None: a run alone does, or somebody else.
      claim: how often a worker has taken the trial over; what is reported under an earlier claim is refused.
    """

    trial: int
    status: Status
    stage: str
    mixture: Mapping[str, float]
    counts: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    feedback: Mapping[str, Any] | None = None
    proposal: Mapping[str, Any] | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    times: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    worker: str | None = None
    claim: int = 0

    @property
    def noise(self) -> float | None:
        """Standard error of the feedback as the search should hear it: None unless it is this trial's own."""
        if self.feedback is None or not self.feedback.get("independent", True):
            return None
        return self.feedback["stderr"]

    @property
    def diverged(self) -> bool:
        """Whether the loss of its training is not finite."""
        return self.training is not None and not math.isfinite(self.training.get("loss", 0.0))


def check_ratings(ratings: Sequence[int], stars: int | None) -> None:
    """Looks at how many people gave each number of stars, up to `stars`; None: people do not rate.

    Raises:
      FeedbackError: these cannot be such counts.
    """
    if stars is None:
        raise FeedbackError("People do not rate the trials of this study; leave the ratings out.")
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in ratings)
    if len(ratings) != stars or not whole or not sum(ratings):
        raise FeedbackError(
            f"The ratings are {list(ratings)}; they must be {stars} whole numbers, how many gave each number of stars, "
            f"at least one of them above 0."
        )


def dump(trial: Trial) -> bytes:
    """What a trial's file holds."""
    return (json.dumps(asdict(trial), indent=1, ensure_ascii=False) + "\n").encode()


def parse(content: bytes, number: int, names: Sequence[str], where: str) -> Trial:
    """The trial of this number in a study over the domains `names`, from what its file holds.

    Raises:
      StudyError: the file, which is at `where`, is damaged.
    """
    try:
        trial = Trial(**json.loads(content))
        # JSON has lists only; what was written were tuples.
        lists = {name: tuple(value) for name, value in trial.settings.items() if isinstance(value, list)}
        trial = replace(trial, settings={**trial.settings, **lists})
        problem = _trial_problem(trial, number) or mixture_problem(trial.mixture, names)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        problem = str(error)
    if problem:
        raise StudyError(f"{where} is damaged ({problem}); restore it from a copy of the study.") from None
    return trial


def claimed(trial: Trial, worker: str | None) -> Trial:
    """A trial that is given to a worker, or to a run alone (None).

    Raises:
      Overtaken: it is closed.
    """
    if trial.status != "pending":
        raise Overtaken(f"Trial {trial.trial} is {trial.status} by now.")
    return replace(trial, worker=worker, claim=trial.claim + 1)


def updated(trial: Trial, changes: Mapping[str, Any]) -> Trial:
    """A trial with other fields; a new stage is noted in its times."""
    if "stage" not in changes:
        return replace(trial, **changes)
    if trial.status != "pending":
        # Its feedback came in while it was being trained: that is the later stage.
        return replace(trial, **{**changes, "stage": trial.stage})
    return replace(trial, **changes, times={**trial.times, changes["stage"]: now()})


def completed(trial: Trial, feedback: Feedback, independent: bool, ratings: Sequence[int] | None) -> Trial:
    """A trial with its feedback.

    Raises:
      FeedbackError: it has some already, or has failed, or is abandoned.
    """
    if trial.feedback is not None:
        raise FeedbackError(
            f"Trial {trial.trial} has its feedback already: {trial.feedback['value']}, told at "
            f"{trial.times.get('told')}; a trial is told once."
        )
    if trial.status in ("failed", "abandoned"):
        what = "failed" if trial.status == "failed" else "was abandoned"
        raise FeedbackError(f"Trial {trial.trial} {what} ({trial.error}) and takes no feedback.")
    return replace(
        trial,
        status="completed",
        stage="scored",
        feedback={**asdict(feedback), "independent": independent}
        | ({} if ratings is None else {"ratings": list(ratings)}),
        times={**trial.times, "told": now()},
    )


def closed(trial: Trial, status: Literal["failed", "abandoned"], reason: str) -> Trial:
    """A trial without feedback.

    Raises:
      FeedbackError: it is not pending.
    """
    if trial.status != "pending":
        change = "fail" if status == "failed" else "be abandoned"
        raise FeedbackError(f"Trial {trial.trial} is {trial.status} and cannot {change} any more.")
    return replace(trial, status=status, error=reason, times={**trial.times, status: now()})


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _trial_problem(trial: Trial, number: int) -> str | None:
    if trial.trial != number:
        return f"it says to be trial {trial.trial!r}"
    if trial.status not in get_args(Status):
        return f"its status is {trial.status!r}"
    if (trial.status == "completed") != (trial.feedback is not None):
        return f"it is {trial.status} {'without' if trial.feedback is None else 'with'} feedback"
    if trial.feedback is not None:
        Feedback(trial.feedback["value"], trial.feedback["stderr"])
    return None


def words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings for people: the last part of each field's name, and its value."""
    return {name.rpartition(".")[2]: _word(value) for name, value in settings.items()}


def _word(value: Any) -> str:
    if value is None:  # of layers with adapters
        return "all"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def mixture_problem(mixture: Mapping[str, float], names: Sequence[str]) -> str | None:
    """Why a mixture is no point of the simplex over the domains `names`; None if it is one."""
    if sorted(mixture) != sorted(names):
        return f"has shares for {len(mixture)} domains ({', '.join(mixture)}), not for {', '.join(names)}"
    for name, share in mixture.items():
        if not (math.isfinite(share) and share >= 0):
            return f"has the share {share} for {name}; a share is at least 0"
    if abs(sum(mixture.values()) - 1) > 1e-6:
        return f"has shares that sum to {sum(mixture.values()):.8g}, not 1"
    return None
