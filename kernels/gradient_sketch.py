"""CountSketches of per-example gradients from their factors, in one kernel: the gradients stay on the chip.

The gradient of a linear layer for one example is `x^T d`. Plain JAX makes it block by block and reads it again to
sketch it. The kernel multiplies on the matrix unit, lays the product out as rows of the sketch, flips signs, rotates
and adds, all in the vector memory of a TPU.

Arithmetic, for each example: `2 T rows cols` operations of the matrix unit; about 6 of the vector unit for each of the
`rows cols` coordinates, and a rotation of lanes for every 1024 of them; `bytes(x) + bytes(d) + 4 k` bytes move, and a
bit of sign a coordinate. At T = 512 the matrix unit bounds the kernel for two thirds of its time, rotations for the
rest. Plain JAX moves 8 bytes more a coordinate where its blocks do not fit into the vector memory; where they do, it
is bound by the many small steps of a loop over sketch rows.

Not the default anywhere, as no TPU has run it. It compiles for TPU v5e, v5p and v6e (libtpu 0.0.42 and 0.0.50). The
compiler's estimates for a pass that sketches all layers, in million cycles, of them in the kernel, plain JAX:
SmolLM2-135M, 16 examples of 512 tokens (v5e): 258, 20, 407; Llama-3.1-8B, 4 examples of 512 tokens (v5p): 1,006, 374,
9,326. They are no measurements: those of the kernel count its instructions without stalls, and for 8B are of its v5e
schedule. Both take the same memory, 1.3 and 2.9 GB beside the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from duet_jax.kernels.count_sketch import count_sketch
from duet_jax.kernels.dispatch import Implementation, runs_kernel
from jax import Array

LANES = 128
TILE_BYTES = 4 << 20  # most bytes of a tile of the gradient, where it can be cut
ROWS_AT_A_TIME = 4  # sketch rows that are rotated side by side, each into a sum of its own; divides 32
VMEM_BYTES = 48 << 20  # vector memory that a kernel may take; TPUs from v5e on have at least 64 MiB


class Plan(NamedTuple):
    """How a gradient `[rows, cols]` is cut into tiles of whole rows.

    Attributes:
      rows: of the gradient in a tile.
      tiles: number of them.
      sketch_rows: rows of k coordinates in a tile; the last may be short where there is one tile.
      prefetch: whether the next d is fetched while one is in use.
    """

    rows: int
    tiles: int
    sketch_rows: int
    prefetch: bool


def plan_of(tokens: int, rows: int, cols: int, k: int, itemsize: int) -> Plan | None:
    """The plan for factors `[tokens, rows]` and `[tokens, cols]`, or None where the kernel does not take them.

    It takes k that are multiples of 1024 and cols that are multiples of 64 (with an even number of rows where they
    are none of 128), if `rows` can be cut into equal tiles of a multiple of 128 rows and of k coordinates, or are few
    enough for one tile, and everything fits into the vector memory.
    """
    if k % 1024 or cols % (LANES // 2) or (cols % LANES and rows % 2):
        return None
    step = math.lcm(LANES, k // math.gcd(k, cols))
    sizes = [rows, *(size for size in range((rows - 1) // step * step, 0, -step) if rows % size == 0)]
    for size in sizes:
        sketch_rows = -(-size * cols // k)
        large = 4 * size * cols > TILE_BYTES and size != sizes[-1]
        for prefetch in (True, False):
            used = _vector_memory(tokens, size, cols, sketch_rows, k, itemsize) + tokens * cols * itemsize * prefetch
            if not large and used <= VMEM_BYTES:
                return Plan(size, rows // size, sketch_rows, prefetch)
    return None


def _vector_memory(tokens: int, rows: int, cols: int, sketch_rows: int, k: int, itemsize: int) -> int:
    """Bytes of a kernel's buffers, without a second one for d."""
    factors = itemsize * tokens * (3 * rows + cols)  # x twice, and transposed
    segments = 4 * rows * (cols + LANES) if cols % LANES else 0
    products = 4 * rows * 4 * LANES
    sums = 4 * k * (2 * ROWS_AT_A_TIME + 2)
    signs = 2 * 4 * -(-sketch_rows // 32) * k
    return factors + segments + products + sums + signs + 4 * sketch_rows * k


def reference(x: Array, d: Array, seed: Any, stream: Any, k: int) -> Array:
    """What the kernel computes, in plain JAX, with the whole gradients in memory."""
    gradient = jax.lax.dot_general(x, d, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return count_sketch(gradient.reshape(x.shape[0], -1), seed, stream, k)


def gradient_sketch(
    x: Array,
    d: Array,
    seed: Any,
    stream: Any,
    k: int,
    *,
    implementation: Implementation | None = None,
    plain: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Sketches `count_sketch(x[b]^T d[b])` of all coordinates of one parameter.

    Args:
      x: `[B, T, rows]`.
      d: `[B, T, cols]`, of the dtype of `x`; products accumulate in float32.
      seed: of the projection, below 2**32.
      stream: of the parameter, from `signs.stream`.
      k: buckets.
      implementation: None for the default, plain JAX.
      plain: computes the sketches of x and d in plain JAX where that is wanted, or the kernel does not take the
        shapes (see `plan_of`); `reference` if None.

    Returns:
      float32 `[B, k]`.
    """
    if runs_kernel(implementation):
        plan = plan_of(x.shape[1], x.shape[2], d.shape[2], k, x.dtype.itemsize)
        if plan is not None:
            from duet_jax.kernels.gradient_sketch_pallas import fused  # Pallas takes long to import

            return fused(plan, x, d, seed, stream, k)
    return reference(x, d, seed, stream, k) if plain is None else plain(x, d)
