"""Laplace's approximation: a normal posterior of latent values whose feedback is not normal.

Rasmussen & Williams (2006), "Gaussian Processes for Machine Learning", sections 3.4 and 5.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.search.factor import inverse_factor

# Most steps of the iteration, and the largest variance of a pseudo-observation.
STEPS, VAGUE = 40, 1e6


class Approximation(NamedTuple):
    """Normal pseudo-observations that have the mode and the curvature of the true ones.

    Attributes:
      latent: `[n]`, the mode of the latent values.
      targets: `[n]`, values whose normal observation gives the same posterior; 0 in masked rows.
      variances: `[n]`, of their errors, at most `VAGUE`; the mode is exact where they are clipped, too.
      log_evidence: approximate log marginal likelihood (equation 3.32). It alone has derivatives.
    """

    latent: Array
    targets: Array
    variances: Array
    log_evidence: Array


class _Quadratic(NamedTuple):
    """A Newton step from some place: the posterior if the log likelihood were its parabola there.

    `latent = covariance @ weights` is the maximum of that posterior; `root` is the square root of the curvature W,
    `inverse` the inverse Cholesky factor of `B = I + root K root`, which is well conditioned even where W is 0.
    """

    latent: Array
    weights: Array
    root: Array
    inverse: Array
    log_determinant: Array


def approximate(
    covariance: Array, log_likelihood: Callable[[Array, Any], Array], parameters: Any, start: Array
) -> Approximation:
    """Laplace's approximation for latent values of prior `N(0, covariance)` and independent feedback.

    The gradient of `log_evidence` in `covariance` and `parameters` includes how the mode moves with them (equations
    5.20 to 5.24). Neither the iteration nor a decomposition is differentiated; there are first derivatives only.

    Args:
      covariance: `[n, n]`. A row whose block is the identity and whose log likelihood is 0 changes nothing.
      log_likelihood: of latent values `[n]` and `parameters`; `[n]`, elementwise, log-concave and smooth.
      parameters: a pytree of arrays.
      start: `[n]`, a guess of the mode. That of a nearby problem saves most of the iteration.
    """
    constant, fixed = jax.lax.stop_gradient((covariance, parameters))

    def density(latent: Array) -> Array:
        return log_likelihood(latent, fixed)

    place = _mode(constant, density, jax.lax.stop_gradient(start))
    _, slope, bend, third = _derivatives(density, place, 3)
    # The last step is whole: it squares what error the iteration has left.
    latent, weights, root, inverse, log_determinant = _newton(constant, place, slope, bend)
    half = inverse * root
    precision = half.T @ half
    spread = jnp.diagonal(constant) - jnp.sum((half @ constant) ** 2, axis=0)
    # How the determinant changes with the mode; the determinant is of `place`, one step back.
    drift = 0.5 * spread * third
    rest = drift @ (latent - place) - 0.5 * (weights @ latent + log_determinant)
    # How the mode follows what it is the mode of: (I + W K)^-1 drift.
    pull = drift - precision @ (constant @ drift)

    # A function with the gradient of the evidence: what is not an argument is constant.
    def change(covariance: Array, parameters: Any) -> tuple[Array, Array]:
        each, slope, bend = _derivatives(lambda g: log_likelihood(g, parameters), latent, 2)
        determinant = jnp.sum(precision * covariance) - spread @ bend
        mode = pull @ (covariance @ weights + constant @ slope)
        total = jnp.sum(each)
        return total + 0.5 * (weights @ (covariance @ weights) - determinant) + mode, total

    moving, total = change(covariance, parameters)
    variances = 1.0 / jnp.maximum(root**2, 1.0 / VAGUE)
    evidence = jax.lax.stop_gradient(total) + rest + (moving - jax.lax.stop_gradient(moving))
    return Approximation(latent, latent + variances * weights, variances, evidence)


def _derivatives(function: Callable[[Array], Array], at: Array, order: int) -> tuple[Array, ...]:
    """An elementwise function and its first `order` derivatives, `[n]` each, by one nested evaluation."""
    if order == 0:
        return (function(at),)

    def lower(x: Array) -> tuple[Array, ...]:
        return _derivatives(function, x, order - 1)

    values, slopes = jax.jvp(lower, (at,), (jnp.ones_like(at),))
    return (*values, slopes[-1])


def _newton(covariance: Array, place: Array, slope: Array, bend: Array) -> _Quadratic:
    """One step of algorithm 3.1 from `place`, where the log likelihood has first and second derivatives `[n]`."""
    # Rounding can make the curvature of a log-concave likelihood negative.
    curvature = jnp.maximum(-bend, 0.0)
    root = jnp.sqrt(curvature)
    identity = jnp.eye(len(place), dtype=place.dtype)
    inverse, log_determinant = inverse_factor(identity + root[:, None] * covariance * root)
    pulled = curvature * place + slope
    weights = pulled - root * (inverse.T @ (inverse @ (root * (covariance @ pulled))))
    return _Quadratic(covariance @ weights, weights, root, inverse, log_determinant)


class _At(NamedTuple):
    """A state of the iteration: the highest place so far and the one to try next, each `latent = K @ weights`.

    `ahead` is how far the last Newton step went.
    """

    latent: Array
    weights: Array
    height: Array
    trial: Array
    trial_weights: Array
    steps: Array
    ahead: Array


def _mode(covariance: Array, density: Callable[[Array], Array], start: Array) -> Array:
    """Latent values `[n]` of highest posterior density, up to an error that one more Newton step removes.

    The logarithm of the density is concave: a Newton step that does not climb does so when it is short enough. Each
    iteration evaluates one place, so that the loop has no inner loop.
    """
    eps = jnp.finfo(start.dtype).eps
    narrow = jax.lax.rsqrt(jnp.diagonal(covariance))

    def step(at: _At) -> _At:
        value, slope, bend = _derivatives(density, at.trial, 2)
        height = jnp.sum(value) - 0.5 * at.trial_weights @ at.trial
        # The weights of the guess are unknown, and so is its height: it only says where to begin.
        first = at.steps == 0
        climbs = (height >= at.height - eps**0.75 * (1.0 + jnp.abs(at.height))) & ~first
        aim = _newton(covariance, at.trial, slope, bend)
        latent, weights = (
            jnp.where(climbs, new, old) for new, old in ((at.trial, at.latent), (at.trial_weights, at.weights))
        )
        onward = climbs | first
        trial = jnp.where(onward, aim.latent, at.latent + 0.25 * (at.trial - at.latent))
        trial_weights = jnp.where(onward, aim.weights, at.weights + 0.25 * (at.trial_weights - at.weights))
        # In standard deviations of what is known, by the feedback or the prior, whichever is less.
        ahead = jnp.max(jnp.abs(aim.latent - at.trial) * jnp.maximum(aim.root, narrow))
        # Not a number is no end.
        ahead = jnp.where(onward, ahead, jnp.inf)
        return _At(latent, weights, jnp.where(climbs, height, at.height), trial, trial_weights, at.steps + 1, ahead)

    def unfinished(at: _At) -> Array:
        return (at.steps < STEPS) & ~(at.ahead <= eps**0.25)

    zero = jnp.zeros_like(start)
    guess = jnp.where(jnp.isfinite(start), start, 0.0)
    height = jnp.sum(density(zero))
    begin = _At(zero, zero, height, guess, zero, jnp.zeros((), jnp.int32), jnp.full_like(height, jnp.inf))
    end = jax.lax.while_loop(unfinished, step, begin)
    return jnp.where(end.ahead <= eps**0.25, end.trial, end.latent)
