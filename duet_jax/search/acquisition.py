"""What a proposal is worth: upper confidence bound, expected improvement, posterior samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr

from duet_jax.search.kernel import Inputs
from duet_jax.search.surrogate import Posterior, Surrogate

Schedule = Literal["constant", "growing", "falling"]
# Random Fourier features of a posterior sample.
FEATURES = 512


def beta_at(schedule: Schedule, beta: float | Array, count: Array) -> Array:
    """Standard deviations that the upper confidence bound adds after `count` observations.

    "growing" is `beta` times `sqrt(2 log(t^2 pi^2 / 0.6) / 5)` (Srinivas et al. 2010, theorem 1 and section 6, at
    delta = 0.1 and without the size of the set); "falling" is `beta / (2 sqrt(t + 1))`, as in DUET's library.
    """
    t = count + 1.0
    if schedule == "growing":
        return beta * jnp.sqrt(2.0 * jnp.log(t**2 * (math.pi**2 / 0.6)) / 5.0)
    if schedule == "falling":
        return beta / (2.0 * jnp.sqrt(t))
    return jnp.asarray(beta)


def log_expected_improvement(mean: Array, deviation: Array, best: Array) -> Array:
    """Logarithm of the expected excess over `best`, `[m]`, exact in the far tail (Ament et al. 2023, equation 9).

    With noisy feedback `best` is the highest posterior mean of what was observed.
    """
    z = (mean - best) / deviation
    log_density = -0.5 * z**2 - 0.5 * math.log(2.0 * math.pi)
    # phi(z) + z Phi(z) = phi(z) (1 + z Phi(z) / phi(z)); beyond the limit the bracket is 1 / z^2 to rounding.
    limit = -1e3 if z.dtype == jnp.float64 else -20.0
    inside = jnp.clip(z, limit, 0.0)
    bracket = 1.0 + inside * jnp.exp(log_ndtr(inside) + 0.5 * inside**2 + 0.5 * math.log(2.0 * math.pi))
    far = -2.0 * jnp.log(jnp.maximum(-z, 1.0))
    log_bracket = jnp.where(z < limit, far, jnp.log(jnp.maximum(bracket, jnp.finfo(z.dtype).tiny)))
    # For large z the bracket overflows, and the excess is z itself.
    near = jnp.minimum(z, 10.0)
    direct = jnp.log(jnp.maximum(jnp.exp(-0.5 * near**2 - 0.5 * math.log(2.0 * math.pi)) + z * _ndtr(near), 1e-30))
    return jnp.log(deviation) + jnp.where(z > -1.0, direct, log_density + log_bracket)


def _ndtr(z: Array) -> Array:
    return jnp.exp(log_ndtr(z))


def draw(surrogate: Surrogate, posterior: Posterior, count: int, *, key: Array) -> Callable[[Array], Array]:
    """A sample of the posterior, standardised, as a function of points `[m, d + extra]`, smooth in them.

    The prior is sampled through random Fourier features, and moved by what the first `count` rows, the observations,
    say (Wilson et al. 2020, equation 9). The spectrum of Matern 5/2 is a Student t with 5 degrees of freedom.
    """
    hyper = posterior.hyperparameters
    seen = jax.tree.map(lambda x: x[:count], posterior.inputs)
    dtype, width = posterior.weights.dtype, seen.features.shape[1]
    normal, student, phase, weights, trend, noise = jax.random.split(key, 6)
    directions = jax.random.normal(normal, (FEATURES, width), dtype)
    chi2 = 2.0 * jax.random.gamma(student, 2.5, (FEATURES, 1), dtype)
    frequencies = directions * jnp.sqrt(5.0 / chi2) * surrogate.inverse_lengthscales(hyper)
    phases = 2.0 * math.pi * jax.random.uniform(phase, (FEATURES,), dtype)
    amplitudes = jnp.exp(0.5 * hyper.signal) * (2.0 / FEATURES) ** 0.5 * jax.random.normal(weights, (FEATURES,), dtype)
    slopes = jax.random.normal(trend, (seen.trend.shape[1],), dtype) * jnp.exp(0.5 * jnp.sum(hyper.slope))

    def prior(inputs: Inputs) -> Array:
        wave = jnp.cos(inputs.features @ frequencies.T + phases) @ amplitudes
        value = (wave + inputs.trend @ slopes) * inputs.mask
        return value if inputs.against is None else value - prior(inputs.against)

    factor = posterior.factor[:count, :count]
    errors = jnp.sqrt(posterior.diagonal[:count]) * jax.random.normal(noise, (count,), dtype)
    weights_ = posterior.weights[:count] - factor.T @ (factor @ (prior(seen) + errors * seen.mask))

    def sample(points: Array) -> Array:
        queries = surrogate.inputs(points)
        return prior(queries) + surrogate.covariance(hyper, queries, seen) @ weights_

    return sample
