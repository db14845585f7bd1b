"""The best mixture by some acquisition: many starts that climb on the sphere of square roots of shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.search import simplex
from duet_jax.search.constraints import Constraints, bounds, gap, project, support

# Neighbours of each centre, candidates that climb, and steps of the climb.
NEAR, REFINED, STEPS = 8, 16, 30
Score = Callable[[Array], Array]


class Found(NamedTuple):
    """The highest point, `[d + extra]`, its score, and its Frank-Wolfe gap in the shares' convex set."""

    point: Array
    score: Array
    gap: Array


def maximise(score: Score, centres: Array, draws: Array, constraints: Constraints, *, key: Array) -> Found:
    """Maximises `score`, a function of points `[m, d]` of the sphere's positive part, over the allowed mixtures.

    Candidates are landmarks of the simplex, random mixtures and neighbours of `centres`; the best of them climb.
    Faces of the simplex are reached exactly, by clipping. A smallest share or a largest number of domains chooses a
    support for each, on which they climb again. What is returned is what was scored.

    Args:
      score: differentiable; the gradient at a face may be anything.
      centres: `[c, d]` points that look good already.
      draws: `[n, d]` random mixtures, allowed or not.
      constraints: checked.
      key: for the neighbours.
    """
    size = centres.shape[1]
    lower: Array | np.ndarray
    upper: Array | np.ndarray
    lower, upper = bounds(constraints, size)
    onto = partial(to_set, lower=lower, upper=upper, groups=constraints.groups)
    offsets = jax.random.normal(key, (NEAR, *centres.shape), centres.dtype) * (0.3 * size**-0.5)
    fixed = jnp.asarray(simplex.landmarks(size), centres.dtype)
    spread = simplex.hellinger(jnp.concatenate([fixed, draws]))
    candidates = onto(jnp.concatenate([spread, centres, (centres + offsets).reshape(-1, size)]))
    _, promising = jax.lax.top_k(score(candidates), REFINED)
    top = climb(score, candidates[promising], onto, STEPS)
    if constraints.floor or constraints.most is not None:
        lower, upper = support(top.best**2, constraints)
        onto = partial(to_set, lower=lower, upper=upper, groups=constraints.groups)
        top = climb(score, onto(top.best), onto, STEPS)
    best = jnp.argmax(top.highest)
    least, most = (jnp.broadcast_to(jnp.asarray(x, top.best.dtype), top.best.shape)[best] for x in (lower, upper))
    point = top.best[best]
    # A share of 0 has an infinite slope in the shares; at this one a step of 1e-7 is exact to first order.
    in_shares = top.gradient[best] / (2.0 * jnp.maximum(point, 1e-7))
    return Found(point, top.highest[best], gap(in_shares, point**2, least, most, constraints.groups))


def to_set(points: Array, lower: Array | np.ndarray, upper: Array | np.ndarray, groups: tuple) -> Array:
    """Square roots of the allowed mixtures nearest to points `[m, d]` off the sphere; negative parts count as 0."""
    weights = jnp.maximum(points, 0.0) ** 2
    even = jnp.sum(weights, axis=-1, keepdims=True) < 1e-12
    return jnp.sqrt(project(jnp.where(even, 1.0, weights), lower, upper, groups))


class Climb(NamedTuple):
    """Where each candidate is, the slope along the sphere there, its step; the best place, its value and gradient."""

    points: Array
    slope: Array
    step: Array
    best: Array
    highest: Array
    gradient: Array


def climb(score: Score, points: Array, onto: Callable[[Array], Array], steps: int) -> Climb:
    """Projected gradient ascent of points `[m, d]` on the sphere's positive part.

    Steps are those of Barzilai and Borwein (IMA J. Numer. Anal. 1988, equation 5): not monotone, but after 20 of
    them the maximum is reached to about 1e-12, where a decreasing step leaves 1e-5.
    """

    def total(points: Array) -> tuple[Array, Array]:
        each = score(points)
        return jnp.sum(each), each

    ascend = jax.grad(total, has_aux=True)

    def ahead(at: Climb, _: None) -> tuple[Climb, None]:
        move = at.step * at.slope
        move = move * jnp.minimum(1.0, 0.3 / jnp.maximum(_length(move), 1e-12))
        points = onto(at.points + move)
        gradient, value = ascend(points)
        # Only the part along the sphere changes the mixture.
        slope = gradient - jnp.sum(gradient * points, axis=1, keepdims=True) * points
        change = points - at.points
        curvature = jnp.abs(jnp.sum(change * (slope - at.slope), axis=1, keepdims=True))
        least = 10.0 * jnp.finfo(points.dtype).eps ** 0.9
        step = jnp.sum(change**2, axis=1, keepdims=True) / jnp.maximum(curvature, least)
        step = jnp.where(curvature > least, jnp.clip(step, 1e-3, 1e2), at.step)
        better = value > at.highest
        best = jnp.where(better[:, None], points, at.best)
        steepest = jnp.where(better[:, None], gradient, at.gradient)
        return Climb(points, slope, step, best, jnp.maximum(value, at.highest), steepest), None

    # Without a slope the first step stays in place and computes it: the function is compiled once.
    zero = jnp.zeros_like(points)
    step, lowest = (jnp.full_like(points[:, :1], 0.1), jnp.full_like(points[:, 0], -jnp.inf))
    return jax.lax.scan(ahead, Climb(points, zero, step, points, lowest, zero), length=steps + 1)[0]


def _length(points: Array) -> Array:
    return jnp.linalg.norm(points, axis=-1, keepdims=True)
