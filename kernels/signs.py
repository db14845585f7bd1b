"""Random bits that are the same on every device, for every version of JAX and under every sharding.

A counter hash of (seed, stream, index) in 32-bit integers, never a generator of the library: projections made on one
machine today must match those of another machine next year. tests/kernels/test_signs.py holds golden values.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax.numpy as jnp
from jax import Array


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words in which every bit of the input flips each bit of the output half of the time."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stream(name: str, layer: Any = 0) -> Array:
    """Number uint32 of the stream of one parameter: its name, and its layer, which may be traced."""
    return _mix(jnp.uint32(zlib.crc32(name.encode()))) + jnp.asarray(layer, jnp.uint32)


def words(seed: Any, stream: Any, index: Any) -> Array:
    """Random uint32 words.

    Args:
      seed: of the projection, below 2**32.
      stream: of a parameter, from `stream`.
      index: counter, uint32 of any shape; it broadcasts with the others.
    """
    seed, stream, index = (jnp.asarray(x, jnp.uint32) for x in (seed, stream, index))
    first = _mix(_mix(seed + jnp.uint32(0x9E3779B9)) ^ stream)
    second = _mix(first + jnp.uint32(0x9E3779B9))
    # Two rounds with a key each: after one alone, two streams would hold the same words in another order.
    return _mix(_mix(index ^ first) + second)


def signs(seed: Any, stream: Any, count: int, start: Any = 0) -> Array:
    """Signs float32 `[count]` of coordinates from `start`, a multiple of 32, on: bit `c % 32` of word `c // 32`."""
    index = jnp.asarray(start, jnp.uint32) // 32 + jnp.arange(-(-count // 32), dtype=jnp.uint32)
    bits = (words(seed, stream, index)[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:count].astype(jnp.float32)
