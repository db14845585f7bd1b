"""Several trainings of one mixture of which the best counts: what that adds to its score, and how to take it away.

DUET (arXiv 2502.00270, section 3.2) trains `k` models on each mixture and keeps the best. Its theorem 3.2 says that
a score falls short of the mixture's best by an exponential error of some rate, truncated at a cutoff. The best of
`k` falls short by the least of `k` errors: its mean is not 0, and it depends on `k`. Here its moments are exact, and
all `k` scores take part in the estimate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Nodes of the quadrature, and the number of mean errors beyond which the survival function is 0 in any dtype.
NODES, FAR = 48, 40.0
# The search for a rate: points of each grid, how often it is narrowed, and how far off the guess may be (logarithm).
POINTS, NARROWED, REACH = 17, 7, 9.0


class Replicates(NamedTuple):
    """Scores of trials that have several, one row a trial; rows of no score are masked.

    Attributes:
      best: `[n]`, the highest score.
      number: `[n]`, how many scores there are.
      gaps: `[n]`, sum over the scores of what each falls short of the best.
      largest: `[n]`, the largest of these gaps.
    """

    best: Array
    number: Array
    gaps: Array
    largest: Array


def summarise(scores: Array) -> Replicates:
    """The row of one trial with scores `[k]`, k >= 1, higher is better; or rows `[n]` of scores `[n, k]`."""
    best = jnp.max(scores, axis=-1)
    gaps = best[..., None] - scores
    count = jnp.full_like(best, scores.shape[-1])
    return Replicates(best, count, jnp.sum(gaps, axis=-1), jnp.max(gaps, axis=-1))


def check_scores(scores: object, cutoff: float = float("inf")) -> np.ndarray:
    """Scores of one trial as float64 `[k]`.

    Raises:
      ValueError: there are none, one is no finite number, or two differ by the cutoff or more.
    """
    try:
        values = np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The scores of a trial are {scores!r}; they must be a list of numbers.") from error
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
        raise ValueError(f"The scores of a trial are {scores!r}; they must be at least one number, all finite.")
    if np.ptp(values) >= cutoff:
        raise ValueError(
            f"Scores of one mixture differ by {np.ptp(values):g}, but no error is above the cutoff, {cutoff:g}: "
            f"raise the cutoff."
        )
    return values


def moments(count: Array, rate: Array, cutoff: Array) -> tuple[Array, Array]:
    """Mean and variance of the least of `count` errors, to 1e-9.

    Args:
      count: number of errors, k >= 1; it broadcasts with the others.
      rate: of the exponential, above 0, in 1 / units of the score.
      cutoff: largest error there is; infinite for none.
    """
    dtype = jnp.result_type(count, rate, cutoff, 0.0)
    count, rate, cutoff = (jnp.asarray(x, dtype)[..., None] for x in (count, rate, cutoff))
    # E[min] is the integral of the survival function to the power k (of 2u times it for the square), which at
    # `FAR / (k rate)` has vanished.
    end = jnp.minimum(cutoff, 2 * FAR / rate)
    until = jnp.minimum(end, FAR / (count * rate))
    places, weights = np.polynomial.legendre.leggauss(NODES)
    at = until * jnp.asarray(0.5 * (places + 1), until.dtype)
    weight = until * jnp.asarray(0.5 * weights, until.dtype)
    log_survival = jnp.log(jnp.expm1(-rate * (end - at)) / jnp.expm1(-rate * end)) - rate * at
    survival = jnp.exp(count * log_survival)
    mean = jnp.sum(weight * survival, axis=-1)
    deviation = at - mean[..., None]
    # E[(e - m)^2] = m^2 + the integral of 2 (u - m) times the survival function: no difference of squares.
    return mean, mean**2 + jnp.sum(2 * weight * deviation * survival, axis=-1)


def truncated_moments(rate: Array, cutoff: Array) -> tuple[Array, Array]:
    """Mean and variance of an exponential variable of a rate above 0, given that it is at most `cutoff` >= 0."""
    # Its shape depends on this product alone; beyond 2 FAR it is that of no cutoff.
    t = rate * jnp.minimum(cutoff, 2 * FAR / rate)
    small = t < 0.5
    series = jnp.where(small, t, 0.0)
    square = series**2
    # Taylor series (Bernoulli numbers) where the closed forms are differences of nearly equal terms.
    terms = -1 / 12 + square * (1 / 720 + square * (-1 / 30240 + square * (1 / 1209600 - square / 47900160)))
    slopes = 1 / 12 + square * (-1 / 240 + square * (1 / 6048 + square * (-1 / 172800 + square / 5322240)))
    safe = jnp.where(small, 1.0, t)
    mean = jnp.where(small, series * (0.5 + series * terms), 1.0 - safe / jnp.expm1(safe))
    variance = jnp.where(small, square * slopes, 1.0 - (0.5 * safe / jnp.sinh(0.5 * safe)) ** 2)
    return mean / rate, variance / rate**2


def log_likelihood(rows: Replicates, rate: Array, cutoff: Array | float) -> Array:
    """Log density `[n]` of each trial's gaps, up to a constant; 0 for trials of less than 2 scores.

    With location `f`, scores `f - e_j` and `e` the least error, the density of the scores is
    `rate^k exp(-rate (k e + G)) / Z^k` for `0 <= e <= cutoff - largest`, where `G` is the sum of the gaps and
    `Z = 1 - exp(-rate cutoff)`. Whatever `f` is, `e` runs over all of that: the integral is what is left.
    """
    used = rows.number > 1
    count, gaps = jnp.where(used, rows.number, 1.0), jnp.where(used, rows.gaps, 0.0)
    room = _room(rows, cutoff)
    masses = _log_mass(rate * count * room) - count * _log_mass(rate * cutoff)
    return jnp.where(used, (count - 1) * jnp.log(rate) - rate * gaps + masses, 0.0)


def fit_rate(rows: Replicates, cutoff: Array | float, guess: Array | float) -> Array:
    """The rate of the errors of all trials, at the mode of its posterior (of its logarithm); to six digits.

    The prior is a gamma distribution that weighs as much as one gap of size `1 / guess`: it decides where no trial
    has two scores, and gives way where several have. Without a cutoff the mode is `(gaps + 1) / (sum + 1 / guess)`.

    Args:
      rows: `[n]`.
      cutoff: largest error there is; infinite for none. As Python's infinity it spares the search for the mode.
      guess: the rate expected before any score.
    """
    gaps = jnp.where(rows.number > 1, rows.number - 1, 0.0)
    total = jnp.where(rows.number > 1, rows.gaps, 0.0)
    free = (jnp.sum(gaps) + 1.0) / (jnp.sum(total) + 1.0 / guess)
    if isinstance(cutoff, float) and math.isinf(cutoff):
        return free

    def height(log_rate: Array) -> Array:
        rate = jnp.exp(log_rate)
        return jnp.sum(log_likelihood(rows, rate, cutoff)) + log_rate - rate / guess

    steps = jnp.linspace(-1.0, 1.0, POINTS, dtype=rows.best.dtype)

    def narrow(_: int, at: tuple[Array, Array]) -> tuple[Array, Array]:
        centre, reach = at
        grid = centre + reach * steps
        return grid[jnp.argmax(jax.vmap(height)(grid))], reach * 2 / (POINTS - 1)

    begin = (jnp.log(free), jnp.full_like(free, REACH))
    bounded = jnp.exp(jax.lax.fori_loop(0, NARROWED, narrow, begin)[0])
    return jnp.where(jnp.isinf(cutoff), free, bounded)


def debias(rows: Replicates, rate: Array, cutoff: Array | float) -> tuple[Array, Array]:
    """What the best score would be without its error, and the variance of that, each `[n]`.

    Given all scores, the least error is exponential of rate `count * rate`, truncated where the worst score's error
    would exceed the cutoff. Masked rows keep their value, with variance 0.
    """
    used = rows.number > 0
    mean, variance = truncated_moments(jnp.where(used, rows.number, 1.0) * rate, _room(rows, cutoff))
    return jnp.where(used, rows.best + mean, rows.best), jnp.where(used, variance, 0.0)


def _room(rows: Replicates, cutoff: Array | float) -> Array:
    """What the least error can be at most: a little even where gaps have no room, so that nothing is infinite."""
    return jnp.maximum(cutoff - jnp.where(rows.number > 1, rows.largest, 0.0), 1e-6 * rows.largest)


def _log_mass(t: Array) -> Array:
    """Logarithm of `1 - exp(-t)`."""
    return jnp.log(-jnp.expm1(-jnp.minimum(t, 2 * FAR)))
