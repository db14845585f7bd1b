"""Dense projection by random signs that are made where they are used, never a matrix of them in memory.

Sign j of coordinate c is bit `j % 32` of word c of the stream that word `j // 32` of the parameter's stream names.

Arithmetic of `[B, n]` to `[B, k]`: `2 B n k` operations of the matrix unit, and about 4 of the vector unit for each of
the `n k` signs, shared by up to 256 examples. The kernel reads the vectors once for every 4096 columns and writes the
result once, `4 B (n k / 4096 + k)` bytes: it is bound by the matrix unit from about 64 examples at a time on, by the
signs below. Plain JAX makes the signs for 4 million values at a time and passes over them twice, 8 bytes each.

Not the default anywhere, as no TPU has run it. It compiles for TPU v5e, v5p and v6e (libtpu 0.0.42 and 0.0.50). The
compiler's estimate for a layer of SmolLM2-135M (v5e, B = 64, n = 331,776, k = 8192) is 21.4 million cycles in plain
JAX; the kernel's instructions are 5.0 million without stalls, of which 2.7 million are the matrix unit's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.dispatch import Implementation, runs_kernel
from duet_jax.kernels.signs import words
from jax import Array

MATRIX_VALUES = 1 << 22  # float32 values of the matrix that exist at a time in plain JAX


def matrix(seed: Any, stream: Any, k: int, count: int, first: Any = 0) -> Array:
    """Signs float32 `[count, k]` of the coordinates from `first` on."""
    streams = words(seed, stream, jnp.arange(k // 32, dtype=jnp.uint32))
    coordinates = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    bits = (words(seed, streams, coordinates[:, None])[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1.0 - 2.0 * bits.reshape(count, k).astype(jnp.float32)


def signed_sums(
    vectors: Array, seed: Any, stream: Any, k: int, first: Any = 0, *, implementation: Implementation | None = None
) -> Array:
    """Sums `vectors @ matrix(seed, stream, k, n, first)` of consecutive coordinates of one parameter.

    Args:
      vectors: `[B, n]`, multiplied in float32.
      seed: of the projection, below 2**32.
      stream: of the parameter, from `signs.stream`.
      k: number of sums, a multiple of 32.
      first: number of the first coordinate; may be traced.
      implementation: None for the default, plain JAX.

    Returns:
      float32 `[B, k]`, not scaled.
    """
    given = vectors.astype(jnp.float32), seed, stream, k, jnp.asarray(first, jnp.uint32)
    if runs_kernel(implementation):
        from duet_jax.kernels.rademacher_pallas import fused  # Pallas takes long to import

        return fused(*given)
    return _plain(*given)


def _plain(vectors: Array, seed: Any, stream: Any, k: int, first: Array) -> Array:
    batch, count = vectors.shape
    chunk = min(max(MATRIX_VALUES // k, 1), count)
    number = -(-count // chunk)
    padded = jnp.pad(vectors, [(0, 0), (0, number * chunk - count)])

    def add(i: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(padded, i * chunk, chunk, 1)
        return total + part @ matrix(seed, stream, k, chunk, first + (i * chunk).astype(jnp.uint32))

    return jax.lax.fori_loop(0, number, add, jnp.zeros((batch, k), jnp.float32))
