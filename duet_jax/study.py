"""The study: everything a search has learnt, as texts that survive a kill at any instant.

    config.yaml       the configuration, environment variables replaced
    trials/NNNN.json  one small text a trial, replaced as a whole
    sizes.json        the domains' numbers of examples, where the search depends on them

They lie in a folder or in an object store (`storage`). The trials are the source of truth. The search's state is
derived from them and can be rebuilt. Each change is of one trial, and is made only if the trial still is as it was
read, so `duet tell` works beside a run. In a folder, the study's own, or one of each machine's cache where the study is
in an object store, there are

    metrics.jsonl     one line a logged training step
    metrics.NAME.jsonl  the same of the worker NAME; metrics/NNNN-C.jsonl in an object store has a trial's, up to its
                        last checkpoint
    ratings.jsonl     what people say of the trials, where they are asked
    data/             examples and tokens, by hash, mapped into memory by all who run the study; see `reading`
    write.lock        held for the moment of a change
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax import config as configs
from duet_jax import trial as trials
from duet_jax._files import append_lines
from duet_jax.config import StudyConfig
from duet_jax.errors import ConfigError, FeedbackError, Overtaken, StudyError
from duet_jax.storage import Changed, Folder, Place, Storage, at
from duet_jax.trial import Trial
from duet_jax.types import Feedback

# Of a configuration, what may change between two runs of a study.
MAY_CHANGE = ("rounds", "tracking", "mesh", "task.people.open", "task.people.instructions")


class Study:
    """A study. Make one with `Study.create` or `Study.open`; where it is can be a folder, an address or a `Storage`.

    Reading takes no lock and works on a read-only copy.
    """

    def __init__(self, storage: Storage, config: StudyConfig):
        self.storage = storage
        self.config = config
        self.domain_names = tuple(domain.name for domain in config.data.domains)

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return self.storage.address

    @property
    def folder(self) -> Path:
        """The folder of this machine for what is large or of this machine alone."""
        return self.storage.local

    @property
    def remote(self) -> bool:
        """Whether that folder is not the study's own."""
        return not isinstance(self.storage, Folder)

    @staticmethod
    def exists(place: Place) -> bool:
        """Whether there is a study."""
        try:
            at(place).read("config.yaml")
        except FileNotFoundError:
            return False
        return True

    @classmethod
    def create(cls, place: Place, config: StudyConfig) -> Study:
        """Makes a new study.

        Raises:
          StudyError: there is a study already, or something else.
        """
        storage = at(place)
        where = storage.address
        if cls.exists(storage):
            raise StudyError(f"{where} already holds a study; open it, or give another directory.")
        try:
            # What a creation that was killed may have left behind is no obstacle to the next one.
            others = [name for name in storage.names() if name not in ("trials", "id")]
            if others:
                raise StudyError(f"{where} holds other files, such as {others[0]}; give an empty directory.")
            storage.local.mkdir(parents=True, exist_ok=True)
            storage.create("config.yaml", configs.dump(config).encode())
        except FileExistsError:
            raise StudyError(f"{where} was made a study by another process; open it.") from None
        except OSError as error:
            raise StudyError(f"{where} cannot be made a study directory: {error.strerror}.") from None
        return cls(storage, config)

    @classmethod
    def begin(cls, place: Place, config: StudyConfig) -> Study:
        """Creates the study, or opens the one that is there; several processes may begin at the same time."""
        storage = at(place)
        if not cls.exists(storage):
            try:
                return cls.create(storage, config)
            except StudyError:
                if not cls.exists(storage):
                    raise
        return cls.open(storage, config)

    @classmethod
    def open(cls, place: Place, config: StudyConfig | None = None) -> Study:
        """Opens a study.

        Args:
          place: where it is.
          config: what it should be a study of. More or fewer rounds are accepted and noted.

        Raises:
          StudyError: there is no study, or it is of another configuration; the differing fields are named.
        """
        storage = at(place)
        where = storage.address
        try:
            text, _ = storage.read("config.yaml")
            found = configs.loads(text.decode())
        except FileNotFoundError:
            raise StudyError(
                f"There is no study in {where} (no config.yaml); start one with: duet run CONFIG"
            ) from None
        except ConfigError as error:
            raise ConfigError(f"{where}/config.yaml: {error}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}/config.yaml cannot be read: it is not a text in UTF-8.") from None
        if config is None or config == found:
            return cls(storage, found)
        differing = [path for path in configs.differences(found, config) if not path.startswith(MAY_CHANGE)]
        if differing:
            raise StudyError(
                f"The study in {where} was started with another configuration; these fields differ: "
                f"{', '.join(differing)}. Give another --study directory, or the old values."
            )
        storage.write("config.yaml", configs.dump(config).encode())
        return cls(storage, config)

    def trials(self) -> list[Trial]:
        """All trials in order.

        Raises:
          StudyError: a trial file is damaged or missing.
        """
        texts = {
            int(name.removesuffix(".json")): text
            for name, text in self.storage.read_all("trials").items()
            if name.endswith(".json") and name.removesuffix(".json").isdecimal()
        }
        missing = [number for number in range(len(texts)) if number not in texts]
        if missing:
            raise StudyError(f"{self._where(missing[0])} is missing; restore it from a copy of the study.")
        return [self._parse(number, texts[number]) for number in range(len(texts))]

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
        number: int | None = None,
    ) -> Trial:
        """Adds a pending trial of a number, by default the next, claimed by the worker if there is one.

        Raises:
          StudyError: the mixture is no point of the simplex over the study's domains.
          FileExistsError: another process has opened the trial of that number.
        """
        problem = trials.mixture_problem(mixture, self.domain_names)
        if problem:
            raise StudyError(f"The mixture {dict(mixture)} {problem}.")
        number = len(self.trials()) if number is None else number
        trial = Trial(
            trial=number,
            status="pending",
            stage=stage,
            mixture=dict(mixture),
            counts=dict(counts),
            settings=dict(settings or {}),
            proposal=proposal,
            seeds=dict(seeds),
            times={"proposed": trials.now()},
            worker=worker,
            claim=0 if worker is None else 1,
        )
        self.storage.create(_name(number), trials.dump(trial))
        return trial

    def claim(self, trial: Trial, worker: str | None) -> Trial:
        """Gives a pending trial to a worker, or to a run alone (None). What its holder before still reports is refused.

        Raises:
          Overtaken: somebody else has claimed it since it was read, or it is closed.
        """
        return self._change(trial, lambda current: trials.claimed(current, worker))

    def holds(self, trial: Trial) -> bool:
        """Whether nobody has claimed a trial since it was read, as far as it can be reached now."""
        try:
            return self._current(trial.trial)[0].claim == trial.claim
        except StudyError:
            # Whoever has claimed it: what is reported under an earlier claim is refused.
            return True

    def update(self, trial: Trial | int, **changes: Any) -> Trial:
        """Replaces fields of a trial as it is now; a new stage is noted in its times."""
        return self._change(trial, lambda current: trials.updated(current, changes))

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
                f"Trials of {self.address} are told by the ratings they got, not by a number; use: duet tell --ratings"
            )
        if ratings is not None:
            trials.check_ratings(ratings, None if people is None else people.stars)
        return self._change(trial, lambda current: trials.completed(current, told, independent, ratings))

    def fail(self, trial: Trial | int, reason: str) -> Trial:
        """Closes a pending trial without feedback, for a reason outside: its mixture may be proposed again.

        Raises:
          FeedbackError: unknown trial, or one that is not pending.
        """
        return self._change(trial, lambda current: trials.closed(current, "failed", reason))

    def abandon(self, trial: Trial | int, reason: str) -> Trial:
        """Closes a pending trial without feedback, for a reason of its own: the search keeps away from it.

        Raises:
          FeedbackError: unknown trial, or one that is not pending.
        """
        return self._change(trial, lambda current: trials.closed(current, "abandoned", reason))

    def sizes(self) -> dict[str, int] | None:
        """Examples of each domain by name as `note_sizes` noted them, None before.

        Raises:
          StudyError: the file is damaged.
        """
        try:
            text, _ = self.storage.read("sizes.json")
            found = json.loads(text)
            return {name: int(found[name]) for name in self.domain_names}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            raise StudyError(f"{self.address}/sizes.json is damaged; restore it from a copy of the study.") from None

    def note_sizes(self, sizes: Mapping[str, int]) -> None:
        """Keeps how many examples of each domain there are to choose from, on which the search depends.

        Raises:
          StudyError: they have been others, of which the first is named.
        """
        text = json.dumps(dict(sizes), indent=1, ensure_ascii=False) + "\n"
        known = self.sizes()
        if known is None:
            try:
                self.storage.create("sizes.json", text.encode())
            except FileExistsError:
                known = self.sizes()
        for name, count in (known or {}).items():
            if count != sizes[name]:
                raise StudyError(
                    f"The domain {name} has {sizes[name]} examples to choose from, but had {count} when the study in "
                    f"{self.address} began; restore its data, or start a new study."
                )

    def append_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines of at least `trial` and `step`, and of the `worker` and `claim` where workers share the study.

        Each worker has a file of its own: on a network's file system what two hosts append gets lost.
        """
        worker = rows[0].get("worker")
        append_lines(self.folder / ("metrics.jsonl" if worker is None else f"metrics.{worker}.jsonl"), rows)

    def share_metrics(self, trial: Trial) -> None:
        """Gives an object store the steps of a trial that was trained here, as far as this machine took them."""
        if self.remote:
            rows = [json.dumps(row) + "\n" for row in self.metrics() if row["trial"] == trial.trial]
            self.storage.write(f"metrics/{trial.trial:04d}-{trial.claim}.jsonl", "".join(rows).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps in the order of (trial, step). Of a step logged twice the last claim, and the last, counts."""
        texts = [path.read_bytes() for path in sorted(self.folder.glob("metrics*.jsonl"))]
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for text in (*texts, *self.storage.read_all("metrics").values()):
            for line in text.decode(errors="replace").splitlines():
                # Lines torn by a kill are skipped: a resumed run logs their steps again.
                with suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    key = int(row["trial"]), int(row["step"])
                    if row.get("claim", 0) >= rows.get(key, row).get("claim", 0):
                        rows[key] = row
        return [rows[key] for key in sorted(rows)]

    def _where(self, number: int) -> str:
        return f"{self.address}/{_name(number)}"

    def _parse(self, number: int, text: bytes) -> Trial:
        return trials.parse(text, number, self.domain_names, self._where(number))

    def _current(self, number: int) -> tuple[Trial, Any]:
        """A trial as it is now, and the version of its text."""
        try:
            text, version = self.storage.read(_name(number))
        except FileNotFoundError:
            count = len(self.trials())
            known = "it has none yet" if count == 0 else f"its trials are 0 to {count - 1}"
            raise FeedbackError(f"There is no trial {number} in {self.address}; {known}.") from None
        return self._parse(number, text), version

    def _change(self, trial: Trial | int, change: Callable[[Trial], Trial]) -> Trial:
        """Changes a trial as it is now, or as it is then if somebody else changes it meanwhile."""
        number = trial.trial if isinstance(trial, Trial) else trial
        while True:
            current, version = self._current(number)
            if isinstance(trial, Trial) and trial.claim != current.claim:
                holder = current.worker or "another run"
                raise Overtaken(f"Trial {number} of {self.address} was taken over by {holder}.")
            changed = change(current)
            # Somebody gets on whenever this fails.
            with suppress(Changed):
                self.storage.replace(_name(number), trials.dump(changed), version)
                return changed


def _name(number: int) -> str:
    return f"trials/{number:04d}.json"
