"""What is observed of a mixture: kinds of feedback, how each is checked and kept, and how the surrogate reads it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.errors import FeedbackError
from duet_jax.search import likelihoods, replicates
from duet_jax.search.kernel import Inputs
from duet_jax.search.simplex import check_mixture, hellinger
from duet_jax.search.surrogate import Likelihood, Problem, Surrogate, standardise


class Observations(NamedTuple):
    """What has been told, in buffers of `capacity` rows.

    Attributes:
      mixtures: `[capacity, d]`, float64 in a search on the host.
      settings: `[capacity, e]`, coordinates of the training configuration that is searched jointly; e may be 0.
      feedback: arrays `[capacity, ...]`, as the kind of feedback makes them.
      mask: bool `[capacity]`, True for rows in use; these come first.
    """

    mixtures: Array
    settings: Array
    feedback: Any
    mask: Array


class Kind(Protocol):
    """A kind of feedback. Hashable: it is part of a static argument of compiled programs."""

    @property
    def weights(self) -> tuple[float, ...]:
        """How much the standardised values of each task count; one for most kinds."""

    @property
    def likelihood(self) -> Likelihood | None:
        """None where feedback is a number with normal noise."""

    def row(self, value: Any, stderr: Any, size: int) -> Any:
        """One row as a pytree of NumPy arrays, of `size` domains; FeedbackError where the value is none."""

    def blank(self, size: int) -> Any:
        """A row that says nothing."""

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        """The observations of one task as the surrogate fits them."""


class Score(NamedTuple):
    """Values `[n, tasks]` and their known standard errors, 0 where none is known."""

    values: Any
    stderrs: Any


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers, higher is better, with normal noise: of unknown size, and known errors where they are told.

    With several weights a trial is scored by as many tasks. Each task is standardised and has its own surrogate, so
    that no task's units swamp the others'; the search maximises the weighted sum.

    Attributes:
      weights: one a task, not negative.
    """

    weights: tuple[float, ...] = (1.0,)
    likelihood = None

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 0 or not sum(self.weights) > 0:
            raise ValueError(f"weights are {self.weights}; they must not be negative, and one must be above 0.")

    def row(self, value: Any, stderr: Any, size: int) -> Score:
        del size
        tasks = len(self.weights)
        values, stderrs = _numbers(value, tasks), _numbers(0.0 if stderr is None else stderr, tasks)
        if values is None or (tasks > 1 and np.ndim(value) == 0):
            wanted = "a finite number" if tasks == 1 else f"{tasks} finite numbers"
            raise FeedbackError(f"The feedback is {value!r}; it must be {wanted}, higher is better.")
        if stderrs is None or np.any(stderrs < 0):
            raise FeedbackError(f"The standard error is {stderr!r}; it must be finite and not negative.")
        return Score(values, stderrs)

    def blank(self, size: int) -> Score:
        del size
        return Score(np.zeros(len(self.weights)), np.zeros(len(self.weights)))

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        values, centre, spread = standardise(seen.feedback.values[:, task], seen.mask)
        variances = (seen.feedback.stderrs[:, task] / spread) ** 2
        return Problem(_inputs(surrogate, seen), values, variances, centre, spread)


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Scores of several models trained on one mixture, of which the best counts (DUET, section 3.2).

    All scores are told, as a list. The best one's error of the mean is taken away, and its variance is known, from
    the rate of the errors of all trials so far: see `replicates`.

    Attributes:
      cutoff: the largest error that there is, in units of the score; infinite if there is none.
    """

    cutoff: float = math.inf
    weights = (1.0,)
    likelihood = None

    def row(self, value: Any, stderr: Any, size: int) -> replicates.Replicates:
        del size
        _no_stderr(stderr)
        try:
            scores = replicates.check_scores(value, self.cutoff)
        except ValueError as error:
            raise FeedbackError(str(error)) from None
        best = scores.max()
        return replicates.Replicates(*np.array([best, scores.size, (best - scores).sum(), np.ptp(scores)]))

    def blank(self, size: int) -> replicates.Replicates:
        del size
        return replicates.Replicates(*np.zeros(4))

    def rate(self, seen: Observations) -> Array:
        """Rate of the errors of all scores so far, in 1 / units of the score."""
        _, _, spread = standardise(seen.feedback.best, seen.mask)
        # Before any trial has two scores, errors are guessed at a quarter of the differences between mixtures.
        return replicates.fit_rate(seen.feedback, self.cutoff, 4.0 / spread)

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        best, variances = replicates.debias(seen.feedback, self.rate(seen), self.cutoff)
        values, centre, spread = standardise(best, seen.mask)
        return Problem(_inputs(surrogate, seen), values, variances / spread**2, centre, spread)


@dataclasses.dataclass(frozen=True)
class Stars:
    """Ratings of a trial's model in whole stars from 1 to `levels`, told as a list (ordered probit).

    Attributes:
      levels: number of stars there are; 2 for thumbs, or for wrong and right.
      learned: whether the thresholds between stars are learned, or stay halfway.
    """

    levels: int = 5
    learned: bool = True
    weights = (1.0,)

    @property
    def likelihood(self) -> likelihoods.Ratings:
        return likelihoods.Ratings(self.levels, self.learned)

    def row(self, value: Any, stderr: Any, size: int) -> np.ndarray:
        del size
        _no_stderr(stderr)
        if np.ndim(value) != 1:
            raise FeedbackError(f"The feedback is {value!r}; it must be a list of ratings from 1 to {self.levels}.")
        return likelihoods.ratings_to_row(value, self.levels)

    def blank(self, size: int) -> np.ndarray:
        del size
        return np.zeros(self.levels)

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        values, centre, spread = standardise(self.likelihood.guess(seen.feedback), seen.mask)
        # Latent values are in stars: few ratings, all equal, must not stretch a hair's breadth to the whole scale.
        least = 0.1
        values, spread = values * jnp.minimum(1.0, spread / least), jnp.maximum(spread, least)
        return Problem(_inputs(surrogate, seen), values, jnp.zeros_like(values), centre, spread, seen.feedback)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Numbers rounded to a grid, or known to lie between two bounds (interval-censored).

    A number is told as it is, and stands for half a `step` on both sides; a pair is told as its bounds, of which one
    may be infinite.

    Attributes:
      step: of the grid, above 0.
    """

    step: float
    weights = (1.0,)
    likelihood = likelihoods.Intervals()

    def row(self, value: Any, stderr: Any, size: int) -> np.ndarray:
        del size
        _no_stderr(stderr)
        bounds = np.full(2, np.nan)
        if np.ndim(value) == 0 and (number := _numbers(value, 1)) is not None:
            bounds = number + np.array([-0.5, 0.5]) * self.step
        elif np.shape(value) == (2,):
            bounds = np.asarray(value, np.float64)
        if not bounds[0] < bounds[1] or np.isinf(bounds).all():
            raise FeedbackError(f"The feedback is {value!r}; it must be a finite number or two bounds in order.")
        return bounds

    def blank(self, size: int) -> np.ndarray:
        del size
        return np.array([-np.inf, np.inf])

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        lower, upper = seen.feedback.T
        middle = jnp.where(jnp.isinf(lower), upper, jnp.where(jnp.isinf(upper), lower, 0.5 * (lower + upper)))
        middle = jnp.where(seen.mask, middle, 0.0)
        values, centre, spread = standardise(middle, seen.mask)
        values, spread = values * jnp.minimum(1.0, spread / self.step), jnp.maximum(spread, self.step)
        rows = jnp.where(seen.mask[:, None], seen.feedback, jnp.array([-jnp.inf, jnp.inf], seen.feedback.dtype))
        return Problem(_inputs(surrogate, seen), values, jnp.zeros_like(values), centre, spread, rows)


