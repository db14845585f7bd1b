"""The best point by some acquisition: many starts that climb on the sphere of square roots of shares.

Settings that are searched with the mixture climb beside it, whole numbers as if they were real; then each takes turns:
one discrete setting changes if that is better, and the rest climbs again.
"""

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
from duet_jax.search.space import Space

# Neighbours of each centre; how many of the best candidates climb how many steps, in stages: many a little, so that
# their maxima compete, few to the end.
NEAR, STAGES, LAST = 8, ((48, 4), (12, 20)), (3, 60)
# Turns of discrete settings, and steps of the climb after each.
TURNS, STEPS = 3, 30
Score = Callable[[Array], Array]


class Found(NamedTuple):
    """The highest point, `[d + e]`, its score, and its Frank-Wolfe gap, discrete settings held fixed."""

    point: Array
    score: Array
    gap: Array


def maximise(
    score: Score, centres: Array, draws: Array, constraints: Constraints, space: Space, *, key: Array
) -> Found:
    """Maximises `score`, a function of points `[m, d + e]`, over the allowed mixtures and settings.

    Candidates are landmarks of the simplex, random mixtures and neighbours of `centres`; the best of them climb, in
    stages. Faces of the simplex are reached exactly, by clipping. A smallest share or a largest number of domains
    chooses a support for each before the last stage. What is returned is what was scored.

    Args:
      score: differentiable; the gradient at a face may be anything.
      centres: `[c, d + e]` points that look good already: square roots of shares, then coordinates of settings.
      draws: `[n, d]` random mixtures, allowed or not.
      constraints: checked.
      space: of the settings; a fidelity stays at its target.
      key: for the neighbours and the random settings.
    """
    size = centres.shape[1] - space.width
    key_near, key_settings = jax.random.split(key)
    lower: Array | np.ndarray
    upper: Array | np.ndarray
    lower, upper = bounds(constraints, size)
    onto = partial(to_set, lower=lower, upper=upper, groups=constraints.groups)
    roots, settings = centres[:, :size], centres[:, size:]
    offsets = jax.random.normal(key_near, (NEAR, *roots.shape), centres.dtype) * (0.3 * size**-0.5)
    fixed = jnp.asarray(simplex.landmarks(size), centres.dtype)
    spread = simplex.hellinger(jnp.concatenate([fixed, draws]))
    candidates = onto(jnp.concatenate([spread, roots, (roots + offsets).reshape(-1, size)]))
    if space.width:
        beside = jnp.concatenate([settings, jnp.tile(settings, (NEAR, 1))])
        beside = jnp.concatenate([space.draws(key_settings, len(spread)).astype(beside.dtype), beside])
        candidates = jnp.concatenate([candidates, space.at_target(beside)], axis=1)
    points, heights = candidates, score(candidates)
    for kept, steps in STAGES:
        top = climb(score, points[jax.lax.top_k(heights, kept)[1]], onto, steps, space.ordered)
        points, heights = top.best, top.highest
    if constraints.floor or constraints.most is not None:
        lower, upper = support(points[:, :size] ** 2, constraints)
        points = points.at[:, :size].set(to_set(points[:, :size], lower, upper, constraints.groups))
        heights = score(points)
    lower, upper = (jnp.broadcast_to(jnp.asarray(x, points.dtype), (len(points), size)) for x in (lower, upper))
    if not space.width:
        last = jax.lax.top_k(heights, LAST[0])[1]
        points, lower, upper = points[last], lower[last], upper[last]
    onto = partial(to_set, lower=lower, upper=upper, groups=constraints.groups)
    top = _take_turns(score, points, onto, space) if space.width else climb(score, points, onto, LAST[1], space.real)
    best = jnp.argmax(top.highest)
    least, most, point, gradient = (x[best] for x in (lower, upper, top.best, top.gradient))
    # A share of 0 has an infinite slope in the shares; at this one a step of 1e-7 is exact to first order.
    in_shares = gradient[:size] / (2.0 * jnp.maximum(point[:size], 1e-7))
    certificate = gap(in_shares, point[:size] ** 2, least, most, constraints.groups)
    slope, at = jnp.where(space.real, gradient[size:], 0.0), point[size:]
    certificate = certificate + jnp.sum(jnp.maximum(slope * (1.0 - at), -slope * at))
    return Found(point, top.highest[best], certificate)


def _take_turns(score: Score, points: Array, onto: Callable[[Array], Array], space: Space) -> Climb:
    """Changes one discrete setting of each point at a time, where that is better, and climbs with the rest."""
    size = points.shape[1] - space.width

    def turn(points: Array, _: None) -> tuple[Array, Climb]:
        settings = space.neighbours(points[:, size:])
        mixtures = jnp.broadcast_to(points[:, None, :size], (*settings.shape[:2], size))
        options = jnp.concatenate([mixtures, settings], axis=2)
        each = score(options.reshape(-1, options.shape[2])).reshape(options.shape[:2])
        chosen = jnp.take_along_axis(options, jnp.argmax(each, axis=1)[:, None, None], axis=1)[:, 0]
        top = climb(score, chosen, onto, STEPS, space.real)
        return top.best, top

    # Only allowed points are compared from here on.
    start = jnp.concatenate([onto(points[:, :size]), space.snap(points[:, size:])], axis=1)
    _, turns = jax.lax.scan(turn, start, length=TURNS)
    return jax.tree.map(lambda x: x[-1], turns)


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


def climb(score: Score, points: Array, onto: Callable[[Array], Array], steps: int, free: np.ndarray) -> Climb:
    """Projected gradient ascent of points `[m, d + e]`: on the sphere's positive part, and from 0 to 1 beside it.

    Steps are those of Barzilai and Borwein (IMA J. Numer. Anal. 1988, equation 5): not monotone, but mostly 20 of them
    reach the maximum to about 1e-12, where a decreasing step leaves 1e-5; with 20 domains a few take 100.

    Args:
      score: differentiable function of points.
      points: where to begin.
      onto: puts the first d coordinates into their set.
      steps: how many.
      free: bool `[e]`, which of the other coordinates move.
    """
    size = points.shape[1] - len(free)

    def total(points: Array) -> tuple[Array, Array]:
        each = score(points)
        return jnp.sum(each), each

    ascend = jax.grad(total, has_aux=True)

    def within(points: Array) -> Array:
        if not len(free):
            return onto(points)
        return jnp.concatenate([onto(points[:, :size]), jnp.clip(points[:, size:], 0.0, 1.0)], axis=1)

    def along(gradient: Array, points: Array) -> Array:
        # Only the part along the sphere changes the mixture.
        roots, upwards = points[:, :size], gradient[:, :size]
        slope = upwards - jnp.sum(upwards * roots, axis=1, keepdims=True) * roots
        if not len(free):
            return slope
        return jnp.concatenate([slope, jnp.where(free, gradient[:, size:], 0.0)], axis=1)

    def ahead(at: Climb, _: None) -> tuple[Climb, None]:
        move = at.step * at.slope
        move = move * jnp.minimum(1.0, 0.3 / jnp.maximum(_length(move), 1e-12))
        points = within(at.points + move)
        gradient, value = ascend(points)
        slope = along(gradient, points)
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
