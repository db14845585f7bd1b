"""The outer search: tell it mixtures and their feedback, ask it for the next mixture."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.errors import FeedbackError
from duet_jax.search import acquisition, simplex
from duet_jax.search.surrogate import Observations, Posterior, condition, fit, moments

# Rows of the buffers of queries and (at first) of pending mixtures, and the number of random candidates.
QUERIES, PENDING, RANDOM = 64, 8, 512


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
      floor: proposed shares below it are set to 0 and the rest renormalised; at most 1 / d.
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
        nothing = (np.zeros(self.num_domains), 0.0, 0.0, False)
        with _host():
            _, *proposal = _step(self, state, nothing, *self._pending(pending), _local(key))
            return self._finish(*proposal)

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
        rows = self._rows(mixtures)
        count = len(rows)
        padded = np.full((-(-count // QUERIES) * QUERIES, self.num_domains), 1 / self.num_domains)
        padded[:count] = rows
        mean, stderr = np.empty(len(padded)), np.empty(len(padded))
        with _host():
            posterior = _fitted(state)
            for at in range(0, len(padded), QUERIES):
                part = slice(at, at + QUERIES)
                mean[part], stderr[part] = _expect(posterior, jnp.asarray(padded[part]))
        return mean[:count], stderr[:count]

    def _row(self, mixture: object, value: float, stderr: float | None) -> tuple[np.ndarray, float, float, bool]:
        shares = simplex.check_mixture(mixture, self.num_domains)
        if not _is_finite(value):
            raise FeedbackError(f"The feedback is {value!r}; it must be a finite number, higher is better.")
        if stderr is not None and not (_is_finite(stderr) and stderr >= 0):
            raise FeedbackError(f"The standard error is {stderr!r}; it must be finite and not negative.")
        return shares, float(value), float(stderr or 0.0), True

    def _rows(self, mixtures: object) -> np.ndarray:
        # As objects, so that rows of different lengths come as far as the check of each.
        rows = np.atleast_1d(np.asarray(mixtures, object))
        checked = [simplex.check_mixture(row, self.num_domains) for row in rows]
        return np.reshape(checked, (len(checked), self.num_domains))

    def _room(self, state: Observations) -> Observations:
        """The same observations in buffers with at least one free row."""
        if not bool(np.asarray(state.mask)[-1]):
            return state
        grown = [np.concatenate([np.asarray(x), np.zeros_like(np.asarray(x))]) for x in state]
        return Observations(*map(jnp.asarray, grown))

    def _pending(self, pending: object) -> tuple[np.ndarray, np.ndarray]:
        """Pending mixtures in a buffer that doubles when full, and which of its rows are in use."""
        rows = self._rows([] if pending is None else pending)
        room = PENDING
        while room < len(rows):
            room *= 2
        padded = np.zeros((room, self.num_domains))
        padded[: len(rows)] = rows
        return padded, np.arange(room) < len(rows)

    def _finish(self, mixture: Array, summary: Array) -> tuple[np.ndarray, Diagnostics]:
        mean, stderr, bound, noise, lengthscale, amplitude, initial = np.asarray(summary).tolist()
        origin = "initial" if initial else "ucb"
        diagnostics = Diagnostics(mean, stderr, bound, noise, lengthscale, amplitude, origin)
        return simplex.renormalise(np.asarray(mixture, np.float64)), diagnostics

    def _propose(self, state: Observations, pending: Array, pending_mask: Array, key: Array) -> tuple[Array, Array]:
        key_draws, key_maximise = jax.random.split(key)
        hyperparameters = fit(state)
        posterior = condition(hyperparameters, state, pending, pending_mask)
        draws = simplex.draws(key_draws, RANDOM, self.num_domains)
        mixture, initial = jax.lax.cond(
            jnp.sum(state.mask) + jnp.sum(pending_mask) < self.initial,
            lambda: (self._design(posterior.points, draws), 1.0),
            lambda: (acquisition.maximise(posterior, draws, self.beta, self.floor, key=key_maximise), 0.0),
        )
        mean, deviation = moments(posterior, simplex.hellinger(mixture)[None])
        mean, deviation = mean[0], deviation[0]
        spread = posterior.spread
        summary = jnp.stack(
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
        return mixture, summary

    def _design(self, points: tuple[Array, Array], draws: Array) -> Array:
        """The uniform mixture first, then the random mixture farthest from all there are."""
        taken, mask = points
        uniform = jnp.full(self.num_domains, 1 / self.num_domains)
        candidates = simplex.apply_floor(draws, self.floor)
        apart = jnp.linalg.norm(simplex.hellinger(candidates)[:, None] - taken[None], axis=-1)
        nearest = jnp.min(jnp.where(mask[None] > 0, apart, jnp.inf), axis=1)
        return jnp.where(jnp.any(mask > 0), candidates[jnp.argmax(nearest)], uniform)


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except (TypeError, OverflowError):
        return False


@contextlib.contextmanager
def _host() -> Iterator[None]:
    """float64 on the CPU of this process, for the calls inside and nothing else."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _local(key: Array) -> Array:
    """The key on the host, wherever it was made."""
    implementation = jax.random.key_impl(key)
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))), impl=implementation)


# Compiled once for all equal searches: a search is a static argument. A row whose last entry is False leaves the
# observations as they are, so that asking and stepping are one program.
@partial(jax.jit, static_argnums=0)
def _step(
    search: Search, state: Observations, row: tuple, pending: Array, pending_mask: Array, key: Array
) -> tuple[Observations, Array, Array]:
    state = _insert(state, *row)
    return state, *search._propose(state, pending, pending_mask, key)


@jax.jit
def _fitted(state: Observations) -> Posterior:
    nothing = jnp.zeros((0, state.mixtures.shape[1])), jnp.zeros(0, bool)
    return condition(fit(state), state, *nothing)


@jax.jit
def _expect(posterior: Posterior, mixtures: Array) -> tuple[Array, Array]:
    mean, deviation = moments(posterior, simplex.hellinger(mixtures))
    return posterior.centre + posterior.spread * mean, posterior.spread * deviation


def _insert(state: Observations, mixture: Array, value: Array, stderr: Array, present: Array) -> Observations:
    at = jnp.sum(state.mask)
    new = (mixture, value, stderr, present)
    # There is no free row in a full buffer when nothing is inserted; "drop" then writes nothing.
    return Observations(*(old.at[at].set(x, mode="drop") for old, x in zip(state, new, strict=True)))


_append = jax.jit(_insert)
