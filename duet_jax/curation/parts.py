"""Long work on many rows, done in parts that are kept: what was computed once is not lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax._files import write
from duet_jax.distributed.processes import lead

# Rows of a part.
PART = 128
Progress = Callable[[str, int, int], None]


def in_parts(
    folder: Path,
    name: str,
    identity: Any,
    sizes: Sequence[int],
    compute: Callable[[list[int]], list[Any]],
    on_progress: Progress = lambda name, done, of: None,
    part: int = PART,
) -> list[Any]:
    """One value of JSON for each row, from `folder` where it is there already.

    Rows are taken by size, so that those of a part fill batches of one length; which rows share a part depends on the
    sizes and on `part` alone, so that a run that was killed ends with the numbers of one that was not, and one with
    other parts, which has other files, never meets them.

    Args:
      folder: of all parts; those of this work lie in a folder in it, named by a hash of what decides them.
      name: of the work, for the folder and for progress.
      identity: all that decides the values, as values of JSON.
      sizes: how large each row is.
      compute: values of the rows with these numbers, in their order.
      on_progress: is told the name, rows done and of how many.
      part: rows that are computed together.
    """
    place = folder / f"{name}-{hash_of([identity, list(sizes), part])[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    order = np.argsort(np.asarray(sizes), kind="stable").tolist()
    found: list[Any] = [None] * len(order)
    for number, start in enumerate(range(0, len(order), part)):
        rows, path = order[start : start + part], place / f"{number:05d}.json"
        if not lead(path.is_file):
            lead(write, path, json.dumps(compute(rows)))
        for row, value in zip(rows, json.loads(path.read_text(encoding="utf-8")), strict=True):
            found[row] = value
        on_progress(name, start + len(rows), len(order))
    return found


def hash_of(identity: Any) -> str:
    """SHA-256 of a value of JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
