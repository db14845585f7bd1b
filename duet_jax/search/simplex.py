"""Points of the simplex: mixtures with shares that are not negative and sum to 1."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def apply_floor(mixture: Array, floor: float) -> Array:
    """Sets shares below `floor` to 0 and renormalises the rest.

    Args:
      mixture: `[..., d]`, not negative.
      floor: at most `1 / d`, so that the largest share always stays.
    """
    kept = jnp.where(mixture >= floor, mixture, 0.0)
    # Rounding may put every share of a uniform mixture just below a floor of 1 / d.
    largest = mixture == jnp.max(mixture, axis=-1, keepdims=True)
    kept = jnp.where(jnp.any(kept > 0, axis=-1, keepdims=True), kept, jnp.where(largest, mixture, 0.0))
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def hellinger(mixture: Array) -> Array:
    """Square roots of the shares: points of the unit sphere whose distance is the Hellinger distance (x sqrt 2)."""
    return jnp.sqrt(mixture)


def draws(key: Array, count: int, size: int) -> Array:
    """Random mixtures `[count, size]`: half uniform on the simplex, half uniform on random faces of it."""
    # One draw for all: each call of a generator costs compile time.
    numbers = jax.random.uniform(key, (count, 2 * size + 1))
    shares = -jnp.log1p(-numbers[:, :size])
    # Of a domain's chance to be in a face all values are equally likely, so that faces of all sizes come up.
    chance = numbers[:, -1:].at[: count - count // 2].set(1.0)
    face = numbers[:, size:-1] < chance
    shares = jnp.where(face | ~jnp.any(face, axis=1, keepdims=True), shares, 0.0)
    return shares / jnp.sum(shares, axis=1, keepdims=True)


def landmarks(size: int) -> np.ndarray:
    """The uniform mixture, the vertices, and (up to 20 domains) the midpoints of all pairs, float64 `[n, size]`."""
    vertices = np.eye(size)
    points = [np.full((1, size), 1 / size), vertices]
    if 2 < size <= 20:
        first, second = np.triu_indices(size, k=1)
        points.append((vertices[first] + vertices[second]) / 2)
    return np.concatenate(points)


def renormalise(shares: np.ndarray) -> np.ndarray:
    """Shares that are not negative, divided by their sum, so that their exact sum rounds to 1.

    What it returned once, it returns unchanged.
    """
    if math.fsum(shares) == 1.0:
        return shares
    shares = shares / math.fsum(shares)
    # What is missing, without rounding, goes to the largest share.
    shares[np.argmax(shares)] -= math.fsum([*shares, -1.0])
    return shares


def check_mixture(mixture: object, size: int) -> np.ndarray:
    """A mixture as float64 `[size]` that sums to 1 exactly.

    Raises:
      ValueError: it has another length, a share that is no number, negative or not finite, or another sum than 1
        (to 1e-6).
    """
    try:
        shares = np.asarray(mixture, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The mixture {mixture!r} must be one number for each of {size} domains.") from error
    if shares.shape != (size,):
        raise ValueError(
            f"The mixture has shape {list(shares.shape)}; it must have one share for each of {size} domains."
        )
    if not np.all(np.isfinite(shares)) or np.any(shares < 0):
        raise ValueError(f"The mixture {shares.tolist()} has a share that is negative or not finite.")
    if abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"The mixture {shares.tolist()} sums to {shares.sum():.8g}; it must sum to 1.")
    return renormalise(shares)
