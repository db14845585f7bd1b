"""Row-shift CountSketch: k random signed sums of a long vector, at a few bytes moved per coordinate.

The vector is read as rows of length k. Each row is multiplied by random signs, rotated by a random shift and added
to the sum (Charikar et al. 2002, with one hash per row in place of one per coordinate). Coordinates of one row never
meet in a bucket, those of different rows meet with probability 1/k, and there is neither a table of buckets nor a
scatter. Inner products of sketches are unbiased; their variance is at most that of k dense random signs,
(|x|^2 |y|^2 + <x,y>^2 - 2 sum x_i^2 y_i^2) / k.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.signs import words
from jax import Array

SHIFTS = 0x5BD1E995  # added to a parameter's stream: the stream of its rows' shifts


def _flip(row: Array, bits: Array) -> Array:
    """Negates float32 `row [..., n]` where the bit of `bits`, uint32 `[ceil(n / 32)]`, is 1: sign bits are flipped."""
    count = row.shape[-1]
    mask = (bits[:, None] << jnp.arange(31, -1, -1, dtype=jnp.uint32)) & jnp.uint32(0x80000000)
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(row, jnp.uint32) ^ mask.reshape(-1)[:count], jnp.float32
    )


def count_sketch(gradient: Array, seed: Any, stream: Any, k: int, start: Any = 0) -> Array:
    """Sketch of consecutive coordinates of one parameter.

    Coordinate c is added to bucket `(c % k + shift(c // k)) % k` with sign `signs.signs(seed, stream, ...)[c]`,
    where `shift(r) = words(seed, stream + SHIFTS, r) % k`. Sketches of disjoint coordinates add up.

    Args:
      gradient: `[..., n]`, summed in float32.
      seed: of the projection, below 2**32.
      stream: of the parameter, from `signs.stream`.
      k: buckets, a multiple of 32.
      start: number of the first coordinate, a multiple of k; may be traced.

    Returns:
      float32 `[..., k]`.

    Raises:
      ValueError: `k` is not a positive multiple of 32.
    """
    if k < 32 or k % 32:
        raise ValueError(f"A CountSketch of k={k} buckets is not possible; k must be a positive multiple of 32.")
    batch, count = gradient.shape[:-1], gradient.shape[-1]
    gradient = gradient.reshape(math.prod(batch), count).astype(jnp.float32)
    whole, rest = divmod(count, k)
    first_row = jnp.asarray(start, jnp.uint32) // k
    rows = jnp.arange(whole + (rest > 0), dtype=jnp.uint32)
    shifts = (words(seed, stream + jnp.uint32(SHIFTS), first_row + rows) % k).astype(jnp.int32)
    first_word = first_row * (k // 32)
    word_count = -(-count // 32)
    # Hashed before the loop, once for the batch, at 1/8 byte a coordinate: fused into the sum below, the hash
    # would run for every example and coordinate.
    bits = jax.lax.optimization_barrier(words(seed, stream, first_word + jnp.arange(word_count, dtype=jnp.uint32)))

    # Rows are added at their shift into two turns of the circle, which is folded once at the end.
    def add(row: Array, bits: Array, shift: Array, total: Array) -> Array:
        old = jax.lax.dynamic_slice_in_dim(total, shift, row.shape[-1], 1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + _flip(row, bits), shift, 1)

    def body(r: Array, total: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(gradient, r * k, k, 1)
        return add(row, jax.lax.dynamic_slice_in_dim(bits, r * (k // 32), k // 32), shifts[r], total)

    total = jnp.zeros((gradient.shape[0], 2 * k), jnp.float32)
    if whole:
        total = jax.lax.fori_loop(0, whole, body, total)
    if rest:
        total = add(gradient[:, whole * k :], bits[whole * (k // 32) :], shifts[whole], total)
    return (total[:, :k] + total[:, k:]).reshape(*batch, k)