class Comparison(NamedTuple):
    """Mixtures `[n, d]` that were compared with, and `[n, 2]` how often the trial's model won and lost."""

    reference: Any
    counts: Any


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """How often the trial's model was better than that of another mixture: `(mixture, wins, losses)`.

    The search knows values up to a constant only; they are in units of a comparison's noise, roughly.
    """

    weights = (1.0,)
    likelihood = likelihoods.Comparisons()

    def row(self, value: Any, stderr: Any, size: int) -> Comparison:
        _no_stderr(stderr)
        try:
            reference, wins, losses = value
        except (TypeError, ValueError):
            raise FeedbackError(f"The feedback is {value!r}; it must be (mixture, wins, losses).") from None
        counts = _numbers([wins, losses], 2)
        if counts is None or np.any(counts < 0) or not counts.sum() > 0:
            raise FeedbackError(f"There are {wins!r} wins and {losses!r} losses; neither may be negative, nor both 0.")
        return Comparison(check_mixture(reference, size), counts)

    def blank(self, size: int) -> Comparison:
        return Comparison(np.full(size, 1 / size), np.zeros(2))

    def problem(self, surrogate: Surrogate, seen: Observations, task: int) -> Problem:
        against = surrogate.inputs(_points(seen.feedback.reference, seen.settings), seen.mask)
        inputs = _inputs(surrogate, seen)._replace(against=against)
        counts = seen.feedback.counts
        lead = (counts[:, 0] - counts[:, 1]) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)
        return Problem(inputs, lead, jnp.zeros_like(lead), jnp.zeros_like(lead[0]), jnp.ones_like(lead[0]), counts)


def _points(mixtures: Array, settings: Array) -> Array:
    return jnp.concatenate([hellinger(mixtures), settings], axis=1)


def _inputs(surrogate: Surrogate, seen: Observations) -> Inputs:
    return surrogate.inputs(_points(seen.mixtures, seen.settings), seen.mask)


def _numbers(value: Any, count: int) -> np.ndarray | None:
    """Finite numbers `[count]`, one number standing for all; None where they are none."""
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), (count,))
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if np.all(np.isfinite(numbers)) else None


def _no_stderr(stderr: Any) -> None:
    if stderr is not None:
        raise FeedbackError(f"The standard error is {stderr!r}; this kind of feedback has none, its noise is learned.")
