"""Who trains in a study: one run alone, or several workers that share it.

    run.lock            held by a run alone from start to end; run.holder.json says by whom
    workers/NAME.lock   held by the worker NAME from start to end; free as soon as its process is dead
    workers/NAME.json   its host and process, and its heartbeat

The file of a trial names the worker that is at it and counts how often it was claimed. A worker whose lock is free has
died, and one whose heart has not beaten for long is out of reach: the next worker that looks for work claims its trial
and goes on from its checkpoints. Whoever held the trial before may come back, but its reports are refused, since its
claim is no longer the last one.

On a shared file system this relies on what local ones and NFS 4 have: locks (flock) that the server gives back when
their holder is gone, a rename that is seen whole, a link that fails if the name is taken, and files that are read anew
when they are opened; a folder may be listed as it was a minute ago. No clocks of two hosts are compared.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from duet_jax._files import is_temporary, write
from duet_jax.errors import StudyError
from duet_jax.study import Study

# Seconds between heartbeats, and without one after which a worker is out of reach.
BEAT = 15.0
SILENCE = 300.0


class Worker:
    """One of the workers that share a study; `join` makes it."""

    def __init__(self, study: Study, name: str):
        self.name = name
        self._folder = study.folder / "workers"
        self._heard: dict[str, tuple[str, float]] = {}

    def gone(self, other: str | None) -> bool:
        """Whether the holder of a trial, None for a run alone, is no longer at it.

        Call it while the study is being edited: to look whether a lock is free takes it for a moment.
        """
        if other in (None, self.name):
            return True
        path = self._folder / f"{other}.json"
        if _is_free(path.with_suffix(".lock")):
            return True
        try:
            beat = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # It is beginning or ending.
            beat = ""
        known, since = self._heard.get(path.stem, (None, 0.0))
        if beat != known:
            self._heard[path.stem] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENCE


@contextmanager
def join(study: Study, name: str) -> Iterator[Worker]:
    """Shares a study with other workers. Never waits.

    Raises:
      StudyError: a run holds the study alone, another worker has the name, or it cannot be the name of a file.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise StudyError(f"The worker's name is {name!r}; it must be letters, digits, points, dashes and underscores.")
    path = study.folder / "workers" / f"{name}.json"
    lock, holder = filelock.FileLock(path.with_suffix(".lock")), study.folder / "run.holder.json"
    with study.editing():
        path.parent.mkdir(exist_ok=True)
        if not _is_free(study.folder / "run.lock"):
            raise StudyError(
                f"A run holds {study.folder} alone ({_about(holder)}); stop it, and start it again with --worker."
            )
        if not _taken(lock):
            raise StudyError(f"{study.folder} has a worker {name} ({_about(path)}); give this one another name.")
        since = _now()
        write(path, _holder(since))
        _sweep(study)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            # A file system may be out of reach for a moment; if it stays so, the others stop waiting.
            with suppress(OSError):
                write(path, _holder(since))

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield Worker(study, name)
    finally:
        ended.set()
        heart.join()
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Holds a study for one run: no other process trains. Never waits.

    Raises:
      StudyError: another process holds it, or a worker; it is named.
    """
    lock, holder = filelock.FileLock(study.folder / "run.lock"), study.folder / "run.holder.json"
    if not _taken(lock):
        raise StudyError(f"Another run holds {study.folder} ({_about(holder)}); wait for it or stop it.")
    try:
        with study.editing():
            for path in sorted((study.folder / "workers").glob("*.json")):
                if not _is_free(path.with_suffix(".lock")):
                    raise StudyError(
                        f"Workers share {study.folder}, one is {path.stem} ({_about(path)}); join them with --worker "
                        f"NAME, or stop them."
                    )
            _sweep(study)
        write(holder, _holder(_now()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


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


def _holder(since: str) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "beat": _now()})


def _about(path: Path) -> str:
    """Who wrote a file of a holder, in words."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
