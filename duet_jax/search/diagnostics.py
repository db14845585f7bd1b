"""What a search has learnt: which domains matter and how, how large the noise is, and whether to believe it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.search.constraints import Constraints, bounds, extreme, project
from duet_jax.search.observations import BestOf, Comparisons, Observations
from duet_jax.search.replicates import moments
from duet_jax.search.search import Search, _fitted, _host
from duet_jax.search.simplex import hellinger
from duet_jax.search.surrogate import Posterior, Surrogate

# Shares at which a main effect is computed, random mixtures of the other domains at each, and sizes of intervals.
SHARES, DRAWS = 33, 128
LEVELS = (0.5, 0.8, 0.95)


class Effects(NamedTuple):
    """Main effect of each domain: the average value of random allowed mixtures that have a given share of it.

    The other domains have the rest, in proportions that are uniform on their simplex; bounds and group sums are met by
    projection. The same draws serve all shares. A smallest positive share and a largest number of domains are ignored:
    both would leave holes in the range.

    Attributes:
      shares: `[d, g]`, ascending, over all that the constraints allow; see `share_grids`.
      mean, stderr: `[d, g]`, posterior of the average, in units of the feedback. The standard deviation is the
        average's own, from the joint posterior of all that is averaged, and not the mean of their deviations.
      importance: `[d]`, from 0 to 1; see `importances`.
    """

    shares: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    importance: np.ndarray


class LeftOut(NamedTuple):
    """Each observation predicted from all others, at the hyperparameters and the scale that were fitted to all.

    These are of what the surrogate was fitted to. Of ratings, intervals and the best of several scores that are normal
    pseudo-observations: values at which, and errors with which, a number would have said as much. Of ratings and
    intervals they depend on the whole fit, and residuals may be too small.

    Attributes:
      values: `[n]`, in the order in which they were told, in units of the feedback.
      mean, stderr: `[n]`, of the prediction of each value, with its noise.
      residuals: `[n]`, `(values - mean) / stderr`: standard normal if the surrogate is right.
      coverage: `[3]`, share of the values within their central intervals of `LEVELS`.
      log_density: `[n]`, logarithm of each value's predictive density, in nats; it depends on the feedback's unit.
    """

    values: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    residuals: np.ndarray
    coverage: np.ndarray
    log_density: np.ndarray


class Shortfall(NamedTuple):
    """By how much the best of k scores falls short of the best a mixture can give (DUET, section 3.2).

    Moments of the least of k exponential errors, truncated at the cutoff: exact given the rate.

    Attributes:
      rate: of the errors, from all scores of all trials, in 1 / units of the score.
      number: int `[m]`, k from 1 to the most scores that a trial has.
      mean, deviation: `[m]`, of the shortfall, in units of the score.
    """

    rate: float
    number: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


class Report(NamedTuple):
    """What `diagnose` finds; all arrays are float64.

    Attributes:
      lengthscales: `[d]`, in the map: on the Hellinger map, vertices are sqrt 2 apart. A large one: hardly matters.
      relevance: `[d]`, share of each domain in the sum of inverse squared lengthscales. It knows the lengthscales and
        nothing of how large effects are: see `Effects.importance` for that.
      effects: along each domain.
      left_out: how well each observation is predicted by the others.
      noise: learned standard deviation of a trial's noise, besides known errors, in units of the feedback.
      amplitude: prior standard deviation of the value, in the same units, for comparison.
      shortfall: of the best of several scores; None for other kinds of feedback.
    """

    lengthscales: np.ndarray
    relevance: np.ndarray
    effects: Effects
    left_out: LeftOut
    noise: float
    amplitude: float
    shortfall: Shortfall | None


def diagnose(search: Search, state: Observations) -> Report:
    """Diagnoses the surrogate of a search after all feedback, on the host in float64.

    Coordinates of a training configuration are held at those of the observation of highest posterior mean.

    Raises:
      ValueError: nothing has been observed, or feedback is comparisons or that of several tasks, for which neither
        one scale nor one observation a row exists.
    """
    if isinstance(search.feedback, Comparisons):
        raise ValueError("The feedback is comparisons, which give no value to leave out; diagnose another kind.")
    if len(search.feedback.weights) > 1:
        tasks = len(search.feedback.weights)
        raise ValueError(f"The feedback is of {tasks} tasks, each with its own surrogate; diagnose one task at a time.")
    mask = np.asarray(state.mask)
    if not mask.any():
        raise ValueError("There is nothing to diagnose before the first feedback.")
    surrogate, constraints, size = search.surrogate, search.constraints, search.num_domains
    shares = share_grids(constraints, size)
    with _host():
        (posterior,) = _fitted(search, state)
        settings = search.space.at_target(state.settings)
        found = _measure(surrogate, constraints, posterior, settings, jnp.asarray(shares))
        inverse = np.asarray(surrogate.inverse_lengthscales(posterior.hyperparameters))[:size]
        (mean, stderr, within), left_out = jax.device_get(found)
        shortfall = _shortfall(search.feedback, state) if isinstance(search.feedback, BestOf) else None
    centre, spread = float(posterior.centre), float(posterior.spread)
    values, predicted, deviation = (x[mask] for x in left_out)
    return Report(
        lengthscales=1.0 / inverse,
        relevance=inverse**2 / np.sum(inverse**2),
        effects=Effects(shares, centre + spread * mean, spread * stderr, importances(shares, mean, within)),
        left_out=_calibration(centre + spread * values, centre + spread * predicted, spread * deviation),
        noise=spread * math.exp(0.5 * float(posterior.hyperparameters.noise)),
        amplitude=spread * math.exp(0.5 * float(posterior.hyperparameters.signal)),
        shortfall=shortfall,
    )


def difference(
    search: Search, state: Observations, one: np.ndarray, other: np.ndarray, settings: Mapping[str, Any]
) -> tuple[float, float]:
    """By how much the value of one mixture `[d]` exceeds another's: posterior mean and standard deviation.

    The deviation is that of the difference, from the joint posterior: what is not known of both alike does not blur
    their comparison. Both are of the noise-free value, in units of the feedback, with the same settings, by name.

    Raises:
      ValueError: the feedback is that of several tasks, which have no one scale.
    """
    if len(search.feedback.weights) > 1:
        raise ValueError(f"The feedback is of {len(search.feedback.weights)} tasks, which have no scale in common.")
    points = search._points(np.stack([one, other]), settings)
    with _host():
        (posterior,) = _fitted(search, state)
        mean, deviation = _difference(search, posterior, jnp.asarray(points))
    return float(mean), float(deviation)


def _shortfall(kind: BestOf, state: Observations) -> Shortfall:
    rate = kind.rate(state)
    number = np.arange(1, 1 + int(jnp.max(state.feedback.number)))
    mean, variance = moments(jnp.asarray(number), rate, jnp.asarray(kind.cutoff))
    return Shortfall(float(rate), number, np.array(mean), np.sqrt(variance))


def leave_one_out(surrogate: Surrogate, posterior: Posterior) -> tuple[Array, Array, Array]:
    """Each value, and the mean and standard deviation of its prediction from all others, standardised, each `[n]`.

    Closed form, without a new fit (Rasmussen & Williams 2006, equation 5.12). Rows not in use have value 0.
    """
    prior = surrogate.covariance(posterior.hyperparameters, posterior.inputs, posterior.inputs)
    # The posterior keeps K^-1 y in place of y.
    values = prior @ posterior.weights + posterior.diagonal * posterior.weights
    precision = jnp.sum(posterior.factor**2, axis=0)
    return values, values - posterior.weights / precision, precision**-0.5


def main_effects(
    surrogate: Surrogate, constraints: Constraints, posterior: Posterior, settings: Array, shares: Array, draws: Array
) -> tuple[Array, Array, Array]:
    """The average value of mixtures with a given share of a domain.

    Args:
      settings: `[e]`, further coordinates of all points.
      shares: `[d, g]`, of each domain, within what the constraints allow.
      draws: `[m, d]`, positive; without one entry a row divided by its sum gives the other domains' proportions.

    Returns:
      Posterior mean and standard deviation of the average, and the variance of the posterior mean within what is
      averaged, standardised, each `[d, g]`.
    """
    size = surrogate.num_domains
    lower, upper = bounds(constraints, size)

    def average(at: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        domain, share = at
        chosen = jnp.arange(size) == domain
        others = jnp.where(chosen, 0.0, draws)
        others = others / jnp.sum(others, axis=1, keepdims=True)
        mixtures = jnp.where(chosen, share, (1.0 - share) * others)
        if constraints.groups or np.any(lower > 0) or np.any(upper < 1):
            low, high = (jnp.where(chosen, share, bound) for bound in (lower, upper))
            mixtures = project(mixtures, low, high, constraints.groups)
        rest = jnp.broadcast_to(settings, (len(draws), len(settings)))
        queries = surrogate.inputs(jnp.concatenate([hellinger(mixtures), rest], axis=1))
        cross = surrogate.covariance(posterior.hyperparameters, queries, posterior.inputs)
        means = cross @ posterior.weights
        prior = jnp.mean(surrogate.covariance(posterior.hyperparameters, queries, queries))
        explained = jnp.sum((posterior.factor @ jnp.mean(cross, axis=0)) ** 2)
        return jnp.mean(means), jnp.sqrt(jnp.maximum(prior - explained, 1e-12)), jnp.var(means)

    domains = jnp.broadcast_to(jnp.arange(size)[:, None], shares.shape)
    found = jax.lax.map(average, (domains.ravel(), shares.ravel()))
    mean, deviation, within = (x.reshape(shares.shape) for x in found)
    return mean, deviation, within


def importances(shares: np.ndarray, mean: np.ndarray, within: np.ndarray) -> np.ndarray:
    """How much of the variation of the predicted value a domain's share explains on its own, `[d]`, from 0 to 1.

    The first-order index of Sobol, `Var E[f | share] / Var f`, of the posterior mean over uniformly random mixtures.
    The shares of a mixture are not independent, for they sum to 1, and what this means should be said: of uniform
    mixtures, one share and the *proportions* of all others are independent, and the index is that of the first of
    these two. More of a domain that does nothing still leaves less for one that does, and the index counts this: if
    the value is linear in one share of d, the index of every other domain is `1 / (d - 1)^2`, not 0; with two domains
    both have 1. The indices therefore do not add up to 1. What proportions explain is not in them, nor is what the
    surrogate does not know: a flat posterior mean has importances that mean nothing, and one that is flat to rounding
    has 0.

    With constraints, mixtures are those of `Effects`, and shares those of uniform mixtures cut to what is allowed.

    Args:
      shares: `[d, g]`, ascending.
      mean, within: `[d, g]`, of `main_effects`.
    """
    size = len(shares)
    if size == 1:
        return np.zeros(1)
    chance = (np.arange(4096) + 0.5) / 4096
    found = np.zeros(size)
    for domain, grid in enumerate(shares):
        # A share of a uniform mixture is Beta(1, d - 1); between shares of the grid, effects are taken as linear.
        first, last = 1.0 - (1.0 - grid[[0, -1]]) ** (size - 1)
        typical = 1.0 - (1.0 - first - (last - first) * chance) ** (1.0 / (size - 1))
        weights = np.array([np.interp(typical, grid, column).mean() for column in np.eye(len(grid))])
        between = weights @ (mean[domain] - weights @ mean[domain]) ** 2
        total = between + weights @ within[domain]
        found[domain] = between / total if total > 1e-16 else 0.0
    return found


def share_grids(constraints: Constraints, size: int) -> np.ndarray:
    """Shares of each domain from the least to the largest allowed, float64 `[size, SHARES]`.

    They are even in the angle on the sphere of square roots: closer together at both ends, where effects bend.
    """
    with _host():
        identity = jnp.eye(size)
        slopes = jnp.concatenate([-identity, identity])
        ends = np.asarray(extreme(slopes, *bounds(constraints, size), constraints.groups))
    own = np.arange(size)
    least, most = ends[own, own], ends[size + own, own]
    angles = np.linspace(np.arcsin(np.sqrt(least)), np.arcsin(np.sqrt(most)), SHARES, axis=1)
    return np.clip(np.sin(angles) ** 2, least[:, None], most[:, None])


def _draws(size: int) -> np.ndarray:
    """Standard exponential numbers `[DRAWS, size]`, the same ones every time, in a Latin hypercube."""
    chance = (np.arange(DRAWS) + 0.5) / DRAWS
    shuffled = np.random.default_rng(0).permuted(np.tile(chance, (size, 1)), axis=1)
    return -np.log1p(-shuffled.T)


@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    surrogate: Surrogate, constraints: Constraints, posterior: Posterior, settings: Array, shares: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    left_out = leave_one_out(surrogate, posterior)
    fitted = left_out[0] - posterior.diagonal * posterior.weights
    best = jnp.argmax(jnp.where(posterior.inputs.mask > 0, fitted, -jnp.inf)[: len(settings)])
    draws = jnp.asarray(_draws(surrogate.num_domains), shares.dtype)
    return main_effects(surrogate, constraints, posterior, settings[best], shares, draws), left_out


@partial(jax.jit, static_argnums=0)
def _difference(search: Search, posterior: Posterior, points: Array) -> tuple[Array, Array]:
    mean, covariance = search.surrogate.joint(posterior, search.roots(points))
    variance = covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1]
    return posterior.spread * (mean[0] - mean[1]), posterior.spread * jnp.sqrt(jnp.maximum(variance, 0.0))


def _calibration(values: np.ndarray, mean: np.ndarray, stderr: np.ndarray) -> LeftOut:
    residuals = (values - mean) / stderr
    limits = [statistics.NormalDist().inv_cdf(0.5 + 0.5 * level) for level in LEVELS]
    coverage = np.array([np.mean(np.abs(residuals) <= limit) for limit in limits])
    log_density = -0.5 * residuals**2 - np.log(stderr) - 0.5 * math.log(2.0 * math.pi)
    return LeftOut(values, mean, stderr, residuals, coverage, log_density)
