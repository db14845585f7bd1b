"""Factors of covariance matrices by small Cholesky decompositions, small solves and products.

Large decompositions and triangular solves go to a threaded BLAS on the CPU; at the sizes of a search its threads cost
5 to 50 times the arithmetic, and more when other processes run. Small ones and products do not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

# Sides of the blocks that are solved and of those that are decomposed; larger ones are merged by products.
BLOCK, LEAF = 16, 64


def inverse_factor(covariance: Array) -> tuple[Array, Array]:
    """The inverse of the lower Cholesky factor, `[n, n]`, and the logarithm of the determinant.

    With `W` the first, `W.T @ W` is the inverse of `covariance`, and leading blocks of `W` belong to leading blocks
    of `covariance`.
    """
    size = covariance.shape[0]
    if size <= LEAF:
        factor = jax.lax.linalg.cholesky(covariance, symmetrize_input=False)
        return _invert_lower(factor), 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    half = LEAF * -(-size // (2 * LEAF))
    top, first = inverse_factor(covariance[:half, :half])
    below = covariance[half:, :half] @ top.T
    bottom, second = inverse_factor(covariance[half:, half:] - below @ below.T)
    corner = -bottom @ (below @ top)
    upper = jnp.concatenate([top, jnp.zeros_like(corner.T)], axis=1)
    return jnp.concatenate([upper, jnp.concatenate([corner, bottom], axis=1)]), first + second


def _invert_lower(factor: Array) -> Array:
    """Inverts a lower triangular matrix: inverses of diagonal blocks, merged in pairs until one is left."""
    size, width = factor.shape[0], BLOCK
    padded = width
    while padded < size:
        padded *= 2
    whole = jnp.eye(padded, dtype=factor.dtype).at[:size, :size].set(factor)
    count = jnp.arange(padded // width)
    diagonal = whole.reshape(len(count), width, len(count), width)[count, :, count, :]
    identity = jnp.broadcast_to(jnp.eye(width, dtype=factor.dtype), diagonal.shape)
    inverse = jax.lax.linalg.triangular_solve(diagonal, identity, left_side=True, lower=True)
    while width < padded:
        pairs = jnp.arange(padded // (2 * width))
        blocks = whole.reshape(len(pairs), 2, width, len(pairs), 2, width)
        below = blocks[:, 1, :, :, 0, :][pairs, :, pairs, :]
        upper, lower = inverse[0::2], inverse[1::2]
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=2)
        bottom = jnp.concatenate([-lower @ below @ upper, lower], axis=2)
        inverse = jnp.concatenate([top, bottom], axis=1)
        width *= 2
    return inverse[0, :size, :size]


@jax.custom_vjp
def log_density(covariance: Array, values: Array) -> Array:
    """Logarithm of the normal density with mean 0 at `values`, up to the constant of `2 pi`.

    Its gradient is the closed form, `(K^-1 y y^T K^-1 - K^-1) / 2`: nothing is differentiated through the
    decomposition.
    """
    return _log_density(covariance, values)[0]


def _log_density(covariance: Array, values: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse, log_determinant = inverse_factor(covariance)
    white = inverse @ values
    weights = inverse.T @ white
    return -0.5 * (white @ white + log_determinant), (inverse, weights)


def _log_density_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inverse, weights = kept
    slope = 0.5 * (jnp.outer(weights, weights) - inverse.T @ inverse)
    return cotangent * slope, -cotangent * weights


log_density.defvjp(_log_density, _log_density_backward)
