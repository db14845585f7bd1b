"""Greedy searches for a few vectors that stand for all: log-determinant, facility location, k-center; compiled.

Each chooses one vector after another, always the one that adds most to an objective of those chosen, so that a choice
of k is the beginning of every larger one. Of vectors that add the same to about a millionth, the first is chosen:
rounding differs between machines, the order should not. Vectors are scaled to length 1, so a product of two is their
cosine; a vector of zeros stays one.

The number of vectors is filled up with zeros to a power of two: sets of about the same size share one program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What is added to the diagonal of the kernel whose determinant grows: later gains are at least this, so that vectors
# beyond the number of dimensions still have an order, and far above the rounding of float32.
RIDGE = 1e-3
# Gains that differ by less than this, or by this share of the greatest, are equal.
SLACK = 1e-6
# Vectors whose gains in covering all others are computed together.
BLOCK = 64

# (units float32 [N, dim] of which the first `count` are vectors and the rest is 0, count, depth; capacity) to the
# chosen int32 [capacity], of which the first `depth` count, and what each of the others would add, float32 [N].
Program = Callable[..., tuple[Array, Array]]


def run(program: Program, vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses greedily.

    Args:
      program: one of `log_det`, `facility_location` and `k_center`.
      vectors: float `[n, dim]`, finite.
      depth: how many to choose, 1 to n.

    Returns:
      Their rows int64 `[depth]` in order, and what each of the others would add as the next one, float32 `[n]`; -inf
      at the chosen ones.
    """
    count = len(vectors)
    size = 1 << (count - 1).bit_length()
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.zeros((size, vectors.shape[1]), np.float32)
    np.divide(vectors, norms, out=units[:count], where=norms > 0, casting="unsafe")
    capacity = min(1 << (depth - 1).bit_length(), size)
    order, gains = program(units, count, depth, capacity=capacity)
    return np.asarray(order, np.int64)[:depth], np.asarray(gains)[:count]


@partial(jax.jit, static_argnames="capacity")
def log_det(units: Array, count: Array, depth: Array, *, capacity: int) -> tuple[Array, Array]:
    """Greedy maximum of `log det(K_S + RIDGE I)`, K the cosines: variety (Chen, Zhang and Zhou, NeurIPS 2018).

    The factor of Cholesky grows by a row a choice, for all vectors at once: `O(N (dim + capacity))` a choice, in place
    of a determinant for each vector. Memory is `[capacity, N]`. A gain is the ratio of the determinant after to that
    before, from RIDGE to 1 + RIDGE.
    """

    def add(i: Array, chosen: Array, gains: Array, factors: Array) -> tuple[Array, Array]:
        rest = _cosines(units, chosen) - jnp.dot(factors[:, chosen], factors, precision="highest")
        row = rest / jnp.sqrt(jnp.maximum(gains[chosen], RIDGE))
        return gains - jnp.square(row), factors.at[i].set(row)

    gains = jnp.where(_real(units, count), jnp.sum(jnp.square(units), axis=1) + RIDGE, -jnp.inf)
    factors = jnp.zeros((capacity, len(units)), jnp.float32)
    order, gains, _ = _choose(gains, factors, add, depth, capacity)
    return order, gains


