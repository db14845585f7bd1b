"""Files that are replaced as a whole."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file: to whoever reads it, and whenever the machine stops, it is the old one or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def is_temporary(path: Path) -> bool:
    """Whether a killed `write` left this file behind."""
    return path.name.startswith(".") and path.suffix == ".tmp"
