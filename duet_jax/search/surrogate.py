"""A Gaussian process over mixtures: tinygp kernels on the Hellinger map, in buffers of fixed capacity.

Rows beyond the observations are masked out exactly: their block of the covariance is the identity, so they change
neither the posterior nor the fit. Feedback is standardised; hyperparameters are maximum a posteriori.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import tinygp
from jax import Array

from duet_jax.search.factor import inverse_factor, log_density
from duet_jax.search.simplex import hellinger

# Normal priors of the logarithms of lengthscale, signal variance and noise variance: mean and standard deviation.
# Two random mixtures are about 0.6 apart on the Hellinger map whatever the number of domains; the lengthscale is
# expected at that scale. Variances are in units of the standardised feedback.
PRIOR_MEAN = (math.log(0.8), 0.0, -4.0)
PRIOR_SCALE = (0.75, 0.5, 1.0)
NOISE_FLOOR = 1e-6
STARTS = ((0.0, 0.0, 0.0), (-1.0, 0.0, -1.0), (1.0, 0.0, 1.0))
STEPS, RATE = 60, 0.15


class Observations(NamedTuple):
    """What has been told, in buffers of `capacity` rows.

    Attributes:
      mixtures: float64 `[capacity, d]`.
      values: float64 `[capacity]`, in the units of the feedback.
      stderrs: float64 `[capacity]`, known standard errors, 0 where none is known.
      mask: bool `[capacity]`, True for rows in use.
    """

    mixtures: Array
    values: Array
    stderrs: Array
    mask: Array


class Hyperparameters(NamedTuple):
    """Logarithms of lengthscale (Hellinger map), signal variance and noise variance (standardised feedback)."""

    log_lengthscale: Array
    log_signal: Array
    log_noise: Array


class Posterior(NamedTuple):
    """A fitted surrogate, ready for products: nothing is solved per query.

    Attributes:
      hyperparameters: at which it was fitted.
      points: masked inputs of the observations, and of pending mixtures after them.
      weights: `[n]`, the mean is `k(x, points) @ weights`.
      precision: `[n, n]`, inverse covariance of observations and pending mixtures.
      centre, spread: mean and standard deviation of the observed feedback.
    """

    hyperparameters: Hyperparameters
    points: tuple[Array, Array]
    weights: Array
    precision: Array
    centre: Array
    spread: Array


class Masked(tinygp.kernels.Kernel):
    """A kernel on pairs of a point and a mask, 0 or 1; it is 0 wherever a mask is."""

    inner: tinygp.kernels.Kernel

    def evaluate(self, X1: tuple[Array, Array], X2: tuple[Array, Array]) -> Array:
        return X1[1] * X2[1] * self.inner.evaluate(X1[0], X2[0])


def make_kernel(hyperparameters: Hyperparameters) -> Masked:
    """Matern 5/2, isotropic in the Euclidean distance of the Hellinger map."""
    distance = tinygp.kernels.distance.L2Distance()
    matern = tinygp.kernels.Matern52(jnp.exp(hyperparameters.log_lengthscale), distance=distance)
    return Masked(jnp.exp(hyperparameters.log_signal) * matern)


def standardise(observations: Observations) -> tuple[Array, Array, Array]:
    """Feedback with mean 0 and variance 1 (0 in masked rows), the mean and the standard deviation.

    Feedback that differs by rounding alone counts as equal; the standard deviation is then reported as 1.
    """
    mask = observations.mask
    count = jnp.maximum(jnp.sum(mask), 1)
    centre = jnp.sum(jnp.where(mask, observations.values, 0.0)) / count
    deviation = jnp.where(mask, observations.values - centre, 0.0)
    # Divided by the largest first, so that squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(deviation))
    differs = largest > 1e-12 * jnp.max(jnp.where(mask, jnp.abs(observations.values), 0.0))
    largest = jnp.where(differs, largest, 1.0)
    scaled = jnp.where(differs, deviation / largest, 0.0)
    variance = jnp.sum(scaled**2) / jnp.maximum(count - 1, 1)
    spread = jnp.where(differs, largest * jnp.sqrt(jnp.where(differs, variance, 1.0)), 1.0)
    return jnp.where(differs, deviation / spread, 0.0), centre, spread


def _diagonal(observations: Observations, spread: Array, hyperparameters: Hyperparameters) -> Array:
    noise = jnp.exp(hyperparameters.log_noise) + NOISE_FLOOR + (observations.stderrs / spread) ** 2
    return jnp.where(observations.mask, noise, 1.0)


def _points(mixtures: Array, mask: Array) -> tuple[Array, Array]:
    return hellinger(mixtures), mask.astype(mixtures.dtype)


def log_posterior(hyperparameters: Hyperparameters, observations: Observations) -> Array:
    """Log marginal likelihood of the standardised feedback plus log prior, up to constants.

    A masked row adds 0: its block of the covariance is the identity and its value is 0.
    """
    values, _, spread = standardise(observations)
    points = _points(observations.mixtures, observations.mask)
    covariance = make_kernel(hyperparameters)(points, points)
    covariance = covariance + jnp.diag(_diagonal(observations, spread, hyperparameters))
    prior = sum(
        -0.5 * ((value - mean) / scale) ** 2
        for value, mean, scale in zip(hyperparameters, PRIOR_MEAN, PRIOR_SCALE, strict=True)
    )
    return log_density(covariance, values) + prior


def fit(observations: Observations) -> Hyperparameters:
    """Maximum a posteriori hyperparameters: Adam from a few starts, the best point of all visited."""
    objective = jax.value_and_grad(lambda point: -log_posterior(Hyperparameters(*point), observations))
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def climb(start: Array) -> tuple[Array, Array]:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            point, moments, best, lowest = carry
            value, gradient = objective(point)
            better = value < lowest
            best, lowest = jnp.where(better, point, best), jnp.where(better, value, lowest)
            update, moments = optimiser.update(jnp.nan_to_num(gradient), moments)
            return (optax.apply_updates(point, update), moments, best, lowest), None

        carry = (start, optimiser.init(start), start, jnp.asarray(jnp.inf))
        (_, _, best, lowest), _ = jax.lax.scan(step, carry, None, length=STEPS)
        return best, lowest

    # One start after another: on the CPU a batch of small factorisations is slower than their sum.
    points, values = jax.lax.map(climb, jnp.asarray(PRIOR_MEAN) + jnp.asarray(STARTS))
    return Hyperparameters(*points[jnp.argmin(values)])


def condition(
    hyperparameters: Hyperparameters, observations: Observations, pending: Array, pending_mask: Array
) -> Posterior:
    """The posterior after the observations, with the variance as if pending mixtures were told as well.

    The mean does not know what they will bring (GP-BUCB, Desautels et al. 2014, section 4.1).

    Args:
      pending: `[p, d]` mixtures.
      pending_mask: bool `[p]`, True for rows in use.
    """
    values, centre, spread = standardise(observations)
    mixtures = jnp.concatenate([observations.mixtures, pending])
    mask = jnp.concatenate([observations.mask, pending_mask])
    points = _points(mixtures, mask)
    kernel = make_kernel(hyperparameters)
    covariance = kernel(points, points)
    noise = jnp.exp(hyperparameters.log_noise) + NOISE_FLOOR
    extra = jnp.where(pending_mask, noise, 1.0)
    diagonal = jnp.concatenate([_diagonal(observations, spread, hyperparameters), extra])
    covariance = covariance + jnp.diag(diagonal)
    inverse, _ = inverse_factor(covariance)
    # Its leading block is the inverse factor of the observations alone.
    count = observations.values.shape[0]
    seen = inverse[:count, :count]
    weights = jnp.zeros(mixtures.shape[0]).at[:count].set(seen.T @ (seen @ values))
    precision = inverse.T @ inverse
    return Posterior(hyperparameters, points, weights, precision, centre, spread)


def moments(posterior: Posterior, roots: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the noise-free value, standardised.

    Args:
      roots: `[m, d]` Hellinger coordinates of mixtures.

    Returns:
      Two arrays `[m]`.
    """
    kernel = make_kernel(posterior.hyperparameters)
    queries = (roots, jnp.ones(roots.shape[0], roots.dtype))
    cross = kernel(queries, posterior.points)
    mean = cross @ posterior.weights
    explained = jnp.sum((cross @ posterior.precision) * cross, axis=1)
    variance = jnp.exp(posterior.hyperparameters.log_signal) - explained
    return mean, jnp.sqrt(jnp.maximum(variance, 1e-12))
