"""The highest scores of a stream, without keeping the stream."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Top(NamedTuple):
    """The highest scores of each column, in falling order; of equal ones, the earlier row first.

    Attributes:
      scores: float32 `[columns, count]`; -inf where there were fewer rows.
      rows: int32 `[columns, count]`, numbers of the rows; -1 where there were fewer.
    """

    scores: Array
    rows: Array


def empty(columns: int, count: int) -> Top:
    """The top `count` of nothing."""
    return Top(jnp.full((columns, count), -jnp.inf, jnp.float32), jnp.full((columns, count), -1, jnp.int32))


@partial(jax.jit, donate_argnums=0)
def merge(top: Top, block: Array, start: Any) -> Top:
    """The top of what was seen and of a block.

    Args:
      top: of the rows before; given up.
      block: scores float32 `[n, columns]`, without NaN, of the rows
      start: and those that follow it.
    """
    count = top.scores.shape[1]
    scores = jnp.concatenate([top.scores, block.T], axis=1)
    numbers = jnp.asarray(start, jnp.int32) + jnp.arange(block.shape[0], dtype=jnp.int32)
    rows = jnp.concatenate([top.rows, jnp.broadcast_to(numbers, block.T.shape)], axis=1)
    # Of equal scores, top_k takes the first: the one seen before.
    scores, places = jax.lax.top_k(scores, count)
    return Top(scores, jnp.take_along_axis(rows, places, axis=1))
