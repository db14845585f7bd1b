"""Feedback that is no number with normal noise: stars, shares of correct answers, intervals, comparisons.

Every log density here is concave in the latent value (Chu & Ghahramani 2005, "Gaussian processes for ordinal
regression", section 2.1). It and its derivatives are finite and right far out in the tails: at 50 standard deviations
the curvature is known to 1e-12 in float64 and to 1e-3 in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.errors import FeedbackError

# Where the normal tail turns to its continued fraction, and how many terms that has.
TAIL, TERMS = 5.0, 16
# Intervals narrower than this, and not steeper, are integrated by a Gauss-Legendre rule.
NARROW = 0.5
PLACES, WEIGHTS = (x.tolist() for x in np.polynomial.legendre.leggauss(6))
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

Three = tuple[Array, Array, Array]


@jax.custom_jvp
def _tail(z: Array) -> Three:
    """`log Phi(z)`, its derivative `h`, and `e = h + z`, with `h' = -h e` and `e' = 1 - h e`.

    Derivatives of any order are products of what is returned. With a large negative `z`, where `h` is nearly `-z`,
    `e` is not a difference: as one, it has no digit left in float32 at -50.
    """
    near = jnp.maximum(z, -TAIL)
    # Above 0 it is the complement that is small.
    complement = 0.5 * jax.lax.erfc(jnp.abs(near) * math.sqrt(0.5))
    share = jnp.where(near > 0, 1.0 - complement, complement)
    log_near = jnp.where(near > 0, jnp.log1p(-complement), jnp.log(complement))
    near_hazard = jnp.exp(-0.5 * near**2 - HALF_LOG_TWO_PI) / share
    # Laplace's continued fraction of the Mills ratio.
    far = jnp.maximum(-z, TAIL)
    rest = jnp.zeros_like(far)
    for term in range(TERMS, 0, -1):
        rest = term / (far + rest)
    log_far = -0.5 * far**2 - HALF_LOG_TWO_PI - jnp.log(far + rest)
    is_far = z < -TAIL
    return (
        jnp.where(is_far, log_far, log_near),
        jnp.where(is_far, far + rest, near_hazard),
        jnp.where(is_far, rest, near_hazard + z),
    )


@_tail.defjvp
def _tail_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Three, Three]:
    value, hazard, excess = _tail(*primals)
    (tangent,) = tangents
    bend = -hazard * excess
    return (value, hazard, excess), (hazard * tangent, bend * tangent, (1.0 + bend) * tangent)


def log_probit(z: Array) -> Array:
    """Logarithm of the normal distribution function, with exact derivatives of any order."""
    return _tail(z)[0]


@jax.custom_jvp
def _interval(centre: Array, width: Array) -> Three:
    """Log probability `L` of an interval, `s = dL / dcentre` and `t = width dL / dwidth`.

    With `r` the density at an end over the probability, `s` is the difference of the two `r` and `t` is half the
    width times their sum. Derivatives of both are products of these and of centre and width.
    """
    # By symmetry the interval is on the left, where probabilities are small and not near 1.
    left = -jnp.abs(centre)
    narrow = (width < NARROW) & (-left * width < 1.0)

    half = 0.5 * jnp.where(narrow, 1.0, width)
    (top, bottom), (high, low), _ = _tail(jnp.stack([left + half, left - half]))
    odds = 1.0 / jnp.expm1(top - bottom)
    # The logarithm of 1 - exp(bottom - top) is minus that of 1 + odds.
    wide_value = top - jnp.log1p(odds)
    above, below = high * (1.0 + odds), low * odds

    # The density at the centre times the width, and the mean of how it differs over the interval: smooth, and
    # nothing cancels however narrow it is.
    width = jnp.where(narrow, width, NARROW)
    place = jnp.where(narrow, left, 0.0)
    at = 0.5 * width[..., None] * jnp.asarray(PLACES, width.dtype)
    mean = 0.5 * jnp.sum(jnp.asarray(WEIGHTS, width.dtype) * jnp.exp(-at * (place[..., None] + 0.5 * at)), axis=-1)
    value = -0.5 * place**2 - HALF_LOG_TWO_PI + jnp.log(width * mean)
    edge = jnp.exp(-0.125 * width**2) / mean
    tilt = 0.5 * place * width

    slope = jnp.where(narrow, -2.0 * edge * jnp.sinh(tilt) / width, above - below)
    ends = jnp.where(narrow, edge * jnp.cosh(tilt), half * (above + below))
    return jnp.where(narrow, value, wide_value), jnp.where(centre > 0, -slope, slope), ends


@_interval.defjvp
def _interval_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Three, Three]:
    centre, width = primals
    value, s, t = _interval(centre, width)
    move, grow = tangents[0], tangents[1] / width
    cross = -t * (centre + s) - 0.25 * width**2 * s
    ends = t * (1.0 - t) - 0.25 * width**2 * (centre * s + t)
    bend = -(s * (centre + s) + t)
    return (value, s, t), (s * move + t * grow, bend * move + cross * grow, cross * move + ends * grow)


def log_interval(centre: Array, width: Array) -> Array:
    """Log probability that a standard normal variable is within `width / 2 > 0` of `centre`, of the same shapes."""
    return _interval(centre, width)[0]


class Told(Protocol):
    """Feedback as a likelihood reads it: `rows` of its own, and latent values standardised by `centre`, `spread`."""

    @property
    def rows(self) -> Any: ...

    @property
    def centre(self) -> Array: ...

    @property
    def spread(self) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Stars from 1 to `levels`: the value plus normal noise, cut at thresholds (ordered probit).

    A trial has any number of ratings. Accuracy, k of m correct, is ratings of two levels.

    Parameters `[p]` have a normal prior. The first is the logarithm of a rating's noise, in stars. Where thresholds
    are learned, the second is by how much the first threshold is above 1.5 stars, and the others are logarithms of
    the gaps between thresholds: at 0 a rating is a number rounded to stars, and they are in order wherever they go.

    Attributes:
      levels: number of different stars, at least 2.
      learned: whether thresholds are learned, or stay halfway between the stars.
    """

    levels: int
    learned: bool = True

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}; ratings need at least 2.")

    @property
    def mean(self) -> tuple[float, ...]:
        """Prior means of the parameters: noise of 0.7 stars, and even thresholds."""
        return math.log(0.7), *[0.0] * self._free

    @property
    def scale(self) -> tuple[float, ...]:
        """Prior standard deviations of the parameters."""
        return 0.5, *[0.4] * self._free

    @property
    def _free(self) -> int:
        return self.levels - 1 if self.learned else 0

    def thresholds(self, parameters: Array) -> Array:
        """Where the value passes from one level to the next, in stars, `[levels - 1]`, increasing."""
        if not self.learned:
            return jnp.arange(1, self.levels, dtype=parameters.dtype) + 0.5
        gaps = jnp.concatenate([parameters[1:2], jnp.exp(parameters[2:])])
        return 1.5 + jnp.cumsum(gaps)

    def log_density(self, latent: Array, parameters: Array, told: Told) -> Array:
        """Log probability of each trial's ratings in the order they came, `[n]`; 0 without ratings.

        Args:
          latent: `[n]`; a value is `centre + spread * latent` stars.
          parameters: `[p]`.
          told: rows are counts `[n, levels]` of the ratings of each level.
        """
        noise = jnp.exp(parameters[0])
        thresholds = self.thresholds(parameters)
        cuts = (thresholds - (told.centre + told.spread * latent)[:, None]) / noise
        counts = told.rows
        ends = log_probit(jnp.stack([cuts[:, 0], -cuts[:, -1]]))
        total = counts[:, 0] * ends[0] + counts[:, -1] * ends[1]
        if self.levels == 2:
            return total
        centres = 0.5 * (cuts[:, 1:] + cuts[:, :-1])
        inner = log_interval(centres, jnp.broadcast_to(jnp.diff(thresholds) / noise, centres.shape))
        return total + jnp.sum(counts[:, 1:-1] * inner, axis=1)

    def guess(self, counts: Array) -> Array:
        """Mean number of stars of each row of counts, `[n]`; 0 without ratings."""
        stars = jnp.arange(1, self.levels + 1, dtype=counts.dtype)
        return counts @ stars / jnp.maximum(jnp.sum(counts, axis=1), 1.0)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Numbers of which only bounds are known, such as rounded ones: the value plus normal noise is between them.

    The parameter `[1]` is the logarithm of the noise's standard deviation, standardised.
    """

    mean = (math.log(0.3),)
    scale = (1.0,)

    def log_density(self, latent: Array, parameters: Array, told: Told) -> Array:
        """Log probability of each interval, `[n]`.

        Args:
          latent: `[n]`; a value is `centre + spread * latent`.
          parameters: `[1]`.
          told: rows are lower and upper bounds `[n, 2]`. A bound may be infinite; with both a row says nothing.
        """
        lower, upper = ((told.rows - told.centre) / told.spread).T
        noise = jnp.exp(parameters[0])
        below, above = jnp.isneginf(lower), jnp.isposinf(upper)
        # Infinite bounds are replaced before they are used, so that no derivative is 0 times infinity.
        low = (jnp.where(below, 0.0, lower) - latent) / noise
        high = (jnp.where(above, 0.0, upper) - latent) / noise
        closed = below | above
        width = jnp.where(closed, 1.0, jnp.where(closed, 0.0, upper) - jnp.where(closed, 0.0, lower)) / noise
        single = log_probit(jnp.where(below, high, -low))
        return jnp.where(closed, jnp.where(below & above, 0.0, single), log_interval(0.5 * (low + high), width))


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """How often one mixture was better than another: the latent value is the difference of their values.

    Each comparison adds normal noise to both (Chu & Ghahramani 2005, "Preference learning with Gaussian processes",
    equation 2). The parameter `[1]` is the logarithm of its standard deviation, standardised. A tie is half a win
    and half a loss.
    """

    mean = (math.log(0.5),)
    scale = (0.5,)

    def log_density(self, latent: Array, parameters: Array, told: Told) -> Array:
        """Log probability of the comparisons of each row, `[n]`; 0 without any.

        Args:
          latent: `[n]`, standardised; a difference has no centre.
          parameters: `[1]`.
          told: rows are numbers of wins and losses, `[n, 2]`.
        """
        z = latent * jnp.exp(-parameters[0]) * math.sqrt(0.5)
        wins, losses = log_probit(jnp.stack([z, -z]))
        return told.rows[:, 0] * wins + told.rows[:, 1] * losses


def accuracy(correct: float, total: float) -> tuple[float, float]:
    """Share of correct answers and its standard error, both after two more successes and two more failures.

    So the error is not 0 where none or all were correct (Agresti & Coull, The American Statistician 1998).

    Raises:
      FeedbackError: the numbers are no counts.
    """
    if not (_is_finite(correct) and _is_finite(total)) or not 0 <= correct <= total or total < 1:
        raise FeedbackError(f"{correct!r} correct of {total!r} is no accuracy; it must be 0 to m of m answers, m >= 1.")
    share = (correct + 2) / (total + 4)
    return share, math.sqrt(share * (1 - share) / (total + 4))


def ratings_to_row(stars: Sequence[int], levels: int) -> np.ndarray:
    """Counts of each level, float64 `[levels]`, of the ratings of one trial.

    Raises:
      FeedbackError: there are none, or one is no whole number from 1 to `levels`.
    """
    numbers = list(stars)
    for star in numbers:
        if not _is_finite(star) or star != int(star) or not 1 <= star <= levels:
            raise FeedbackError(f"A rating is {star!r}; it must be a whole number of stars from 1 to {levels}.")
    if not numbers:
        raise FeedbackError("A trial has no ratings; it needs at least one.")
    return np.bincount([int(star) - 1 for star in numbers], minlength=levels).astype(np.float64)


def mean_rating(stars: Sequence[int], levels: int) -> tuple[float, float]:
    """Mean of the ratings of one trial and its standard error, for a model of normal feedback; right from 20 on.

    The variance of a rating is estimated with one more deviation of one star, so that few equal ratings do not look
    exact; rounding to stars adds 1/12.

    Raises:
      FeedbackError: as `ratings_to_row`.
    """
    counts = ratings_to_row(stars, levels)
    total, places = counts.sum(), np.arange(1, levels + 1)
    mean = counts @ places / total
    variance = (counts @ (places - mean) ** 2 + 1) / total
    return float(mean), math.sqrt((variance + 1 / 12) / total)


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        return False
