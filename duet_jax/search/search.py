"""The outer search: tell it mixtures and their feedback, ask it for the next mixture."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.search import simplex
from duet_jax.search.acquisition import beta_at
from duet_jax.search.observations import Observations
from duet_jax.search.program import Program, Proposal
from duet_jax.search.surrogate import Posterior

# Rows of the buffers of queries and (at first) of pending mixtures, and how much a full buffer grows.
QUERIES, PENDING, GROWTH = 64, 8, 4


class Diagnostics(NamedTuple):
    """A `Proposal` without its mixture, as Python numbers; origin is "initial" or the acquisition's name."""

    mean: float
    stderr: float
    acquisition: float
    gap: float
    noise: float
    lengthscale: float
    amplitude: float
    origin: str


@dataclasses.dataclass(frozen=True)
class Search(Program):
    """Bayesian optimisation of a mixture from few, noisy scores (DUET, arXiv 2502.00270, Algorithm 1).

    A Gaussian process over the Hellinger map of mixtures, and an acquisition. These methods take and give NumPy,
    check what they are given, and run in float64 on the host CPU in a local scope: no global setting of JAX is
    touched. Full buffers grow by `GROWTH`, and then the step is compiled anew. `start`, `insert` and `propose`, of
    `Program`, are what they are made of, for use inside jit, vmap and scan.

    Where we differ from the paper: the first mixtures are a space-filling design that begins with the uniform one;
    the kernel is Matern 5/2 on square roots of shares, with hyperparameters from their posterior mode.
    """

    def init(self) -> Observations:
        """No observations."""
        with _host():
            return self.start()

    def tell(self, state: Observations, mixture: object, value: Any, stderr: Any = None) -> Observations:
        """Adds an observation.

        Args:
          state: of `init`, `tell` or `step`.
          mixture: `[d]` shares.
          value: feedback of the search's kind; by default a number, higher is better.
          stderr: its standard error where it is known and independent of the other observations'.

        Raises:
          ValueError: the mixture is no point of the simplex.
          FeedbackError: the feedback is not of its kind.
        """
        row = self._row(mixture, value, stderr)
        with _host():
            return _insert(self, self._room(state), *row)

    def ask(self, state: Observations, *, key: Array, pending: object = None) -> tuple[np.ndarray, Diagnostics]:
        """Proposes a mixture, float64 `[d]` that sums to 1, and what the surrogate expects of it.

        Args:
          state: what is known.
          key: a typed PRNG key; the same key proposes the same mixture.
          pending: `[p, d]` mixtures whose feedback has not come; the proposal keeps away from them.
        """
        with _host():
            _, proposal = _step(self, state, self._nothing(), *self._pending(pending), _local(key), self._rule(state))
            return self._finish(proposal)

    def ask_batch(
        self, state: Observations, count: int, *, key: Array, pending: object = None
    ) -> tuple[np.ndarray, list[Diagnostics]]:
        """Proposes `count` mixtures `[count, d]` to be tried at the same time, each away from those before it."""
        waiting = self._rows([] if pending is None else pending)
        mixtures: list[np.ndarray] = []
        diagnostics: list[Diagnostics] = []
        for number in range(count):
            known = np.concatenate([waiting, np.reshape(mixtures, (number, self.num_domains))])
            mixture, about = self.ask(state, key=jax.random.fold_in(key, number), pending=known)
            mixtures.append(mixture)
            diagnostics.append(about)
        return np.reshape(mixtures, (count, self.num_domains)), diagnostics

    def step(
        self,
        state: Observations,
        mixture: object,
        value: Any,
        stderr: Any = None,
        *,
        key: Array,
        pending: object = None,
    ) -> tuple[Observations, np.ndarray, Diagnostics]:
        """`tell`, then `ask`, in one compiled program."""
        row = self._row(mixture, value, stderr)
        with _host():
            state = self._room(state)
            state, proposal = _step(
                self, state, (*row, True), *self._pending(pending), _local(key), self._rule(state, row)
            )
            return state, *self._finish(proposal)

    def best(self, state: Observations) -> tuple[np.ndarray, float, float]:
        """The observed mixture of highest posterior mean, that mean, and its standard deviation.

        Raises:
          ValueError: nothing has been observed.
        """
        count = self._count(state)
        mixtures = np.asarray(state.mixtures)[:count]
        mean, stderr = self.predict(state, mixtures)
        top = int(np.argmax(mean))
        return mixtures[top], float(mean[top]), float(stderr[top])

    def recommend(self, state: Observations) -> tuple[np.ndarray, float, float]:
        """The allowed mixture of highest posterior mean, tried or not, that mean, and its standard deviation.

        Raises:
          ValueError: nothing has been observed.
        """
        self._count(state)
        greedy = dataclasses.replace(self, acquisition="ucb")
        with _host():
            rule = (jnp.asarray(0.0), jnp.asarray(0))
            _, proposal = _step(greedy, state, self._nothing(), *self._pending(None), jax.random.key(0), rule)
            mixture, about = self._finish(proposal)
        return mixture, about.mean, about.stderr

    def predict(self, state: Observations, mixtures: object) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of the noise-free value, each float64 `[n]`, for `[n, d]` mixtures."""
        rows = self._rows(mixtures)
        count = len(rows)
        padded = np.full((-(-count // QUERIES) * QUERIES, self.num_domains), 1 / self.num_domains)
        padded[:count] = rows
        mean, stderr = np.empty(len(padded)), np.empty(len(padded))
        with _host():
            posteriors = _fitted(self, state)
            for at in range(0, len(padded), QUERIES):
                part = slice(at, at + QUERIES)
                mean[part], stderr[part] = _expect(self, posteriors, jnp.asarray(padded[part]))
        return mean[:count], stderr[:count]

    def _count(self, state: Observations) -> int:
        count = int(np.sum(state.mask))
        if count == 0:
            raise ValueError("There is no best mixture before the first feedback.")
        return count

    def _row(self, mixture: object, value: Any, stderr: Any) -> tuple[np.ndarray, Any]:
        return simplex.check_mixture(mixture, self.num_domains), self.feedback.row(value, stderr, self.num_domains)

    def _nothing(self) -> tuple:
        return np.zeros(self.num_domains), self.feedback.blank(self.num_domains), False

    def _rows(self, mixtures: object) -> np.ndarray:
        # As objects, so that rows of different lengths come as far as the check of each.
        rows = np.atleast_1d(np.asarray(mixtures, object))
        checked = [simplex.check_mixture(row, self.num_domains) for row in rows]
        return np.reshape(checked, (len(checked), self.num_domains))

    def _room(self, state: Observations) -> Observations:
        """The same observations in buffers with at least one free row."""
        if not bool(np.asarray(state.mask)[-1]):
            return state

        def grow(x: Array) -> Array:
            old = np.asarray(x)
            return jnp.asarray(np.concatenate([old, np.zeros(((GROWTH - 1) * len(old), *old.shape[1:]), old.dtype)]))

        return jax.tree.map(grow, state)

    def _pending(self, pending: object) -> tuple[np.ndarray, np.ndarray]:
        """Pending mixtures in a buffer that doubles when full, and which of its rows are in use."""
        rows = self._rows([] if pending is None else pending)
        room = PENDING
        while room < len(rows):
            room *= 2
        padded = np.zeros((room, self.num_domains))
        padded[: len(rows)] = rows
        return padded, np.arange(room) < len(rows)

    def _rule(self, state: Observations, row: object = None) -> tuple[Array, Array]:
        """Beta and the size of the initial design as arguments, so that `recommend` shares the compiled program."""
        count = int(np.sum(state.mask)) + (row is not None)
        return jnp.asarray(beta_at(self.schedule, self.beta, jnp.asarray(float(count)))), jnp.asarray(self.initial)

    def _finish(self, proposal: Proposal) -> tuple[np.ndarray, Diagnostics]:
        proposal = jax.device_get(proposal)
        origin = "initial" if proposal.initial else self.acquisition
        numbers = {name: float(getattr(proposal, name)) for name in Diagnostics._fields if name != "origin"}
        mixture = simplex.renormalise(np.array(proposal.mixture, np.float64))
        return mixture, Diagnostics(**numbers, origin=origin)


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
    search: Search, state: Observations, row: tuple, pending: Array, pending_mask: Array, key: Array, rule: tuple
) -> tuple[Observations, Proposal]:
    state = search.insert(state, *row)
    return state, search.propose(
        state, key=key, pending=pending, pending_mask=pending_mask, beta=rule[0], initial=rule[1]
    )


@partial(jax.jit, static_argnums=0)
def _insert(search: Search, state: Observations, mixture: Array, feedback: Any) -> Observations:
    return search.insert(state, mixture, feedback)


@partial(jax.jit, static_argnums=0)
def _fitted(search: Search, state: Observations) -> list[Posterior]:
    return search.fitted(state, jnp.zeros((0, search.num_domains)), jnp.zeros(0, bool))


@partial(jax.jit, static_argnums=0)
def _expect(search: Search, posteriors: list[Posterior], mixtures: Array) -> tuple[Array, Array]:
    mean, deviation = search.moments(posteriors, simplex.hellinger(mixtures))
    if len(posteriors) > 1:
        return mean, deviation
    return posteriors[0].centre + posteriors[0].spread * mean, posteriors[0].spread * deviation
