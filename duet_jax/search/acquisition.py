"""Upper confidence bound (Srinivas et al. 2010, arXiv 0912.3995, equation 6), maximised on the simplex."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.search import simplex
from duet_jax.search.surrogate import Posterior, moments

# Best observations and neighbours of each, candidates that climb, and steps of the climb.
CENTRES, NEAR, REFINED, STEPS = 8, 8, 16, 30


def upper_confidence_bound(posterior: Posterior, roots: Array, beta: float) -> Array:
    """Mean plus `beta` standard deviations, standardised, `[m]`, of Hellinger coordinates `[m, d]`."""
    mean, deviation = moments(posterior, roots)
    return mean + beta * deviation


def maximise(posterior: Posterior, draws: Array, beta: float, floor: float, *, key: Array) -> Array:
    """The mixture `[d]` of highest upper confidence bound, after shares below `floor` are set to 0.

    Candidates are landmarks, random mixtures and neighbours of the observations; the best of them climb on the
    sphere of Hellinger coordinates, where faces of the simplex are reached exactly by clipping. Everything is
    scored again after the floor, so that what is returned is what was scored.

    Args:
      posterior: the fitted surrogate.
      draws: random mixtures, `[m, d]`.
      beta: standard deviations that are added to the mean.
      floor: at most `1 / d`.
      key: for the neighbours of the observations.
    """
    observed, mask = posterior.points
    size = observed.shape[1]
    # Around the best observations. Rows that are masked out are no points of the simplex, and never taken.
    means = jnp.where(mask > 0, moments(posterior, observed)[0], -jnp.inf)
    _, centres = jax.lax.top_k(means, min(CENTRES, len(means)))
    centres = jnp.where(mask[centres] > 0, centres, centres[0])
    offsets = jax.random.normal(key, (NEAR, *centres.shape, size)) * (0.3 * size**-0.5)
    near = _normalise(jnp.maximum(observed[centres] + offsets, 0.0)).reshape(-1, size)
    fixed = jnp.asarray(simplex.landmarks(size))
    candidates = jnp.concatenate([simplex.hellinger(jnp.concatenate([fixed, draws])), near])
    scores = upper_confidence_bound(posterior, candidates, beta)
    _, top = jax.lax.top_k(scores, REFINED)

    refined = _climb(partial(upper_confidence_bound, posterior, beta=beta), candidates[top])
    finalists = simplex.apply_floor(jnp.concatenate([refined, candidates[top]]) ** 2, floor)
    final = upper_confidence_bound(posterior, simplex.hellinger(finalists), beta)
    return finalists[jnp.argmax(final)]


class _Climb(NamedTuple):
    """Where each candidate is, the slope along the sphere there, and its step; the best place it has been at."""

    roots: Array
    slope: Array
    step: Array
    best: Array
    highest: Array


def _climb(function: Callable[[Array], Array], roots: Array) -> Array:
    """The highest of the points that projected gradient ascent visits on the sphere's positive part, `[m, d]`.

    Steps are those of Barzilai and Borwein (IMA J. Numer. Anal. 1988, equation 5): not monotone, but after 20 of
    them the maximum is reached to about 1e-12, where a decreasing step leaves 1e-5.
    """

    def total(roots: Array) -> tuple[Array, Array]:
        each = function(roots)
        return jnp.sum(each), each

    ascend = jax.grad(total, has_aux=True)

    def climb(at: _Climb, _: None) -> tuple[_Climb, None]:
        move = at.step * at.slope
        move = move * jnp.minimum(1.0, 0.3 / jnp.maximum(_length(move), 1e-12))
        roots = _normalise(jnp.maximum(at.roots + move, 0.0))
        gradient, value = ascend(roots)
        # Only the part along the sphere changes the mixture.
        slope = gradient - jnp.sum(gradient * roots, axis=1, keepdims=True) * roots
        change = roots - at.roots
        curvature = jnp.abs(jnp.sum(change * (slope - at.slope), axis=1, keepdims=True))
        step = jnp.sum(change**2, axis=1, keepdims=True) / jnp.maximum(curvature, 1e-14)
        step = jnp.where(curvature > 1e-14, jnp.clip(step, 1e-3, 1e2), at.step)
        best = jnp.where((value > at.highest)[:, None], roots, at.best)
        return _Climb(roots, slope, step, best, jnp.maximum(value, at.highest)), None

    # Without a slope the first step stays in place and computes it: the function is compiled once.
    count = roots.shape[0]
    first = _Climb(roots, jnp.zeros_like(roots), jnp.full((count, 1), 0.1), roots, jnp.full(count, -jnp.inf))
    return jax.lax.scan(climb, first, length=STEPS + 1)[0].best


def _length(roots: Array) -> Array:
    return jnp.linalg.norm(roots, axis=-1, keepdims=True)


def _normalise(roots: Array) -> Array:
    length = _length(roots)
    even = jnp.full_like(roots, roots.shape[-1] ** -0.5)
    return jnp.where(length > 1e-6, roots / jnp.maximum(length, 1e-6), even)
