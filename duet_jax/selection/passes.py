"""What a compiled forward pass makes of every example, in parts that are kept: `part-00000.npy` and so on, each of
`PART` examples, longest first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax._files import save_array
from duet_jax.data import Batch, Encoded, gather_batch, plan_forward
from duet_jax.distributed.place import readable, row_parts
from duet_jax.distributed.processes import lead, stop_if_told
from duet_jax.selection.pool import Pool

# Examples that are written together.
PART = 512

# (batch of B rows, its examples' lengths int32 [B], 0 in rows of padding) to an array [B, ...] of the device.
Program = Callable[[Batch, np.ndarray], Any]


def each(pool: Pool, program: Program, data: Encoded, folder: Path, name: str) -> np.ndarray:
    """What a program makes of each example, float32 `[n, ...]`, in their order.

    The device computes a batch while the host takes the one before.

    Args:
      pool: whose buckets and progress are used.
      program: compiled, of few shapes.
      data: the examples, of which there is at least one.
      folder: of the parts of this program and this data alone; a run that was killed goes on from what is there.
      name: for progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Examples of about the same length come together, so that each part has batches of few lengths.
    order = np.argsort(-data.lengths, kind="stable")
    report, found = pool.progress(name), []
    for number, first in enumerate(range(0, len(data), PART)):
        rows, path = order[first : first + PART], folder / f"part-{number:05d}.npy"
        if not lead(path.exists):
            lead(save_array, path, _part(pool, program, data.take(rows)))
        found.append(np.load(path, allow_pickle=False))
        report(first + len(rows), len(data))
    result = np.empty((len(data), *found[0].shape[1:]), np.float32)
    result[order] = np.concatenate(found)
    return result


def _part(pool: Pool, program: Program, data: Encoded) -> np.ndarray:
    batching = pool.batching
    found: dict[int, np.ndarray] = {}
    waiting: tuple[np.ndarray, Any] | None = None

    def take(rows: np.ndarray, values: Any) -> None:
        found.update(zip(rows.tolist(), np.asarray(values, np.float32), strict=False))

    for length, size, rows in plan_forward(data.lengths, batching.buckets, batching.size, row_parts(pool.trainer.mesh)):
        lengths = np.zeros(size, np.int32)
        lengths[: len(rows)] = data.lengths[rows]
        values = readable(program(gather_batch(data, rows, length, size, batching.pad_id), lengths))
        stop_if_told()
        if waiting is not None:
            take(*waiting)
        waiting = rows, values
    assert waiting is not None, "there are no examples"
    take(*waiting)
    return np.stack([found[row] for row in range(len(data))])
