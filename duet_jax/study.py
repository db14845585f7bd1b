"""The study directory: everything a search has learnt, as files that survive a kill at any instant.

    config.yaml       the configuration, environment variables replaced
    trials/NNNN.json  one small file a trial, replaced as a whole
    sizes.json        the domains' numbers of examples, where the search depends on them
    metrics.jsonl     one line a logged training step
    metrics.NAME.jsonl  the same of the worker NAME
    ratings.jsonl     what people say of the trials, where they are asked
    write.lock        held for the moment of a change, so that `duet tell` works beside a run

The trial files are the source of truth. The search's state is derived from them and can be rebuilt.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np

from duet_jax import config as configs
from duet_jax import trial as trials
from duet_jax._files import append_lines, is_temporary, write
from duet_jax.config import StudyConfig
from duet_jax.errors import FeedbackError, StudyError
from duet_jax.trial import Trial
from duet_jax.types import Feedback

# Of a configuration, what may change between two runs of a study.
MAY_CHANGE = ("rounds", "tracking", "task.people.open", "task.people.instructions")
SECONDS_TO_WAIT = 30.0


class Study:
    """A study directory. Make one with `Study.create` or `Study.open`.

    Reading takes no lock and works on a read-only copy. Every change reads the files anew under the write lock.
    """

    def __init__(self, folder: Path, config: StudyConfig):
        self.folder = folder
        self.config = config
        self.domain_names = tuple(domain.name for domain in config.data.domains)
        self._write_lock = filelock.FileLock(folder / "write.lock")

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether there is a study in `folder`."""
        return (Path(folder) / "config.yaml").is_file()

    @classmethod
    def create(cls, folder: str | Path, config: StudyConfig) -> Study:
        """Makes a new study directory.

        Raises:
          StudyError: there is a study already, or other files.
        """
        folder = Path(folder)
        if cls.exists(folder):
            raise StudyError(f"{folder} already holds a study; open it, or give another directory.")
        # What a creation that was killed may have left behind is no obstacle to the next one.
        ours = {"trials", "write.lock"}
        study = cls(folder, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [e.name for e in folder.iterdir() if e.name not in ours and not is_temporary(e)]
            if others:
                raise StudyError(f"{folder} holds other files, such as {others[0]}; give an empty directory.")
            with study.editing():
                if cls.exists(folder):
                    raise StudyError(f"{folder} was made a study by another process; open it.")
                (folder / "trials").mkdir(exist_ok=True)
                write(folder / "config.yaml", configs.dump(config))
        except OSError as error:
            raise StudyError(f"{folder} cannot be made a study directory: {error.strerror}.") from None
        return study

    @classmethod
    def begin(cls, folder: str | Path, config: StudyConfig) -> Study:
        """Creates the study, or opens the one that is there; several processes may begin at the same time."""
        if not cls.exists(folder):
            try:
                return cls.create(folder, config)
            except StudyError:
                if not cls.exists(folder):
                    raise
        return cls.open(folder, config)

    @classmethod
    def open(cls, folder: str | Path, config: StudyConfig | None = None) -> Study:
        """Opens a study directory.

        Args:
          folder: the directory.
          config: what it should be a study of. More or fewer rounds are accepted and noted.

        Raises:
          StudyError: there is no study, or it is of another configuration; the differing fields are named.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            raise StudyError(f"There is no study in {folder} (no config.yaml); start one with: duet run CONFIG")
        found = configs.load(folder / "config.yaml")
        if config is None or config == found:
            return cls(folder, found)
        differing = [path for path in configs.differences(found, config) if not path.startswith(MAY_CHANGE)]
        if differing:
            raise StudyError(
                f"The study in {folder} was started with another configuration; these fields differ: "
                f"{', '.join(differing)}. Give another --study directory, or the old values."
            )
        study = cls(folder, config)
        with study.editing():
            write(folder / "config.yaml", configs.dump(config))
        return study

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Holds the write lock; other changes wait. May be nested."""
        try:
            self._write_lock.acquire(timeout=SECONDS_TO_WAIT)
        except filelock.Timeout:
            raise StudyError(
                f"{self.folder} has been locked by another process for {SECONDS_TO_WAIT:.0f} s; try again."
            ) from None
        except OSError as error:
            raise StudyError(f"{self.folder} cannot be written: {error.strerror}.") from None
        try:
            yield
        finally:
            self._write_lock.release()

    def trials(self) -> list[Trial]:
        """All trials in order.

        Raises:
          StudyError: a trial file is damaged or missing.
        """
        paths = [path for path in (self.folder / "trials").glob("*.json") if path.stem.isdecimal()]
        paths.sort(key=lambda path: int(path.stem))
        found = [trials.read(path, self.domain_names) for path in paths]
        for number, trial in enumerate(found):
            if trial.trial != number:
                raise StudyError(f"{self._path(number)} is missing; restore it from a copy of the study.")
        return found

    def completed(self) -> list[Trial]:
        """Trials with feedback, in order."""
        return [trial for trial in self.trials() if trial.status == "completed"]

    def observations(self, told: Sequence[Trial] | None = None) -> tuple[np.ndarray, np.ndarray, list[float | None]]:
        """What the search is told, of these trials with feedback or of all, in their order.

        Returns:
          Mixtures float64 `[n, d]` in the order of `domain_names`, values float64 `[n]`, standard errors.
        """
        pairs = [
            (trial, trial.feedback)
            for trial in (self.completed() if told is None else told)
            if trial.feedback is not None
        ]
        mixtures = [[trial.mixture[name] for name in self.domain_names] for trial, _ in pairs]
        values = np.array([feedback["value"] for _, feedback in pairs], np.float64)
        return (
            np.array(mixtures, np.float64).reshape(-1, len(self.domain_names)),
            values,
            [trial.noise for trial, _ in pairs],
        )

    def new_trial(
        self,
        *,
        mixture: Mapping[str, float],
        counts: Mapping[str, int],
        proposal: Mapping[str, Any] | None,
        seeds: Mapping[str, int],
        stage: str = "proposed",
        settings: Mapping[str, Any] | None = None,
        worker: str | None = None,
    ) -> Trial:
        """Adds a pending trial with the next number, claimed by the worker if there is one.

        Raises:
          StudyError: the mixture is no point of the simplex over the study's domains.
          FileExistsError: another host has opened this trial, and the file system does not list it yet.
        """
        problem = trials.mixture_problem(mixture, self.domain_names)
        if problem:
            raise StudyError(f"The mixture {dict(mixture)} {problem}.")
        with self.editing():
            number = len(self.trials())
            trial = Trial(
                trial=number,
                status="pending",
                stage=stage,
                mixture=dict(mixture),
                counts=dict(counts),
                settings=dict(settings or {}),
                proposal=proposal,
                seeds=dict(seeds),
                times={"proposed": _now()},
                worker=worker,
                claim=0 if worker is None else 1,
            )
            self._save(trial, new=True)
        return trial

    def claim(self, trial: Trial, worker: str | None) -> Trial:
        """Gives a trial to a worker, or to a run alone (None). Whatever its holder before still reports is refused."""
        with self.editing():
            current = self._current(trial)
            changed = dataclasses.replace(current, worker=worker, claim=current.claim + 1)
            self._save(changed)
        return changed

    def holds(self, trial: Trial) -> bool:
        """Whether nobody has claimed a trial since it was read."""
        return trials.read(self._path(trial.trial), self.domain_names).claim == trial.claim

    def update(self, trial: Trial | int, **changes: Any) -> Trial:
        """Replaces fields of a trial as it is on disk now; a new stage is noted in its times."""
        with self.editing():
            current = self._current(trial)
            if "stage" in changes:
                if current.status != "pending":
                    # Its feedback came in while it was being trained: that is the later stage.
                    changes["stage"] = current.stage
                else:
                    changes["times"] = {**current.times, changes["stage"]: _now()}
            changed = dataclasses.replace(current, **changes)
            self._save(changed)
        return changed

    def tell(
        self,
        trial: Trial | int,
        value: float,
        stderr: float | None = None,
        *,
        details: Mapping[str, float] | None = None,
        independent: bool = True,
        ratings: Sequence[int] | None = None,
    ) -> Trial:
        """Records the feedback of a pending trial, once.

        Args:
          trial: the trial or its number.
          value: higher is better.
          stderr: standard error of `value`, if known.
          details: further numbers worth keeping.
          independent: whether that error is this trial's own. That of a fixed evaluation set is not: all
            trials share it, and it does not blur their comparison.
          ratings: of people, how many gave each number of stars.

        Raises:
          FeedbackError: unknown trial, told, failed or abandoned before, a number that cannot be feedback, or one
            where ratings are heard, or ratings that are none.
        """
        try:
            number = float(value)
            error = None if stderr is None else float(stderr)
        except (TypeError, ValueError):
            raise FeedbackError(f"The feedback ({value!r}, {stderr!r}) must be numbers.") from None
        told = Feedback(number, error, details or {})
        people = self.config.task.people
        if people is not None and people.heard == "ordinal" and ratings is None:
            raise FeedbackError(
                f"Trials of {self.folder} are told by the ratings they got, not by a number; use: duet tell --ratings"
            )
        if ratings is not None:
            trials.check_ratings(ratings, None if people is None else people.stars)
        with self.editing():
            current = self._current(trial)
            if current.feedback is not None:
                raise FeedbackError(
                    f"Trial {current.trial} has its feedback already: {current.feedback['value']}, told at "
                    f"{current.times.get('told')}; a trial is told once."
                )
            if current.status in ("failed", "abandoned"):
                what = "failed" if current.status == "failed" else "was abandoned"
                raise FeedbackError(f"Trial {current.trial} {what} ({current.error}) and takes no feedback.")
            changed = dataclasses.replace(
                current,
                status="completed",
                stage="scored",
                feedback={**dataclasses.asdict(told), "independent": independent}
                | ({} if ratings is None else {"ratings": list(ratings)}),
                times={**current.times, "told": _now()},
            )
            self._save(changed)
        return changed

    def fail(self, trial: Trial | int, reason: str) -> Trial:
        """Closes a pending trial without feedback, for a reason outside: its mixture may be proposed again.

        Raises:
          FeedbackError: unknown trial, or one that is not pending.
        """
        return self._close(trial, "failed", reason)

    def abandon(self, trial: Trial | int, reason: str) -> Trial:
        """Closes a pending trial without feedback, for a reason of its own: the search keeps away from it.

        Raises:
          FeedbackError: unknown trial, or one that is not pending.
        """
        return self._close(trial, "abandoned", reason)

    def _close(self, trial: Trial | int, status: Literal["failed", "abandoned"], reason: str) -> Trial:
        with self.editing():
            current = self._current(trial)
            if current.status != "pending":
                change = "fail" if status == "failed" else "be abandoned"
                raise FeedbackError(f"Trial {current.trial} is {current.status} and cannot {change} any more.")
            times = {**current.times, status: _now()}
            changed = dataclasses.replace(current, status=status, error=reason, times=times)
            self._save(changed)
        return changed

    def sizes(self) -> dict[str, int] | None:
        """Examples of each domain by name as `note_sizes` noted them, None before.

        Raises:
          StudyError: the file is damaged.
        """
        path = self.folder / "sizes.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {name: int(found[name]) for name in self.domain_names}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            raise StudyError(f"{path} is damaged; restore it from a copy of the study.") from None

    def note_sizes(self, sizes: Mapping[str, int]) -> None:
        """Keeps how many examples of each domain there are to choose from, on which the search depends.

        Raises:
          StudyError: they have been others, of which the first is named.
        """
        with self.editing():
            known = self.sizes()
            if known is None:
                write(self.folder / "sizes.json", json.dumps(dict(sizes), indent=1, ensure_ascii=False) + "\n")
                return
        for name, count in known.items():
            if count != sizes[name]:
                raise StudyError(
                    f"The domain {name} has {sizes[name]} examples to choose from, but had {count} when the study in "
                    f"{self.folder} began; restore its data, or start a new study."
                )

    def append_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines of at least `trial` and `step`, and of the `worker` and `claim` where workers share the study.

        Each worker has a file of its own: on a network's file system what two hosts append gets lost.
        """
        worker = rows[0].get("worker")
        append_lines(self.folder / ("metrics.jsonl" if worker is None else f"metrics.{worker}.jsonl"), rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps in the order of (trial, step). Of a step logged twice the last claim, and the last, counts."""
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for path in sorted(self.folder.glob("metrics*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # Lines torn by a kill are skipped: a resumed run logs their steps again.
                with suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    key = int(row["trial"]), int(row["step"])
                    if row.get("claim", 0) >= rows.get(key, row).get("claim", 0):
                        rows[key] = row
        return [rows[key] for key in sorted(rows)]

    def _path(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}.json"

    def _current(self, trial: Trial | int) -> Trial:
        number = trial.trial if isinstance(trial, Trial) else trial
        if not self._path(number).is_file():
            count = len(self.trials())
            known = "it has none yet" if count == 0 else f"its trials are 0 to {count - 1}"
            raise FeedbackError(f"There is no trial {number} in {self.folder}; {known}.")
        current = trials.read(self._path(number), self.domain_names)
        if isinstance(trial, Trial) and trial.claim != current.claim:
            raise StudyError(f"Trial {number} of {self.folder} was taken over by {current.worker or 'another run'}.")
        return current

    def _save(self, trial: Trial, new: bool = False) -> None:
        text = json.dumps(dataclasses.asdict(trial), indent=1, ensure_ascii=False) + "\n"
        write(self._path(trial.trial), text, new=new)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
