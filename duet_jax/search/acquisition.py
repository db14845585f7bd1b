"""Upper confidence bound (Srinivas et al. 2010, arXiv 0912.3995, equation 6), maximised on the simplex."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.search import simplex
from duet_jax.search.surrogate import Posterior, moments

RANDOM, NEAR, REFINED, STEPS = 512, 64, 16, 40


def upper_confidence_bound(posterior: Posterior, roots: Array, beta: float) -> Array:
    """Mean plus `beta` standard deviations, standardised, `[m]`, of Hellinger coordinates `[m, d]`."""
    mean, deviation = moments(posterior, roots)
    return mean + beta * deviation


def maximise(posterior: Posterior, beta: float, floor: float, *, key: Array) -> Array:
    """The mixture `[d]` of highest upper confidence bound, after shares below `floor` are set to 0.

    Candidates are landmarks, random mixtures and neighbours of the observations; the best of them climb on the
    sphere of Hellinger coordinates, where faces of the simplex are reached exactly by clipping. Everything is
    scored again after the floor, so that what is returned is what was scored.
    """
    observed, mask = posterior.points
    size = observed.shape[1]
    key_random, key_near, key_which = jax.random.split(key, 3)
    spread = jax.random.normal(key_near, (NEAR, size)) * 0.15
    # Rows that are masked out are no points of the simplex and must not be drawn.
    weights = jnp.where(mask > 0, 1.0, 0.0)
    which = jax.random.categorical(key_which, jnp.log(weights), shape=(NEAR,))
    around = jnp.maximum(observed[which] + spread, 0.0)
    fixed = jnp.asarray(simplex.landmarks(size))
    candidates = jnp.concatenate(
        [
            simplex.hellinger(jnp.concatenate([fixed, simplex.draws(key_random, RANDOM, size)])),
            _normalise(around),
        ]
    )
    scores = upper_confidence_bound(posterior, candidates, beta)
    _, top = jax.lax.top_k(scores, REFINED)

    gradient = jax.grad(lambda roots: jnp.sum(upper_confidence_bound(posterior, roots, beta)))

    def climb(roots: Array, step: Array) -> tuple[Array, None]:
        slope = gradient(roots)
        # Only the part of the slope along the sphere changes the mixture.
        slope = slope - jnp.sum(slope * roots, axis=1, keepdims=True) * roots
        length = jnp.linalg.norm(slope, axis=1, keepdims=True)
        moved = _normalise(jnp.maximum(roots + step * slope / jnp.maximum(length, 1e-9), 0.0))
        before = upper_confidence_bound(posterior, roots, beta)
        after = upper_confidence_bound(posterior, moved, beta)
        return jnp.where((after > before)[:, None], moved, roots), None

    sizes = jnp.geomspace(0.2, 1e-3, STEPS)
    refined, _ = jax.lax.scan(climb, candidates[top], sizes)
    finalists = simplex.apply_floor(jnp.concatenate([refined, candidates[top]]) ** 2, floor)
    final = upper_confidence_bound(posterior, simplex.hellinger(finalists), beta)
    return finalists[jnp.argmax(final)]


def _normalise(roots: Array) -> Array:
    length = jnp.linalg.norm(roots, axis=-1, keepdims=True)
    even = jnp.full_like(roots, roots.shape[-1] ** -0.5)
    return jnp.where(length > 1e-6, roots / jnp.maximum(length, 1e-6), even)
