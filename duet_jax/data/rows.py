"""Rows of token ids of any lengths, in a few flat arrays, which may be files that are mapped into memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np


class Rows(Sequence[np.ndarray]):
    """Rows int32 `[length]`, each within one of the flat arrays.

    Of a row only its beginning and its length are kept beside them, 12 bytes. Rows that are taken from others or joined
    share the arrays, of which a row is a view.

    Args:
      parts: flat arrays, int32 `[m]`.
      starts: int64 `[n]`, where each row begins in the parts, one after the other.
      lengths: int32 `[n]`.
    """

    def __init__(self, parts: Sequence[np.ndarray], starts: np.ndarray, lengths: np.ndarray):
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))
        self._starts = starts
        self.lengths = lengths

    @classmethod
    def of(cls, rows: Iterable[Any]) -> Rows:
        """A copy of rows that are arrays of their own; `Rows` are taken as they are."""
        if isinstance(rows, Rows):
            return rows
        arrays = [np.asarray(row, np.int32) for row in rows]
        lengths = np.fromiter(map(len, arrays), np.int32, len(arrays))
        return cls.filling([np.concatenate([np.zeros(0, np.int32), *arrays])], lengths)

    @classmethod
    def filling(cls, parts: Sequence[np.ndarray], lengths: np.ndarray) -> Rows:
        """Rows that lie one after the other and fill the parts."""
        return cls(parts, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)

    @classmethod
    def join(cls, many: Sequence[Rows]) -> Rows:
        """All rows, one after the other."""
        before = accumulate((rows._ends[-1] if rows._ends else 0 for rows in many), initial=0)
        starts = [rows._starts + shift for rows, shift in zip(many, before, strict=False)]
        return cls(
            [part for rows in many for part in rows._parts],
            np.concatenate([np.zeros(0, np.int64), *starts]),
            np.concatenate([np.zeros(0, np.int32), *(rows.lengths for rows in many)]),
        )

    def take(self, rows: Any) -> Rows:
        """Some of the rows, by their numbers or a slice."""
        return Rows(self._parts, self._starts[rows], self.lengths[rows])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return self.take(row)
        start, length = int(self._starts[row]), int(self.lengths[row])
        if not length:
            return np.zeros(0, np.int32)
        part = bisect_right(self._ends, start)
        start -= self._ends[part] - len(self._parts[part])
        return self._parts[part][start : start + length]
