"""Conversations, in memory only: they are gone when the server ends, and after an hour of silence."""

from __future__ import annotations

import collections
import dataclasses
import secrets
import time
from collections.abc import Callable

LONGEST_SILENCE = 3600.0
MOST = 5000


@dataclasses.dataclass(eq=False)
class Conversation:
    """One tester and one trial's model.

    Attributes:
      name: that nobody can guess.
      trial: number of the trial.
      rater: pseudonym of the tester.
      messages: of both, in turn; the first is the tester's.
      answers: of each answer by its name, when its first word was shown (seconds of the clock) and its words.
      touched: when it was last used.
      writing: what the answer on its way arrives by; None without one.
    """

    name: str
    trial: int
    rater: str
    touched: float
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    answers: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    writing: object | None = None


class Conversations:
    """All conversations by name; used by one thread, that of the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._all: collections.OrderedDict[str, Conversation] = collections.OrderedDict()

    def start(self, trial: int, rater: str) -> Conversation:
        """A new one; the ones that have been silent longest make room."""
        now = self.clock()
        while self._all:
            oldest = next(iter(self._all.values()))
            if len(self._all) < MOST and now - oldest.touched < LONGEST_SILENCE:
                break
            del self._all[oldest.name]
        found = Conversation(secrets.token_urlsafe(12), trial, rater, now)
        self._all[found.name] = found
        return found

    def find(self, name: str, rater: str) -> Conversation | None:
        """A rater's own conversation, None if there is none of this name or it has been forgotten."""
        found = self._all.get(name)
        if found is None or found.rater != rater:
            return None
        found.touched = self.clock()
        self._all.move_to_end(name)
        return found
