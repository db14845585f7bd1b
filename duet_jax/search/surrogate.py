"""A Gaussian process over mixtures, fitted in buffers of fixed capacity.

Rows beyond the observations are masked out exactly: their block of the covariance is the identity, so they change
neither the posterior nor the fit. Feedback is standardised; hyperparameters are maximum a posteriori.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from duet_jax.search import kernel as kernels
from duet_jax.search.factor import inverse_factor, log_density
from duet_jax.search.kernel import Inputs
from duet_jax.search.laplace import approximate
from duet_jax.search.quasi_newton import minimise

# Evaluations of the fit from each start, and shifts of the prior's mean (lengthscale, noise) that are starts.
EVALUATIONS = 25
STARTS = ((0.0, 0.0), (-1.0, -2.0))
# Rows that all starts are fitted to where there are more; from the best of them a few evaluations with all rows follow.
FEW, FINE = 64, 10
# How much less noise is expected, as the logarithm of its variance, where a standard error is told with every value, or
# where the feedback's likelihood has its own noise.
KNOWN = 4.0


class Hyperparameters(NamedTuple):
    """What is fitted, each with a normal prior.

    Attributes:
      lengthscale: logarithm of the common lengthscale in the map of the mixtures.
      relevance: `[p]`, logarithm of each feature's own factor of the inverse lengthscale, or `[0]` if isotropic.
      signal: logarithm of the variance of the values, in units of the standardised feedback's variance.
      noise: logarithm of the variance of a trial's noise, in the same units.
      slope: logarithm of the variance of the trend, or `[0]` without one.
      likelihood: parameters of feedback that is not a number with normal noise; () for that.
    """

    lengthscale: Array
    relevance: Array
    signal: Array
    noise: Array
    slope: Array
    likelihood: Any = ()


class Problem(NamedTuple):
    """One task's observations, ready to fit.

    Attributes:
      inputs: `[n]` rows, masked.
      values: `[n]`, standardised, 0 in masked rows; where feedback is no number, a first guess of the latent value.
      variances: `[n]`, known variance of each value's error, in the same units.
      centre, spread: feedback is `centre + spread * value`.
      rows: feedback as a likelihood takes it, or ().
    """

    inputs: Inputs
    values: Array
    variances: Array
    centre: Array
    spread: Array
    rows: Any = ()


class Likelihood(Protocol):
    """Feedback that is not a number with normal noise.

    Attributes:
      mean, scale: of the normal prior of its parameters.
    """

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def scale(self) -> tuple[float, ...]: ...

    def log_density(self, latent: Array, parameters: Array, told: Any, /) -> Array:
        """Of each row of a `Problem` at standardised latent values, `[n]`, concave in them; 0 in masked rows."""


class Posterior(NamedTuple):
    """A fitted surrogate, ready for products: nothing is solved per query.

    Attributes:
      hyperparameters: at which it was fitted.
      inputs: of the observations, and of pending mixtures after them, `[n]` rows.
      weights: `[n]`, the mean is `covariance(x, inputs) @ weights`.
      factor: `[n, n]`, lower triangular; `factor.T @ factor` is the inverse covariance of all rows.
      diagonal: `[n]`, what noise adds to the covariance of the rows.
      centre, spread: feedback is `centre + spread * value`.
    """

    hyperparameters: Hyperparameters
    inputs: Inputs
    weights: Array
    factor: Array
    diagonal: Array
    centre: Array
    spread: Array


def noise_floor(dtype: Any) -> float:
    """Least variance of noise, in units of the standardised feedback's variance.

    In float32 the posterior is off by up to 0.03 standard deviations, and the fit by far more, when the noise
    variance is 1e-4; from 1e-2 on, both are right to three digits.
    """
    return 1e-6 if jnp.dtype(dtype) == jnp.float64 else 1e-2


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """The prior over values of mixtures.

    Attributes:
      num_domains: d.
      map: features that the kernel sees, see `kernel.transform`.
      ard: whether each domain has its own lengthscale. Their prior pulls them to a common one, so that few
        observations give an isotropic kernel and many do not.
      trend: what the values are linear in, besides the kernel: "linear" shares, "log" of shares, or given
        utilities, one a domain, of which the share-weighted mean matters. None for nothing.
      extra: number of further coordinates of a point, each about from 0 to 1, with a lengthscale of its own: the
        settings of a training configuration that is searched together with the mixture.
      fidelity: whether the last of them is how much a trial is given.
    """

    num_domains: int
    map: kernels.Map = "hellinger"
    ard: bool = True
    trend: Literal["linear", "log"] | tuple[float, ...] | None = None
    extra: int = 0
    fidelity: bool = False

    def inputs(self, points: Array, mask: Array | None = None) -> Inputs:
        """Inputs of points `[n, d + extra]`: square roots of the shares, then further coordinates."""
        mask = jnp.ones(points.shape[0], points.dtype) if mask is None else mask.astype(points.dtype)
        roots, rest = points[:, : self.num_domains], points[:, self.num_domains :]
        features = kernels.transform(self.map, roots)
        return Inputs(jnp.concatenate([features, rest], axis=1), self._trend(roots), mask)

    def _trend(self, roots: Array) -> Array:
        if self.trend is None:
            return jnp.zeros((roots.shape[0], 0), roots.dtype)
        d = self.num_domains
        # Scaled so that uniformly random mixtures have a trend of variance 1.
        reference = np.random.default_rng(0).dirichlet(np.ones(d), 2000)
        if self.trend == "log":
            basis, known = jnp.log(roots**2 + kernels.OFFSET), np.log(reference + kernels.OFFSET)
        elif self.trend == "linear":
            basis, known = roots**2, reference
        else:
            utilities = np.array(self.trend)[:, None]
            basis, known = roots**2 @ jnp.asarray(utilities, roots.dtype), reference @ utilities
        scale = math.sqrt(known.var(axis=0).sum())
        return (basis - jnp.asarray(known.mean(axis=0), roots.dtype)) / max(scale, 1e-12)

    def prior(
        self, likelihood: Likelihood | None, known: Array | float = 0.0
    ) -> tuple[Hyperparameters, Hyperparameters]:
        """Means and standard deviations of the normal priors; `known` is 1 where all errors are known, else 0.

        The lengthscale is expected a little above the distance of two random mixtures in the map, whatever the map
        and the number of domains: in a cube it would have to grow with the dimension, on a simplex it must not.
        """
        own = self.num_domains if self.ard else 0
        # Each further coordinate matters as much as the mixture until feedback says otherwise. If less were expected,
        # only their ends would be tried.
        relevance = np.zeros(own + self.extra)
        strength = np.concatenate([np.full(own, 0.4), np.full(self.extra, 0.75)])
        if self.fidelity:
            # The ranks of mixtures are expected to change less with it.
            relevance[-1], strength[-1] = math.log(0.5), 1.0
        trend = 0 if self.trend is None else 1
        lengthscale = math.log(1.3 * kernels.spread_of(self.map, self.num_domains))
        extra = ((), ()) if likelihood is None else (likelihood.mean, likelihood.scale)
        mean = (lengthscale, relevance, 0.0, -4.0 - KNOWN * known, np.full(trend, -1.0), np.array(extra[0]))
        scale = (0.75, strength, 0.5, 1.5, np.full(trend, 1.0), np.array(extra[1]))
        return Hyperparameters(*map(jnp.asarray, mean)), Hyperparameters(*map(jnp.asarray, scale))

    def inverse_lengthscales(self, hyperparameters: Hyperparameters) -> Array:
        """One per feature, `[d + extra]`."""
        relevance = hyperparameters.relevance
        if not self.ard:
            relevance = jnp.concatenate([jnp.zeros(self.num_domains, relevance.dtype), relevance])
        return jnp.exp(relevance - hyperparameters.lengthscale)

    def covariance(self, hyperparameters: Hyperparameters, a: Inputs, b: Inputs) -> Array:
        """Prior covariance `[n, m]` of noise-free values."""
        kernel = kernels.Matern52(self.inverse_lengthscales(hyperparameters))
        slope = jnp.exp(jnp.sum(hyperparameters.slope))
        return kernels.covariance(kernel, jnp.exp(hyperparameters.signal), slope, a, b)

    def log_evidence(
        self, hyperparameters: Hyperparameters, problem: Problem, likelihood: Likelihood | None, latent: Array
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """Log marginal likelihood, up to a constant, and the latent values, targets and variances it is of.

        A masked row adds 0: its block of the covariance is the identity and its value is 0.
        """
        inputs = problem.inputs
        floor = noise_floor(problem.values.dtype)
        noise = jnp.exp(hyperparameters.noise) + floor
        prior = self.covariance(hyperparameters, inputs, inputs)
        known = 0.0 if likelihood is not None else problem.variances
        total = prior + jnp.diag(jnp.where(inputs.mask > 0, noise + known, 1.0))
        if likelihood is None:
            return log_density(total, problem.values), (latent, problem.values, problem.variances)

        def density(latent: Array, parameters: Array) -> Array:
            return likelihood.log_density(latent, parameters, problem)

        found = approximate(total, density, hyperparameters.likelihood, latent)
        return found.log_evidence, (found.latent, found.targets, found.variances)

    def fit(self, problem: Problem, likelihood: Likelihood | None = None) -> tuple[Hyperparameters, Problem]:
        """Maximum a posteriori hyperparameters; the problem with what the likelihood's normal approximation sees."""
        count = jnp.sum(problem.inputs.mask)
        known = jnp.all((problem.inputs.mask == 0) | (problem.variances > 0)).astype(float)
        # A likelihood has noise of its own.
        mean, scale = self.prior(likelihood, known if likelihood is None else 1.0)
        dtype = problem.values.dtype
        mean_vector, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), mean))
        scale_vector, _ = ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), scale))

        # In units of the priors, where all variables are alike and the prior is a unit normal.
        def objective(problem: Problem, units: Array, latent: Array) -> tuple[Array, Array]:
            hyperparameters = unravel(mean_vector + scale_vector * units)
            evidence, (latent, _, _) = self.log_evidence(hyperparameters, problem, likelihood, latent)
            return 0.5 * units @ units - evidence, jax.lax.stop_gradient(latent)

        lengthscale, noise = jnp.asarray(STARTS, dtype).T
        starts = jnp.zeros((len(STARTS), len(mean_vector)), dtype)
        at_noise = mean.relevance.size + 2
        starts = starts.at[:, 0].set(lengthscale).at[:, at_noise].set(noise)
        few = problem if len(problem.values) <= FEW else _thin(problem)
        # One start after another: on the CPU a batch of small factorisations is slower than their sum.
        ends = jax.lax.map(lambda at: minimise(partial(objective, few), at, few.values, EVALUATIONS), starts)
        best = jnp.argmin(jnp.where(jnp.isfinite(ends.value), ends.value, jnp.inf))
        end = jax.tree.map(lambda x: x[best], ends)
        point, latent = end.point, end.carry
        if few is not problem:
            # All the evidence is about that much more curved than that of the few.
            inverse = end.inverse * jnp.minimum(1.0, FEW / count)
            fine = minimise(partial(objective, problem), point, problem.values, FINE, inverse)
            # Where the few were all, nothing is to be added: the size of the buffer must not matter.
            point, latent = jnp.where(count > FEW, fine.point, point), fine.carry
        hyperparameters = unravel(mean_vector + scale_vector * point)
        if likelihood is None:
            return hyperparameters, problem
        _, (_, targets, variances) = self.log_evidence(hyperparameters, problem, likelihood, latent)
        return hyperparameters, problem._replace(values=targets, variances=variances)

    def condition(self, hyperparameters: Hyperparameters, problem: Problem, pending: Inputs) -> Posterior:
        """The posterior after the observations, with the variance as if pending mixtures were told as well.

        The mean does not know what they will bring (GP-BUCB, Desautels et al. 2014, section 4.1).
        """
        seen = problem.inputs
        if seen.against is not None:
            nothing = jax.tree.map(jnp.zeros_like, pending)
            pending = pending._replace(against=nothing)
        inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, pending)
        noise = jnp.exp(hyperparameters.noise) + noise_floor(problem.values.dtype)
        variances = jnp.concatenate([problem.variances, jnp.zeros_like(pending.mask)])
        diagonal = jnp.where(inputs.mask > 0, noise + variances, 1.0)
        factor, _ = inverse_factor(self.covariance(hyperparameters, inputs, inputs) + jnp.diag(diagonal))
        # Its leading block is the factor of the observations alone.
        count = problem.values.shape[0]
        block = factor[:count, :count]
        weights = jnp.zeros_like(diagonal).at[:count].set(block.T @ (block @ problem.values))
        return Posterior(hyperparameters, inputs, weights, factor, diagonal, problem.centre, problem.spread)

    def moments(self, posterior: Posterior, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the noise-free value, standardised, each `[m]`, at points `[m, d + extra]`."""
        queries = self.inputs(points)
        cross = self.covariance(posterior.hyperparameters, queries, posterior.inputs)
        explained = jnp.sum((cross @ posterior.factor.T) ** 2, axis=1)
        variance = self.variance(posterior.hyperparameters, queries) - explained
        return cross @ posterior.weights, jnp.sqrt(jnp.maximum(variance, 1e-12))

    def joint(self, posterior: Posterior, points: Array) -> tuple[Array, Array]:
        """Mean `[m]` and covariance `[m, m]` of the noise-free values, standardised, at points `[m, d + extra]`."""
        queries = self.inputs(points)
        cross = self.covariance(posterior.hyperparameters, queries, posterior.inputs)
        solved = cross @ posterior.factor.T
        prior = self.covariance(posterior.hyperparameters, queries, queries)
        return cross @ posterior.weights, prior - solved @ solved.T

    def told(self, posterior: Posterior, points: Array) -> Array:
        """Part of the last point's variance that feedback at each of the points `[m, d + extra]` takes away, `[m]`."""
        queries = self.inputs(points)
        last = jax.tree.map(lambda x: x[-1:], queries)
        solved = self.covariance(posterior.hyperparameters, queries, posterior.inputs) @ posterior.factor.T
        prior = self.covariance(posterior.hyperparameters, queries, last)[:, 0]
        shared = prior - solved @ solved[-1]
        variance = self.variance(posterior.hyperparameters, queries) - jnp.sum(solved**2, axis=1)
        heard = variance + jnp.exp(posterior.hyperparameters.noise) + noise_floor(points.dtype)
        return shared**2 / jnp.maximum(heard * variance[-1], 1e-12)

    def variance(self, hyperparameters: Hyperparameters, queries: Inputs) -> Array:
        """Prior variance `[m]` of the values at some inputs."""
        slope = jnp.exp(jnp.sum(hyperparameters.slope))
        return jnp.exp(hyperparameters.signal) + slope * jnp.sum(queries.trend**2, axis=1)


def _thin(problem: Problem) -> Problem:
    """`FEW` of the observations, evenly over the order they came in; all of them where there are no more."""
    count = jnp.sum(problem.inputs.mask).astype(int)
    rows = jnp.arange(FEW) * jnp.maximum(count, FEW) // FEW
    inputs, values, variances, told = jax.tree.map(
        lambda x: x[rows], (problem.inputs, problem.values, problem.variances, problem.rows)
    )
    return problem._replace(inputs=inputs, values=values, variances=variances, rows=told)


def standardise(values: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Feedback `[n]` with mean 0 and variance 1 (0 in masked rows), the mean and the standard deviation.

    Feedback that differs by rounding alone counts as equal; the standard deviation is then reported as 1.
    """
    count = jnp.maximum(jnp.sum(mask), 1)
    centre = jnp.sum(jnp.where(mask, values, 0.0)) / count
    deviation = jnp.where(mask, values - centre, 0.0)
    # Divided by the largest first, so that squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(deviation))
    rounding = 4e3 * jnp.finfo(values.dtype).eps
    differs = largest > rounding * jnp.max(jnp.where(mask, jnp.abs(values), 0.0))
    largest = jnp.where(differs, largest, 1.0)
    scaled = jnp.where(differs, deviation / largest, 0.0)
    variance = jnp.sum(scaled**2) / jnp.maximum(count - 1, 1)
    spread = jnp.where(differs, largest * jnp.sqrt(jnp.where(differs, variance, 1.0)), 1.0)
    return jnp.where(differs, deviation / spread, 0.0), centre, spread
