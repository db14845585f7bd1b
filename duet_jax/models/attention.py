"""Causal attention of whole sequences without `[T, T]` arrays that outlive their block, and of one token over a cache.

Blocks of queries meet the keys that they may see, so that what lies above the diagonal is mostly not computed, and
the backward pass makes the probabilities again from their logarithmic sums (the scheme of Dao, FlashAttention-2,
arXiv:2307.08691, algorithms 1 and 2, without its inner loop over keys). Sums of whole rows of keys are exact: there is
no running maximum. On a CPU, forwards and backwards, `jax.nn.dot_product_attention` took 1.6 to 2.5 times as long for
64 to 1024 positions (`benchmarks/attention.py`). On GPUs cuDNN's fused attention is used where it takes the dtype.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.distributed.target import platform
from duet_jax.models.packed import keep

# Queries of a block: few enough that little is computed in vain, at most so many blocks that compile time stays short.
LEAST_QUERIES, MOST_BLOCKS = 64, 8
HIDDEN = -1e30  # Score of a key that a query does not see; finite, so that nothing subtracts infinities.


def causal_attention(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """Softmax attention of each position over itself and those before it.

    Args:
      q: `[B, T, N, H]`; query head n reads key head `n // (N // K)`.
      k: `[B, T, K, H]`, of the dtype of q.
      v: `[B, T, K, H]`, of the dtype of q.
      window: positions that each one sees, itself included; None for all before it.

    Returns:
      `[B, T, N, H]` in the dtype of q. Products take factors of that dtype; scores and softmax are float32.
    """
    # The library does not choose its fused GPU version by itself, and that one takes only half precision.
    if platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        seen = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=seen, implementation="cudnn")
    return _attention(q, k, v, window)


def cached_attention(q: Array, k: Array, v: Array, lengths: Array, window: int | None = None) -> Array:
    """Attention of one query a row over the first `lengths [B]` slots of a cache.

    Args:
      q: `[B, 1, N, H]`.
      k: `[B, K, H, S]`: with slots last, products with one query take half the time on a CPU.
      v: `[B, K, S, H]`, of the dtype of k.
      lengths: int32 `[B]`, the query's own slot included.
      window: as for `causal_attention`.

    Returns:
      `[B, 1, N, H]` in the dtype of q. Products take factors of the cache's dtype; scores and softmax are float32.
    """
    batch, heads, size, slots = k.shape
    position = jnp.arange(slots)[None, :]
    visible = position < lengths[:, None]
    if window is not None:
        visible &= position >= lengths[:, None] - window
    scores = _dot(q.reshape(batch, heads, -1, size).astype(k.dtype), k, (3, 2)) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, HIDDEN), axis=-1)
    return _dot(weights.astype(v.dtype), v, (3, 2)).reshape(q.shape).astype(q.dtype)


def _dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Contracts one axis of `x [B, K, ., .]` with one of `y`, in float32."""
    contract = (((axes[0],), (axes[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _by_key_head(x: Array, heads: int) -> Array:
    """`[B, T, N, H]` as `[B, K, T * N // K, H]`: the queries of a key head as one matrix, position by position."""
    batch, length, all_heads, size = x.shape
    x = x.reshape(batch, length, heads, all_heads // heads, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, heads, -1, size)


def _by_position(x: Array, length: int) -> Array:
    """The inverse of `_by_key_head`."""
    batch, heads, _, size = x.shape
    return x.reshape(batch, heads, length, -1, size).transpose(0, 2, 1, 3, 4).reshape(batch, length, -1, size)


def _plan(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """Blocks of queries from `start` to `end`, and the first key that any of them sees."""
    size = max(LEAST_QUERIES, -(-length // MOST_BLOCKS))
    return [
        (start, min(start + size, length), 0 if window is None else max(0, start - window + 1))
        for start in range(0, length, size)
    ]


def _scores(q: Array, k: Array, block: tuple[int, int, int], window: int | None) -> Array:
    """Scores float32 `[B, K, queries of the block, keys from the first one]`."""
    start, end, first = block
    positions = start + jnp.arange(q.shape[2])[:, None] // (q.shape[2] // (end - start))
    keys = jnp.arange(first, end)[None, :]
    visible = keys <= positions
    if window is not None:
        visible &= keys > positions - window
    return jnp.where(visible, _dot(q, k[:, :, first:end], (3, 3)) * q.shape[-1] ** -0.5, HIDDEN)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    return _forward(q, k, v, window)[0]


def _forward(q: Array, k: Array, v: Array, window: int | None) -> tuple[Array, tuple]:
    length, heads = k.shape[1:3]
    group = q.shape[2] // heads
    queries, keys, values = (_by_key_head(x, heads) for x in (q, k, v))
    mixed, sums = [], []
    for start, end, first in _plan(length, window):
        scores = _scores(queries[:, :, start * group : end * group], keys, (start, end, first), window)
        most = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed.append(_dot(weights.astype(v.dtype), values[:, :, first:end], (3, 2)) / total)
        sums.append(most + jnp.log(total))
    out = _by_position(jnp.concatenate(mixed, axis=2), length).astype(q.dtype)
    out = keep(out)
    return out, (q, k, v, out, keep(jnp.concatenate(sums, axis=2)))


def _backward(window: int | None, kept: tuple, d: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, sums = kept
    length, heads = k.shape[1:3]
    group, scale = q.shape[2] // heads, q.shape[-1] ** -0.5
    queries, keys, values, outs, ds = (_by_key_head(x, heads) for x in (q, k, v, out, d))
    # What the normalisation of the softmax takes back from every score.
    common = jnp.sum(outs.astype(jnp.float32) * ds.astype(jnp.float32), axis=-1, keepdims=True)
    of_queries = []
    of_keys, of_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for start, end, first in _plan(length, window):
        rows = slice(start * group, end * group)
        here, d_here = queries[:, :, rows], ds[:, :, rows]
        weights = jnp.exp(_scores(here, keys, (start, end, first), window) - sums[:, :, rows])
        of_weights = _dot(d_here, values[:, :, first:end], (3, 3))
        of_scores = (weights * (of_weights - common[:, :, rows]) * scale).astype(q.dtype)
        of_queries.append(_dot(of_scores, keys[:, :, first:end], (3, 2)))
        of_keys = of_keys.at[:, :, first:end].add(_dot(of_scores, here, (2, 2)))
        of_values = of_values.at[:, :, first:end].add(_dot(weights.astype(v.dtype), d_here, (2, 2)))
    return (
        _by_position(jnp.concatenate(of_queries, axis=2), length).astype(q.dtype),
        _by_position(of_keys, length).astype(k.dtype),
        _by_position(of_values, length).astype(v.dtype),
    )


_attention.defvjp(_forward, _backward)
