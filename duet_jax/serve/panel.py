"""What ratings say about trials when raters differ: ordered probit with an effect of each rater.

A rating is the trial's value plus what is peculiar to its rater plus noise, rounded to stars: thresholds are halfway
between the stars. Values are in stars, those of an average rater. Effects and noise are normal.

The mode is found by Fisher scoring, which couples raters only through trials, so that a step costs raters times trials
squared. Both standard deviations come from expectation and maximisation around it (Dempster et al. 1977), each with a
prior that weighs as much as a few votes. Votes of unknown raters are each of a rater of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import erfc

from duet_jax.serve.ratings import Vote

# Priors: standard deviation of the noise and of the raters' effects, in stars, and what they weigh in votes and raters.
NOISE, VOTES = 0.7, 4.0
EFFECT, RATERS = 0.4, 2.0
# How far from the middle of the scale values are expected, in widths of it.
WIDTH = 1.0
# Where all raters are unknown only the priors tell the two deviations apart: they still creep after so many steps,
# when the values have long settled, to a small part of their standard errors.
STEPS, TOLERANCE = 200, 1e-5
LEAST = 1e-300
SURE = 1.96
MOST_NEEDED = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """What is believed of the trials and the raters of some votes.

    Attributes:
      trials: numbers of the trials that were rated, ascending.
      value: float64 `[trials]`, stars that an average rater would give, before rounding.
      covariance: float64 `[trials, trials]`, of their errors.
      raters: those that are known.
      bias: float64 `[raters]`, how many stars more than an average rater each gives.
      noise, spread: standard deviations of a rating's noise and of the raters' effects, in stars.
    """

    trials: tuple[int, ...]
    value: np.ndarray
    covariance: np.ndarray
    raters: tuple[str, ...]
    bias: np.ndarray
    noise: float
    spread: float

    def of(self, trial: int) -> tuple[float, float]:
        """Value and standard error of a trial."""
        place = self.trials.index(trial)
        return float(self.value[place]), math.sqrt(self.covariance[place, place])

    def own_error(self, trial: int, count: int) -> float:
        """Standard error of a trial's value less what its error has in common with the other trials'.

        That raters are mild or strict on the whole moves all trials alike and does not blur their comparison. What is
        left is at least the noise of the trial's `count` ratings.
        """
        place = self.trials.index(trial)
        others = np.delete(self.covariance[place], place)
        shared = others.mean() if others.size else 0.0
        return math.sqrt(max(self.covariance[place, place] - shared, self.noise**2 / count))

    def needed(self, one: int, other: int, growing: Sequence[int]) -> int | None:
        """Further ratings of each growing trial until two trials are told apart, if they differ as they seem to.

        Told apart means that the difference of their values is `SURE` standard errors. Each rating counts as that of a
        new rater. None where no number below `MOST_NEEDED` is enough.
        """
        a, b = self.trials.index(one), self.trials.index(other)
        difference = abs(float(self.value[a] - self.value[b]))
        each = self.noise**2 + self.spread**2 + 1 / 12
        variances = [(self.covariance[i, i], trial in growing) for i, trial in ((a, one), (b, other))]
        shared = 2 * float(self.covariance[a, b])

        def enough(more: int) -> bool:
            total = sum(1 / (1 / variance + more * grows / each) for variance, grows in variances)
            # What raters of both share is no error of the difference; of new raters nothing is.
            now = sum(variance for variance, _ in variances)
            return total * max(now - shared, 0.0) / now * SURE**2 <= difference**2

        if not enough(MOST_NEEDED):
            return None
        low, high = -1, MOST_NEEDED
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def estimate(votes: Sequence[Vote], stars: int) -> Panel:
    """The panel behind some votes, at least one, in stars from 1 to `stars`."""
    trials = sorted({vote.trial for vote in votes})
    # A key is another name for the rater of a vote that has none; tuples keep the two apart.
    names = [(vote.rater,) if vote.rater is not None else (vote.trial, vote.key) for vote in votes]
    raters = {name: row for row, name in enumerate(dict.fromkeys(names))}
    trial = np.searchsorted(trials, [vote.trial for vote in votes])
    rater = np.array([raters[name] for name in names])
    star = np.array([vote.stars for vote in votes])
    found = _fit(trial, rater, star, stars, len(trials), len(raters))
    known = [(name[0], row) for name, row in raters.items() if len(name) == 1]
    bias = found.bias[[row for _, row in known]]
    return Panel(
        tuple(trials), found.value, found.covariance, tuple(str(name) for name, _ in known), bias, *found.scales
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    value: np.ndarray
    covariance: np.ndarray
    bias: np.ndarray
    scales: tuple[float, float]


def _fit(trial: np.ndarray, rater: np.ndarray, star: np.ndarray, stars: int, trials: int, raters: int) -> _Fit:
    """`trial`, `rater` and `star` of each vote, `[votes]`."""
    middle, width = 0.5 * (1 + stars), WIDTH * (stars - 1)
    value, bias = np.full(trials, middle), np.zeros(raters)
    noise, spread = NOISE, EFFECT
    for _ in range(STEPS):
        slope, information, square = _moments(value[trial] + bias[rater], noise, star, stars)
        own = np.bincount(rater, information, raters) + 1 / spread**2
        both = np.zeros((raters, trials))
        np.add.at(both, (rater, trial), information)
        shared = np.diag(np.bincount(trial, information, trials) + 1 / width**2)
        part = both / own[:, None]
        covariance = np.linalg.inv(shared - both.T @ part)
        up_bias = np.bincount(rater, slope, raters) - bias / spread**2
        up_value = np.bincount(trial, slope, trials) - (value - middle) / width**2
        move = covariance @ (up_value - part.T @ up_bias)
        turn = up_bias / own - part @ move
        # Errors of the effects, and of the sum of value and effect behind each vote.
        across = part @ covariance
        errors = 1 / own + np.sum(across * part, axis=1)
        latent = np.diag(covariance)[trial] + errors[rater] - 2 * across[rater, trial]
        # What is uncertain of the sum counts as far as the star would have told it.
        squares = square + information * noise**2 * latent
        new_noise = math.sqrt((VOTES * NOISE**2 + squares.sum()) / (VOTES + len(star)))
        new_spread = math.sqrt((RATERS * EFFECT**2 + np.sum(bias**2 + errors)) / (RATERS + raters))
        # Steps of more than a star, of which there may be some at first, could leave the scale.
        longest = max(np.abs(move).max(), np.abs(turn).max(), 1.0)
        value, bias = value + move / longest, bias + turn / longest
        change = max(np.abs(move).max(), np.abs(turn).max(), abs(new_noise - noise), abs(new_spread - spread))
        noise, spread = new_noise, new_spread
        if change < TOLERANCE:
            break
    return _Fit(value, covariance, bias, (noise, spread))


def _moments(latent: np.ndarray, noise: float, star: np.ndarray, stars: int) -> tuple[np.ndarray, ...]:
    """Of each vote's star at its latent value: slope of the log probability, information, expected squared noise."""
    # Votes of one rater on one trial are alike, and so are those of unknown raters that gave a trial as many stars.
    latent, place = np.unique(latent, return_inverse=True)
    cuts = np.concatenate([[-np.inf], np.arange(1, stars) + 0.5, [np.inf]])
    at = (cuts - latent[:, None]) / noise
    density = np.exp(-0.5 * at**2) / math.sqrt(2 * math.pi)
    below, above = (0.5 * erfc(sign * at * math.sqrt(0.5)) for sign in (-1, 1))
    # By symmetry probabilities are differences of small numbers, and not of numbers near 1.
    share = np.where(at[:, :-1] > 0, above[:, :-1] - above[:, 1:], below[:, 1:] - below[:, :-1])
    share = np.maximum(share, LEAST)
    steeper = density[:, :-1] - density[:, 1:]
    information = np.sum(steeper**2 / share, axis=1) / noise**2
    moment = np.where(np.isinf(at), 0.0, at) * density
    chosen = share[place, star - 1]
    square = noise**2 * (1 + (moment[:, :-1] - moment[:, 1:])[place, star - 1] / chosen)
    return steeper[place, star - 1] / chosen / noise, information[place], square
