"""Names that processes go by where there are no locks: in an object store.

    workers/NAME.json   who goes by the name, a mark of that process, and its heartbeat; or that it has ended

Nobody can know of a process that is silent whether it has died, hangs, or cannot be reached. So nothing depends on it:
what counts is the claim of a trial, and each report is a write on the condition that the claim is still the one that
was read (`Study`). Silence only decides when another worker takes the trial up. If it is wrong about that, some steps
of a training are lost, and never feedback; whichever process tells the trial under its last claim is heard.

A heartbeat is a write on the condition that the one before is still there. A process that takes over a name that was
silent thereby ends the lease of the one before, which finds out when it looks for its next trial, and stops.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from duet_jax.errors import StudyError
from duet_jax.storage import Changed, Storage
from duet_jax.trial import now

# Seconds between heartbeats.
BEAT = 15.0
# Heartbeats without which a name is free for whoever asks for it. Its trials are still safe, see above.
MISSED = 3


class Lease:
    """A name that this process goes by; `hold` makes it."""

    def __init__(self, storage: Storage, name: str):
        self._storage, self._name = storage, name
        self._since, self._mark = now(), uuid.uuid4().hex
        # No record is as the one before: some stores tell versions by what they hold.
        self._count = itertools.count()

    def take(self, say: Callable[[str], None]) -> None:
        """Waits until the name has been silent for a few beats, if it is known, and goes by it.

        Raises:
          StudyError: another process goes by it, or the storage cannot be trusted.
        """
        key = _key(self._name)
        try:
            found, version = self._storage.read(key)
        except FileNotFoundError:
            try:
                version = self._storage.create(key, self._record())
            except FileExistsError:
                raise self._taken() from None
            self._prove(version)
            return
        if not _read(found).get("ended"):
            say(f"the study knows a worker {self._name} ({about(found)}); this one looks whether it is gone")
            deadline = time.monotonic() + MISSED * BEAT
            while time.monotonic() < deadline:
                time.sleep(BEAT / 5)
                if self._storage.read(key)[1] != version:
                    raise self._taken()
        try:
            version = self._storage.replace(key, self._record(), version)
        except Changed:
            raise self._taken() from None
        self._prove(version)

    def _prove(self, version: Any) -> None:
        """Raises a StudyError for a store that writes whatever the condition, as a few that speak S3's protocol do."""
        key = _key(self._name)
        self._storage.replace(key, self._record(), version)
        for write in (
            lambda: self._storage.replace(key, self._record(), version),
            lambda: self._storage.create(key, self._record()),
        ):
            try:
                write()
            except (Changed, FileExistsError):
                continue
            raise StudyError(
                f"{self._storage.address} heeds no conditions on writes (If-Match, If-None-Match), without which "
                f"workers cannot share a study; take another store, or a folder that is shared."
            )

    def beat(self, ended: bool = False) -> None:
        """Shows that this process is alive, or has ended; does nothing once another one goes by its name."""
        holder, version = self._holder()
        if holder.get("mark") == self._mark:
            with suppress(Changed):
                self._storage.replace(_key(self._name), self._record(ended), version)

    def check(self) -> None:
        """Raises a StudyError if another process goes by the name."""
        if self._holder()[0].get("mark") != self._mark:
            raise self._taken()

    def _record(self, ended: bool = False) -> bytes:
        own = {"mark": self._mark, "count": next(self._count), "ended": ended}
        return json.dumps({**record(self._since), **own}).encode()

    def _holder(self) -> tuple[dict[str, Any], Any]:
        try:
            found, version = self._storage.read(_key(self._name))
        except FileNotFoundError:
            return {}, None
        return _read(found), version

    def _taken(self) -> StudyError:
        who = _about(self._holder()[0])
        return StudyError(f"{self._storage.address} has a worker {self._name} ({who}); give this one another name.")


@contextmanager
def hold(storage: Storage, name: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Goes by a name, with a heartbeat.

    Raises:
      StudyError: another process goes by it, or the storage cannot be reached.
    """
    lease = Lease(storage, name)
    lease.take(say)
    try:
        with beating(lease.beat):
            yield lease
    finally:
        # What cannot be reached finds out by the silence.
        with suppress(StudyError):
            lease.beat(ended=True)


def heartbeat(storage: Storage, name: str) -> str | None:
    """What the process that goes by a name wrote last; None if it has ended, or nobody ever did."""
    try:
        found, _ = storage.read(_key(name))
    except FileNotFoundError:
        return None
    return None if _read(found).get("ended") else found.decode(errors="replace")


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Calls `beat` in a thread every BEAT seconds; where that fails for a moment, the next one may not."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError, StudyError):
                beat()

    heart = threading.Thread(target=run, daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


def record(since: str) -> dict[str, Any]:
    """This process, and its heartbeat."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "beat": now()}


def about(found: bytes) -> str:
    """Which process wrote a record, in words."""
    return _about(_read(found))


def _about(holder: dict[str, Any]) -> str:
    try:
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except KeyError:
        return "process unknown"


def _read(found: bytes) -> dict[str, Any]:
    """A record; nothing if it is damaged."""
    with suppress(ValueError):
        holder = json.loads(found)
        return holder if isinstance(holder, dict) else {}
    return {}


def _key(name: str) -> str:
    return f"workers/{name}.json"