@partial(jax.jit, static_argnames="capacity")
def facility_location(units: Array, count: Array, depth: Array, *, capacity: int) -> tuple[Array, Array]:
    """Greedy maximum of `sum_i max_{j in S} max(0, cosine(i, j))`: every vector has a near one among the chosen.

    What a vector adds only shrinks as others are chosen, so that what it once would have added bounds what it adds
    (Minoux 1978, the lazy greedy search): only vectors whose bound reaches the best gain are looked at, `BLOCK` of them
    at a time, `O(N dim BLOCK)` a block. Memory is `[N, BLOCK]`; the cosines of all pairs are never held.
    """
    block = min(BLOCK, len(units))

    def refresh(bounds: Array, covered: Array, *, all_of_them: bool = False) -> Array:
        """Gains in place of bounds: of all, or as long as a bound leaves open which gain is the greatest."""

        def is_open(state: tuple[Array, Array]) -> Array:
            bounds, fresh = state
            best = jnp.max(jnp.where(fresh, bounds, -jnp.inf))
            # Where everything is covered, there is nothing to look for.
            least = -jnp.inf if all_of_them else jnp.maximum(best - _slack(best), SLACK)
            return jnp.max(jnp.where(fresh, -jnp.inf, bounds)) > least

        def look(state: tuple[Array, Array]) -> tuple[Array, Array]:
            bounds, fresh = state
            highest, rows = jax.lax.top_k(jnp.where(fresh, -jnp.inf, bounds), block)
            cosines = jnp.dot(units, units[rows].T, precision="highest")
            gains = jnp.sum(jnp.maximum(cosines - covered[:, None], 0), axis=0)
            # Where fewer than a block were open, chosen and fresh ones came along.
            bounds = bounds.at[rows].set(jnp.where(highest > -jnp.inf, gains, bounds[rows]))
            return bounds, fresh.at[rows].set(True)

        return jax.lax.while_loop(is_open, look, (bounds, bounds == -jnp.inf))[0]

    def add(i: Array, chosen: Array, bounds: Array, covered: Array) -> tuple[Array, Array]:
        covered = jnp.maximum(covered, _cosines(units, chosen))
        return refresh(bounds.at[chosen].set(-jnp.inf), covered), covered

    covered = jnp.zeros(len(units), jnp.float32)
    bounds = refresh(jnp.where(_real(units, count), jnp.inf, -jnp.inf), covered)
    order, bounds, covered = _choose(bounds, covered, add, depth, capacity)
    return order, refresh(bounds, covered, all_of_them=True)


@partial(jax.jit, static_argnames="capacity")
def k_center(units: Array, count: Array, depth: Array, *, capacity: int) -> tuple[Array, Array]:
    """The vector nearest to the mean, then always the one farthest from all chosen ones (Gonzalez 1985).

    The greatest distance of a vector to the nearest chosen one is at most twice the least possible for as many.
    `O(N dim)` a choice. Gains are squared distances of unit vectors, 2 - 2 cosine.
    """
    real = _real(units, count)

    def add(i: Array, chosen: Array, gains: Array, state: None) -> tuple[Array, None]:
        distances = jnp.where(real, jnp.maximum(2 - 2 * _cosines(units, chosen), 0), -jnp.inf)
        return jnp.where(i == 0, distances, jnp.minimum(gains, distances)), None

    mean = jnp.sum(units, axis=0) / count
    gains = jnp.where(real, jnp.dot(units, mean, precision="highest"), -jnp.inf)
    order, gains, _ = _choose(gains, None, add, depth, capacity)
    return order, gains


def _choose(
    gains: Array, state: Any, add: Callable[..., tuple[Array, Any]], depth: Array, capacity: int
) -> tuple[Array, Array, Any]:
    """Chooses the greatest gain, `depth` times; `add(i, chosen, gains, state)` gives gains and state after choice i."""

    def step(i: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        order, gains, state = carry
        best = jnp.max(gains)
        chosen = jnp.argmax(gains > best - _slack(best)).astype(jnp.int32)
        gains, state = add(i, chosen, gains, state)
        return order.at[i].set(chosen), gains.at[chosen].set(-jnp.inf), state

    order = jnp.full(capacity, -1, jnp.int32)
    return jax.lax.fori_loop(0, depth, step, (order, gains, state))


def _slack(best: Array) -> Array:
    return SLACK * jnp.maximum(best, 1)


def _real(units: Array, count: Array) -> Array:
    return jnp.arange(len(units)) < count


def _cosines(units: Array, chosen: Array) -> Array:
    return jnp.dot(units, units[chosen], precision="highest")
