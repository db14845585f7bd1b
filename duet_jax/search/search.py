"""The outer search: tell it mixtures and their feedback, ask it for the next mixture."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.errors import FeedbackError
from duet_jax.search import acquisition, simplex
from duet_jax.search.surrogate import Observations, condition, fit, moments

QUERIES = 64
PENDING = 8


class Diagnostics(NamedTuple):
    """What the surrogate thinks of a proposal, in units of the feedback.

    Attributes:
      mean, stderr: of the noise-free value of the proposed mixture.
      acquisition: its upper confidence bound.
      noise: learned standard deviation of the feedback's noise.
      lengthscale: on the Hellinger map, where vertices are sqrt 2 apart.
      amplitude: prior standard deviation of the value.
      origin: "initial" for the space-filling design, else "ucb".
    """

    mean: float
    stderr: float
    acquisition: float
    noise: float
    lengthscale: float
    amplitude: float
    origin: str


@dataclasses.dataclass(frozen=True)
class Search:
    """Bayesian optimisation of a mixture from few, noisy scores (DUET, arXiv 2502.00270, Algorithm 1).

    A Gaussian process over the Hellinger map of mixtures, and the upper confidence bound. Everything runs in
    float64 on the host CPU, in a local scope: no global setting of JAX is touched. A proposal is a pure function of
    the observations, the pending mixtures and the key.

    Where we differ from the paper: the first mixtures are a space-filling design that begins with the uniform one;
    the kernel is Matern 5/2 on square roots of shares, with hyperparameters from their posterior mode; and `beta`
    is constant.

    Attributes:
      num_domains: d, at least 2.
      capacity: rows of the first buffer; it doubles when full, and the step is compiled anew.
      beta: standard deviations that the acquisition adds to the mean.
      floor: proposed shares below it are set to 0 and the rest renormalised; less than 1 / d.
      initial: size of the space-filling design.
    """

    num_domains: int
    capacity: int = 64
    beta: float = 2.0
    floor: float = 0.0
    initial: int = 3

    def __post_init__(self) -> None:
        if self.num_domains < 2:
            raise ValueError(f"num_domains is {self.num_domains}; a mixture needs at least 2 domains.")
        if not 0 <= self.floor <= 1 / self.num_domains:
            raise ValueError(f"floor is {self.floor}; it must be from 0 to 1/num_domains.")
        if self.beta < 0 or self.initial < 1 or self.capacity < 1:
            raise ValueError(
                f"beta={self.beta} must not be negative, and initial={self.initial} and capacity={self.capacity} "
                f"must be at least 1."
            )

    def init(self) -> Observations:
        """No observations."""
        with _host():
            return Observations(
                jnp.zeros((self.capacity, self.num_domains)),
                jnp.zeros(self.capacity),
                jnp.zeros(self.capacity),
                jnp.zeros(self.capacity, bool),
            )

    def tell(self, state: Observations, mixture: object, value: float, stderr: float | None = None) -> Observations:
        """Adds an observation.

        Args:
          state: of `init`, `tell` or `step`.
          mixture: `[d]` shares.
          value: feedback, higher is better.
          stderr: its standard error where it is known and independent of the other observations'.

        Raises:
          ValueError: the mixture is no point of the simplex.
          FeedbackError: the value is not finite, or the error is negative.
        """
        row = self._row(mixture, value, stderr)
        with _host():
            return _append(self._room(state), *row)

    def ask(self, state: Observations, *, key: Array, pending: object = None) -> tuple[np.ndarray, Diagnostics]:
        """Proposes a mixture, float64 `[d]` that sums to 1, and what the surrogate expects of it.

        Args:
          state: what is known.
          key: a typed PRNG key; the same key proposes the same mixture.
          pending: `[p, d]` mixtures whose feedback has not come; the proposal keeps away from them.
        """
        with _host():
            return self._finish(*_ask(self, state, *self._pending(pending), _local(key)))

    def step(
        self,
        state: Observations,
        mixture: object,
        value: float,
        stderr: float | None = None,
        *,
        key: Array,
        pending: object = None,
    ) -> tuple[Observations, np.ndarray, Diagnostics]:
        """`tell`, then `ask`, in one compiled program."""
        row = self._row(mixture, value, stderr)
        with _host():
            state, *proposal = _step(self, self._room(state), row, *self._pending(pending), _local(key))
            return state, *self._finish(*proposal)

    def best(self, state: Observations) -> tuple[np.ndarray, float, float]:
        """The observed mixture of highest posterior mean, that mean, and its standard deviation.

        Raises:
          ValueError: nothing has been observed.
        """
        count = int(np.sum(state.mask))
        if count == 0:
            raise ValueError("There is no best mixture before the first feedback.")
        mixtures = np.asarray(state.mixtures)[:count]
        mean, stderr = self.predict(state, mixtures)
        top = int(np.argmax(mean))
        return mixtures[top], float(mean[top]), float(stderr[top])

    def predict(self, state: Observations, mixtures: object) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of the noise-free value, each float64 `[n]`, for `[n, d]` mixtures."""
        rows = [simplex.check_mixture(row, self.num_domains) for row in np.atleast_2d(np.asarray(mixtures))]
        count = len(rows)
        padded = np.full((-(-count // QUERIES) * QUERIES, self.num_domains), 1 / self.num_domains)
        padded[:count] = rows
        with _host():
            mean, deviation = _predict(state, jnp.asarray(padded))
            return np.asarray(mean)[:count], np.asarray(deviation)[:count]

    def _row(self, mixture: object, value: float, stderr: float | None) -> tuple[np.ndarray, float, float]:
        shares = simplex.check_mixture(mixture, self.num_domains)
        if not math.isfinite(value):
            raise FeedbackError(f"The feedback is {value}; it must be a finite number, higher is better.")
        if stderr is not None and not (math.isfinite(stderr) and stderr >= 0):
            raise FeedbackError(f"The standard error is {stderr}; it must be finite and not negative.")
        return shares, float(value), float(stderr or 0.0)

    def _room(self, state: Observations) -> Observations:
        """The same observations in buffers with at least one free row."""
        if not bool(np.asarray(state.mask)[-1]):
            return state
        grown = [np.concatenate([np.asarray(x), np.zeros_like(np.asarray(x))]) for x in state]
        return Observations(*map(jnp.asarray, grown))

    def _pending(self, pending: object) -> tuple[Array, Array]:
        rows = [] if pending is None else list(np.asarray(pending, np.float64))
        room = -(-max(len(rows), 1) // PENDING) * PENDING
        padded = np.zeros((room, self.num_domains))
        for i, row in enumerate(rows):
            padded[i] = simplex.check_mixture(row, self.num_domains)
        return jnp.asarray(padded), jnp.asarray(np.arange(room) < len(rows))

    def _finish(self, mixture: Array, numbers: Array) -> tuple[np.ndarray, Diagnostics]:
        shares = np.asarray(mixture, np.float64)
        mean, stderr, bound, noise, lengthscale, amplitude, initial = np.asarray(numbers).tolist()
        origin = "initial" if initial else "ucb"
        return shares / shares.sum(), Diagnostics(mean, stderr, bound, noise, lengthscale, amplitude, origin)

    def _proposal(self, state: Observations, pending: Array, pending_mask: Array, key: Array) -> tuple[Array, Array]:
        hyperparameters = fit(state)
        posterior = condition(hyperparameters, state, pending, pending_mask)
        mixture, initial = jax.lax.cond(
            jnp.sum(state.mask) + jnp.sum(pending_mask) < self.initial,
            lambda: (self._design(posterior.points, key), 1.0),
            lambda: (acquisition.maximise(posterior, self.beta, self.floor, key=key), 0.0),
        )
        mean, deviation = moments(posterior, simplex.hellinger(mixture)[None])
        mean, deviation = mean[0], deviation[0]
        spread = posterior.spread
        numbers = jnp.stack(
            [
                posterior.centre + spread * mean,
                spread * deviation,
                posterior.centre + spread * (mean + self.beta * deviation),
                spread * jnp.exp(0.5 * hyperparameters.log_noise),
                jnp.exp(hyperparameters.log_lengthscale),
                spread * jnp.exp(0.5 * hyperparameters.log_signal),
                initial,
            ]
        )
        return mixture, numbers

    def _design(self, points: tuple[Array, Array], key: Array) -> Array:
        """The uniform mixture first, then the random mixture farthest from all there are."""
        taken, mask = points
        uniform = jnp.full(self.num_domains, 1 / self.num_domains)
        draws = simplex.draws(key, acquisition.RANDOM, self.num_domains)
        candidates = simplex.apply_floor(draws, self.floor)
        apart = jnp.linalg.norm(simplex.hellinger(candidates)[:, None] - taken[None], axis=-1)
        nearest = jnp.min(jnp.where(mask[None] > 0, apart, jnp.inf), axis=1)
        return jnp.where(jnp.any(mask > 0), candidates[jnp.argmax(nearest)], uniform)


@contextlib.contextmanager
def _host() -> Iterator[None]:
    """float64 on the host CPU, for the calls inside and nothing else."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _local(key: Array) -> Array:
    """The key on the host, wherever it was made."""
    implementation = jax.random.key_impl(key)
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))), impl=implementation)


# Compiled once for all equal searches: a search is a static argument.


@partial(jax.jit, static_argnums=0)
def _ask(search: Search, state: Observations, pending: Array, mask: Array, key: Array) -> tuple[Array, Array]:
    return search._proposal(state, pending, mask, key)


@partial(jax.jit, static_argnums=0)
def _step(
    search: Search, state: Observations, row: tuple, pending: Array, mask: Array, key: Array
) -> tuple[Observations, Array, Array]:
    state = _insert(state, *row)
    return state, *search._proposal(state, pending, mask, key)


@jax.jit
def _predict(state: Observations, mixtures: Array) -> tuple[Array, Array]:
    nothing = jnp.zeros((0, mixtures.shape[1])), jnp.zeros(0, bool)
    posterior = condition(fit(state), state, *nothing)
    mean, deviation = moments(posterior, simplex.hellinger(mixtures))
    return posterior.centre + posterior.spread * mean, posterior.spread * deviation


def _insert(state: Observations, mixture: Array, value: Array, stderr: Array) -> Observations:
    at = jnp.sum(state.mask)
    new = (mixture, value, stderr, True)
    return Observations(*(old.at[at].set(x) for old, x in zip(state, new, strict=True)))


@jax.jit
def _append(state: Observations, mixture: Array, value: Array, stderr: Array) -> Observations:
    return _insert(state, mixture, value, stderr)
