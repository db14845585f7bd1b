"""Texts in a folder, of one machine or of a network's file system, each replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from duet_jax._files import is_temporary, write
from duet_jax.errors import StudyError

SECONDS_TO_WAIT = 30.0
LOCK = "write.lock"


class Changed(Exception):
    """Another process was faster: what was to be replaced is not as it was read any more."""


class Folder:
    """A `Storage` whose versions are the texts themselves, compared and replaced under a lock (flock) of the folder."""

    def __init__(self, folder: Path):
        self.address = str(folder)
        self.local = folder
        self._lock = filelock.FileLock(folder / LOCK)

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Holds the folder's lock; other changes wait. May be nested."""
        try:
            self._lock.acquire(timeout=SECONDS_TO_WAIT)
        except filelock.Timeout:
            raise StudyError(
                f"{self.local} has been locked by another process for {SECONDS_TO_WAIT:.0f} s; try again."
            ) from None
        except OSError as error:
            raise StudyError(f"{self.local} cannot be written: {error.strerror}.") from None
        try:
            yield
        finally:
            self._lock.release()

    def read(self, name: str) -> tuple[bytes, bytes]:
        """See `Storage`."""
        try:
            content = (self.local / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise StudyError(f"{self.local / name} cannot be read: {error.strerror}.") from None
        return content, content

    def read_all(self, folder: str) -> dict[str, bytes]:
        """See `Storage`."""
        # What begins with a point is a network's file system's, or was being written by a process that was killed.
        paths = [path for path in (self.local / folder).glob("[!.]*") if path.is_file()]
        return {path.name: self.read(f"{folder}/{path.name}")[0] for path in paths}

    def names(self) -> list[str]:
        """See `Storage`; what a killed process left behind of ours is not listed."""
        if not self.local.exists():
            return []
        return [path.name for path in self.local.iterdir() if path.name != LOCK and not is_temporary(path)]

    def create(self, name: str, content: bytes) -> bytes:
        """See `Storage`."""
        path = self.local / name
        with self.editing():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Where the file system has no links, only the lock tells who is first.
            if path.exists():
                raise FileExistsError(name)
            write(path, content, new=True)
        return content

    def replace(self, name: str, content: bytes, version: bytes) -> bytes:
        """See `Storage`."""
        with self.editing():
            try:
                found, _ = self.read(name)
            except FileNotFoundError:
                raise Changed(name) from None
            if found != version:
                raise Changed(name)
            write(self.local / name, content)
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        path = self.local / name
        with self.editing():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)

    def upload(self, path: Path, name: str) -> None:
        """Nothing is to be done: what is large is there already."""
