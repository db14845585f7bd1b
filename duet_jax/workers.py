"""Who trains in a study: one run alone, or several workers that share it.

    run.lock            held by a run alone from start to end; run.holder.json says by whom
    workers/NAME.lock   held by the worker NAME from start to end; free as soon as its process is dead
    workers/NAME.json   its host and process, and its heartbeat

The trial names the worker that is at it and counts how often it was claimed. A worker whose lock is free has died, and
one whose heart has not beaten for long is out of reach: the next worker that looks for work claims its trial and goes
on from its checkpoints. Whoever held the trial before may come back, but its reports are refused, since its claim is no
longer the last one.

On a shared file system this relies on what local ones and NFS 4 have: locks (flock) that the server gives back when
their holder is gone, a rename that is seen whole, a link that fails if the name is taken, and files that are read anew
when they are opened; a folder may be listed as it was a minute ago. In an object store there are no locks, and no run
alone: see `leases`; checkpoints are in the store. No clocks of two hosts are compared.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from duet_jax import leases
from duet_jax._files import is_temporary, write
from duet_jax.errors import StudyError
from duet_jax.leases import Lease
from duet_jax.storage import Folder
from duet_jax.study import Study
from duet_jax.trial import now

# Seconds without a heartbeat after which a worker is out of reach.
SILENCE = 300.0


class Worker:
    """One of the workers that share a study; `join` makes it."""

    def __init__(self, study: Study, name: str, lease: Lease | None):
        self.name = name
        self._study = study
        self._lease = lease
        self._heard: dict[str, tuple[str, float]] = {}

    def check(self) -> None:
        """Raises a StudyError if another process goes by this worker's name, which only a lock rules out."""
        if self._lease is not None:
            self._lease.check()

    def gone(self, other: str | None) -> bool:
        """Whether the holder of a trial, None for a run alone, is no longer at it."""
        if other is None or other == self.name:
            return True
        beat = _heartbeat(self._study, other)
        if beat is None:
            return True
        known, since = self._heard.get(other, (None, 0.0))
        if beat != known:
            self._heard[other] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENCE


@contextmanager
def join(study: Study, name: str, say: Callable[[str], None] = lambda line: None) -> Iterator[Worker]:
    """Shares a study with other workers.

    It waits only in an object store that knows the name, to see whether it is still used, and says so.

    Raises:
      StudyError: a run holds the study alone, another worker has the name, or it cannot be the name of a file.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise StudyError(f"The worker's name is {name!r}; it must be letters, digits, points, dashes and underscores.")
    if not isinstance(study.storage, Folder):
        with leases.hold(study.storage, name, say) as lease:
            yield Worker(study, name, lease)
        return
    path = study.folder / "workers" / f"{name}.json"
    lock, holder = filelock.FileLock(path.with_suffix(".lock")), study.folder / "run.holder.json"
    with study.storage.editing():
        path.parent.mkdir(exist_ok=True)
        if not _is_free(study.folder / "run.lock"):
            raise StudyError(
                f"A run holds {study.folder} alone ({_about(holder)}); stop it, and start it again with --worker."
            )
        if not _taken(lock):
            raise StudyError(f"{study.folder} has a worker {name} ({_about(path)}); give this one another name.")
        since = now()
        write(path, json.dumps(leases.record(since)))
        _sweep(study)
    try:
        with leases.beating(lambda: write(path, json.dumps(leases.record(since)))):
            yield Worker(study, name, None)
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Holds a study for one run: no other process trains. Never waits.

    Raises:
      StudyError: another process holds it, or a worker; it is named.
    """
    assert isinstance(study.storage, Folder), "an object store has no locks"
    lock, holder = filelock.FileLock(study.folder / "run.lock"), study.folder / "run.holder.json"
    if not _taken(lock):
        raise StudyError(f"Another run holds {study.folder} ({_about(holder)}); wait for it or stop it.")
    try:
        with study.storage.editing():
            for path in sorted((study.folder / "workers").glob("*.json")):
                if not _is_free(path.with_suffix(".lock")):
                    raise StudyError(
                        f"Workers share {study.folder}, one is {path.stem} ({_about(path)}); join them with --worker "
                        f"NAME, or stop them."
                    )
            _sweep(study)
        write(holder, json.dumps(leases.record(now())))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _heartbeat(study: Study, other: str) -> str | None:
    """What a worker wrote last, "" if it is beginning or ending; None if it has died or ended."""
    if not isinstance(study.storage, Folder):
        return leases.heartbeat(study.storage, other)
    path = study.folder / "workers" / f"{other}.json"
    # To look whether a lock is free takes it for a moment, in which nobody else may look.
    with study.storage.editing():
        if _is_free(path.with_suffix(".lock")):
            return None
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _taken(lock: filelock.BaseFileLock) -> bool:
    """Takes a lock unless another process has it, and says whether it is taken."""
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    except OSError as error:
        raise StudyError(f"{lock.lock_file} cannot be written: {error.strerror}.") from None
    return True


def _is_free(path: Path) -> bool:
    lock = filelock.FileLock(path)
    free = _taken(lock)
    if free:
        lock.release()
    return free


def _sweep(study: Study) -> None:
    """Removes what killed processes were about to write."""
    for folder in ("trials", "workers"):
        for left in (study.folder / folder).glob(".*"):
            if is_temporary(left):
                left.unlink(missing_ok=True)


def _about(path: Path) -> str:
    """Who wrote the file of a holder, in words."""
    try:
        return leases.about(path.read_bytes())
    except OSError:
        return "process unknown"
