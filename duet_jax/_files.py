"""Files that are replaced as a whole."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from duet_jax.errors import StudyError

# What a file system without hard links, or a folder of one, answers who wants one.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write(path: Path, content: str | bytes, *, new: bool = False) -> None:
    """Replaces a file: to whoever reads it, and whenever the machine stops, it is the old one or the new.

    Raises:
      FileExistsError: the file should be new, but is there.
    """
    with replacing(path, new=new) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of the old one as `write` does when the block ends without an error."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if not (new and _linked(temporary, path)):
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _linked(temporary: str, path: Path) -> bool:
    """Gives a file its name unless another has it; False where the file system has no links, and so no second host."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in NO_LINKS:
            return False
        raise
    os.unlink(temporary)
    return True


def save_array(path: Path, array: np.ndarray) -> None:
    """Replaces a .npy file, as `write` does."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write(path, content.getvalue())


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replaces a .npz file, as `write` does."""
    content = io.BytesIO()
    # Its own `allow_pickle` is no option before NumPy 2.2, but the name of one more array.
    assert all(array.dtype != object for array in arrays.values())
    np.savez(content, **dict(arrays))  # type: ignore[arg-type]  # a name may be `allow_pickle`
    write(path, content.getvalue())


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a file of JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab+") as file:
        # A line that a killed run left unfinished must not swallow the next one.
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


@contextmanager
def alone(folder: Path, does: str) -> Iterator[None]:
    """Holds the lock of a folder, of which one process at a time `does` something, as "selects into".

    Raises:
      StudyError: another process has it.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StudyError(f"Another process {does} {folder}; wait for it, or give another folder.") from None
    with lock:
        yield


def is_temporary(path: Path) -> bool:
    """Whether a killed `write` left this file behind."""
    return path.name.startswith(".") and path.suffix == ".tmp"
