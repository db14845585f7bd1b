"""Arrow files of a job: each is written once, as a whole, for what a key says, and is mapped into memory to be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from duet_jax._files import replacing

# A record's word for itself, as UTF-8 in which even half of a surrogate pair may be written.
NAME = pa.large_binary()


def open_file(path: Path, key: str) -> pa.ipc.RecordBatchFileReader | None:
    """The file, mapped into memory, or None if there is none, or one that is cut short or was written for another key.

    What makes such a file readable is written last.
    """
    try:
        found = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowException):
        return None
    return found if (found.schema.metadata or {}).get(b"key") == key.encode() else None


def write_file(
    path: Path, key: str, schema: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, dict[str, str]]]
) -> None:
    """Writes batches, each with words of its own, unless another process has written the file meanwhile.

    That one stays: to replace a file that others have mapped is not safe on every file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if open_file(path, key) is None:
        path.unlink(missing_ok=True)
    with (
        suppress(FileExistsError),
        replacing(path, new=True) as file,
        pa.ipc.new_file(file, schema.with_metadata({"key": key})) as writer,
    ):
        for batch, words in batches:
            writer.write_batch(batch, custom_metadata=words)


def encoded(names: Iterable[str]) -> pa.Array:
    """A column of names."""
    return pa.array([name.encode("utf-8", "surrogatepass") for name in names], NAME)


class Column(Sequence[Any]):
    """Some of the values of a binary column, in any order.

    Args:
      values: of all rows.
      rows: int64 `[n]`, those that are meant; None: all.
    """

    def __init__(self, values: pa.ChunkedArray, rows: np.ndarray | None = None):
        self._values = values
        self._rows = rows

    def __len__(self) -> int:
        return len(self._values) if self._rows is None else len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        if self._rows is not None:
            row = self._rows[row]
        elif not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._read(self._values[int(row)].as_py())

    def __iter__(self) -> Iterator[Any]:
        if self._rows is not None:
            yield from super().__iter__()
            return
        for chunk in self._values.chunks:
            yield from map(self._read, chunk.to_pylist())

    def take(self, rows: Any) -> Any:
        """Those with some numbers."""
        chosen = np.asarray(rows, np.int64)
        return type(self)(self._values, chosen if self._rows is None else self._rows[chosen])

    def _read(self, value: bytes) -> Any:
        return value


class Names(Column):
    """Texts of a column of names."""

    def _read(self, value: bytes) -> str:
        return value.decode("utf-8", "surrogatepass")

    @classmethod
    def join(cls, many: Sequence[Sequence[str]]) -> Sequence[str]:
        """All names, one after the other; they stay in their files if all of them are in files."""
        if many and all(isinstance(names, Names) and names._rows is None for names in many):
            return cls(pa.chunked_array([chunk for names in many for chunk in names._values.chunks], NAME))  # type: ignore[attr-defined]
        return tuple(name for names in many for name in names)
