"""Checkpoints in an object store, for processes and machines that share no folder.

    FOLDER/STEP-MARK/I     what process I writes of the state after STEP steps
    FOLDER/STEP-MARK.json  what lies where in these parts, written when all of them are there

Without the last one there is no checkpoint, so one appears whole or not at all. Every run of a training has a MARK of
its own: what a killed one left unfinished is never taken for a part of another's.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Seconds between looks whether all parts are there.
PAUSE = 0.2


@runtime_checkable
class Large(Protocol):
    """What a shelf needs of an object store, see `storage.objects.Objects`."""

    address: str

    def read(self, name: str) -> tuple[bytes, Any]:
        """See `Storage`."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        ...

    def write_large(self, name: str, content: np.ndarray) -> None:
        """Writes bytes, uint8 `[n]`, in parts, of which the object is made when all are there."""
        ...

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes, at least 1, from `start`. Raises FileNotFoundError."""
        ...

    def listed(self, folder: str) -> list[str]:
        """Names of all objects in a folder and in those below it."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Deletes objects, of which some may be gone already."""
        ...


class Shelf:
    """The checkpoints of one training.

    Args:
      storage: where they are.
      folder: of this training's own checkpoints.
      earlier: folders of those that it goes on from while it has none, the last ones first.
    """

    def __init__(self, storage: Large, folder: str, earlier: Sequence[str] = ()):
        self._storage = storage
        self._folder = folder
        self._earlier = tuple(earlier)

    def __str__(self) -> str:
        return f"{self._storage.address}/{self._folder}"

    def exists(self) -> bool:
        """Whether there is a checkpoint."""
        return self.latest() is not None

    def latest(self) -> tuple[int, str] | None:
        """The steps and the name of the newest checkpoint; None where there is none."""
        for folder in (self._folder, *self._earlier):
            if whole := self._whole(folder):
                return int(whole[-1].rpartition("/")[2].partition("-")[0]), whole[-1]
        return None

    def place(self, name: str) -> str:
        """Where a checkpoint is, for people."""
        return f"{self._storage.address}/{name}"

    def read(self, name: str) -> dict[str, Any]:
        """What `finish` was given with a checkpoint. Raises FileNotFoundError if it was removed meanwhile."""
        return json.loads(self._storage.read(f"{name}.json")[0])

    def read_part(self, name: str, process: int, start: int, size: int) -> bytes:
        """Bytes of a part of a checkpoint. Raises FileNotFoundError if it was removed meanwhile."""
        return self._storage.read_range(f"{name}/{process}", start, size)

    def name(self, step: int, mark: str) -> str:
        """A new checkpoint's name; the mark is 32 hexadecimal digits."""
        return f"{self._folder}/{step:08d}-{mark}"

    def write_part(self, name: str, process: int, content: np.ndarray) -> None:
        """Writes what one process has of a checkpoint, uint8 `[n]`."""
        self._storage.write_large(f"{name}/{process}", content)

    def finish(
        self, name: str, processes: int, about: dict[str, Any], there: threading.Event, given_up: threading.Event
    ) -> None:
        """Waits for the parts of all processes, makes a checkpoint of them, and removes the ones before it.

        Args:
          name: see `name`.
          processes: how many there are.
          about: what is kept with it.
          there: set by who knows that all parts are written.
          given_up: set by who knows that they will not be.
        """
        parts = {f"{name}/{process}" for process in range(processes)}
        while not (there.is_set() or parts <= set(self._storage.listed(name))):
            if given_up.wait(PAUSE):
                return
        self._storage.write(f"{name}.json", json.dumps(about).encode())
        # Another claim, which has a checkpoint of its own, may remove these parts. Who writes this text then looks for
        # them, and who removes them then looks for this text, as is done below: one of them sees the other.
        if not parts <= set(self._storage.listed(name)):
            discard(self._storage, [f"{name}.json", *self._storage.listed(name)])
            return
        # Later ones are of another machine that trains the same.
        others = [other for other in self._whole(self._folder) if other < name]
        discard(self._storage, [f"{other}.json" for other in others])
        for folder in (*others, *2 * self._earlier):
            discard(self._storage, self._storage.listed(folder))

    def _whole(self, folder: str) -> list[str]:
        """Names of the checkpoints in a folder, in the order of their steps."""
        pattern = re.compile(re.escape(folder) + r"/\d{8}-[0-9a-f]{32}\.json")
        return sorted(n.removesuffix(".json") for n in self._storage.listed(folder) if pattern.fullmatch(n))


def discard(storage: Large, names: Sequence[str]) -> None:
    """Deletes checkpoints and their parts, the parts last: a checkpoint is gone before it is incomplete."""
    for whole in (True, False):
        storage.remove([name for name in names if name.endswith(".json") == whole])
