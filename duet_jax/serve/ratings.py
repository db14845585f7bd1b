"""Ratings as a file of the study, ratings.jsonl: only ever added to, and on the disk before anybody is thanked.

A line is a vote or the exclusion of a rater. Several processes may add to it; each change is made under ratings.lock,
after what others have added has been read. Neither the text of a conversation nor who a rater is stands in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from duet_jax.errors import FeedbackError, StudyError

LONGEST_NAME = 128
MOST_SECONDS, MOST_WORDS = 10**9, 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote:
    """One rating.

    Attributes:
      key: of whoever sent it; a vote that is sent again with the same key, for the same trial, counts once.
      trial: that was rated.
      stars: from 1, higher is better.
      rater: pseudonym, None if unknown.
      item: the answer or conversation that was rated, None if unknown. A later vote of the same rater on the same item
        takes the earlier one's place.
      seconds: from the answer's first word to the vote, if known.
      words: of the answer, if known.
      source: where it came from: "page", "api" or "import".
    """

    key: str
    trial: int
    stars: int
    rater: str | None = None
    item: str | None = None
    seconds: float | None = None
    words: int | None = None
    source: str = "api"


def check(fields: Any, stars: int, source: str) -> Vote:
    """A vote from values of JSON that somebody sent.

    Raises:
      FeedbackError: the first field that is missing, unknown or wrong.
    """
    if not isinstance(fields, dict):
        raise FeedbackError(f"A rating is {_shown(fields)}; it must be an object with key, trial and stars.")
    known = {field.name for field in dataclasses.fields(Vote)} - {"source"}
    for name in fields:
        if name not in known:
            raise FeedbackError(f"A rating has the field {_shown(name)}; it may have {', '.join(sorted(known))}.")
    for name in ("key", "trial", "stars"):
        if name not in fields:
            raise FeedbackError(f"A rating has no {name}; it needs key, trial and stars.")
    rules = {
        "key": (_is_name, f"a text of 1 to {LONGEST_NAME} characters"),
        "trial": (lambda x: is_whole(x) and x >= 0, "the number of a trial, from 0"),
        "stars": (lambda x: is_whole(x) and 1 <= x <= stars, f"a whole number from 1 to {stars}"),
        "rater": (lambda x: x is None or _is_name(x), f"a text of 1 to {LONGEST_NAME} characters, or null"),
        "item": (lambda x: x is None or _is_name(x), f"a text of 1 to {LONGEST_NAME} characters, or null"),
        "seconds": (lambda x: x is None or _is_amount(x), "a number of at least 0, or null"),
        "words": (
            lambda x: x is None or (is_whole(x) and 0 <= x < MOST_WORDS),
            "a whole number of at least 0, or null",
        ),
    }
    for name, value in fields.items():
        holds, rule = rules[name]
        if not holds(value):
            raise FeedbackError(f"A rating's {name} is {_shown(value)}; it must be {rule}.")
    whole = {name: int(fields[name]) for name in ("trial", "stars", "words") if fields.get(name) is not None}
    return Vote(**{**fields, **whole}, source=source)


def is_whole(value: Any) -> bool:
    """Whether a value of JSON is an integer; 3.0 is one to JSON Schema, and to programs with one kind of number."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < MOST_SECONDS and math.isfinite(value)


def _is_name(value: Any) -> bool:
    # A lone surrogate, which JSON can spell, is no text that a file could hold.
    encodable = isinstance(value, str) and value.isprintable()
    return encodable and 1 <= len(value) <= LONGEST_NAME


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_votes(path: Path, stars: int) -> list[Vote]:
    """Votes from a file of JSON lines, for `Ratings.add`.

    Raises:
      FeedbackError: a line is no vote; it is named, and nothing has been added.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"{path} cannot be read: {getattr(error, 'strerror', 'it is not UTF-8')}.") from None
    votes = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                votes.append(check(json.loads(line), stars, "import"))
        except json.JSONDecodeError as error:
            raise FeedbackError(f"{path}, line {number}, is not valid JSON: {error.msg}.") from None
        except FeedbackError as error:
            raise FeedbackError(f"{path}, line {number}: {error}") from None
    return votes


class Ratings:
    """The ratings of a study. Safe to use from several threads and processes.

    Args:
      folder: the study's directory.

    Raises:
      StudyError: ratings.jsonl is damaged; the line is named.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ratings.jsonl"
        self._file_lock = filelock.FileLock(folder / "ratings.lock")
        self._lock = threading.RLock()
        self._offset, self._line = 0, 0
        self._votes: dict[tuple[int, str], Vote] = {}
        self._current: dict[tuple, Vote] = {}
        self._excluded: set[str] = set()
        self.refresh()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """What has been added so far is read, and nobody, of any process, adds more until the block ends.

        Raises:
          StudyError: the file cannot be locked or read.
        """
        with self._lock, self._held():
            self.refresh()
            yield

    def add(self, votes: Sequence[Vote], may: Callable[[int], Any] = lambda trial: None) -> list[bool]:
        """Adds votes, all or none, and returns when they are on the disk.

        Args:
          votes: to be added.
          may: raises for the number of a trial that takes no more votes. It is asked of new votes only, and while no
            trial can be told what its ratings say.

        Returns:
          Of each whether it is new, and not a vote sent again.

        Raises:
          FeedbackError: a key has been used for another vote on the same trial.
          StudyError: the file cannot be written.
        """
        with self.holding():
            lines: list[dict[str, Any]] = []
            new: dict[tuple[int, str], Vote] = {}
            fresh = []
            for vote in votes:
                place = vote.trial, vote.key
                known = self._votes.get(place) or new.get(place)
                if known is not None and _meaning(known) != _meaning(vote):
                    raise FeedbackError(
                        f"The key {_shown(vote.key)} was used for another rating of trial {vote.trial}; give each "
                        f"rating a key of its own."
                    )
                fresh.append(known is None)
                if known is None:
                    may(vote.trial)
                    new[place] = vote
                    lines.append({"vote": dataclasses.asdict(vote), "time": _now()})
            self._append(lines)
        return fresh

    def exclude(self, rater: str, excluded: bool) -> None:
        """Leaves a rater's votes out from now on, or takes them in again."""
        with self.holding():
            self._append([{"rater": rater, "excluded": excluded, "time": _now()}])

    def refresh(self) -> None:
        """Reads what has been added, by whomever."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    file.seek(self._offset)
                    data = file.read()
            except FileNotFoundError:
                return
            except OSError as error:
                raise StudyError(f"{self.path} cannot be read: {error.strerror}.") from None
            # A last line without an end is still being written, or was torn by a kill, and nobody was thanked for it.
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._line += 1
                self._take(line)
            self._offset += len(whole)

    def votes(self) -> list[Vote]:
        """The votes that stand, in the order they came, less those of excluded raters."""
        with self._lock:
            return [vote for vote in self._current.values() if vote.rater not in self._excluded]

    def all_votes(self) -> list[Vote]:
        """The same with those of excluded raters."""
        with self._lock:
            return list(self._current.values())

    @property
    def excluded(self) -> frozenset[str]:
        """Raters whose votes are left out."""
        with self._lock:
            return frozenset(self._excluded)

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            self._file_lock.acquire(timeout=30)
        except filelock.Timeout:
            raise StudyError(f"{self.path} has been locked by another process for 30 s; try again.") from None
        except OSError as error:
            raise StudyError(f"{self.path} cannot be written: {error.strerror}.") from None
        try:
            yield
        finally:
            self._file_lock.release()

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        existed = self.path.exists()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # What a killed process left unfinished stands after the last whole line.
                os.ftruncate(descriptor, self._offset)
                os.lseek(descriptor, self._offset, os.SEEK_SET)
                data = memoryview(text.encode())
                try:
                    while data:
                        data = data[os.write(descriptor, data) :]
                    # Without rows as well: what is sent again may have been read before it was on the disk.
                    os.fsync(descriptor)
                except OSError:
                    # All or none: on a full disk the first of several rows may have found room.
                    os.ftruncate(descriptor, self._offset)
                    raise
            finally:
                os.close(descriptor)
            if not existed:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise StudyError(f"{self.path} cannot be written: {error.strerror}.") from None
        self.refresh()

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "vote" in row:
                vote = Vote(**row["vote"])
            else:
                (self._excluded.add if row["excluded"] else self._excluded.discard)(str(row["rater"]))
                return
        except (ValueError, TypeError, KeyError):
            raise StudyError(
                f"{self.path}, line {self._line}, is damaged; restore the file from a copy, or delete the line."
            ) from None
        self._votes[vote.trial, vote.key] = vote
        named = vote.rater is not None and vote.item is not None
        place = (vote.trial, vote.rater, vote.item) if named else (vote.trial, vote.key)
        # A vote that takes another's place comes last.
        self._current.pop(place, None)
        self._current[place] = vote


def _meaning(vote: Vote) -> tuple:
    """What must agree for a vote to be the same one, sent again; how long it took may differ."""
    return vote.stars, vote.rater, vote.item


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
