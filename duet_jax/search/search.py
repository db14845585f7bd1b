"""The outer search: tell it mixtures and their feedback, ask it for the next mixture."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
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

Settings = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
# Rows of the buffers of queries and (at first) of pending mixtures, and how much a full buffer grows.
QUERIES, PENDING, GROWTH = 64, 8, 4


class Diagnostics(NamedTuple):
    """A `Proposal` without its mixture, as Python numbers.

    origin is "initial" or the acquisition's name, and settings are by name; there are none without a space of them.
    """

    mean: float
    stderr: float
    acquisition: float
    gap: float
    noise: float
    lengthscale: float
    amplitude: float
    origin: str
    settings: dict[str, Any]


class Best(NamedTuple):
    """A mixture `[d]`, posterior mean and standard deviation of its noise-free value, and its settings by name.

    With a fidelity, the value is that at the target, whatever the trial was given.
    """

    mixture: np.ndarray
    mean: float
    stderr: float
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Search(Program):
    """Bayesian optimisation of a mixture from few, noisy scores (DUET, arXiv 2502.00270, Algorithm 1).

    A Gaussian process over the Hellinger map of mixtures, and an acquisition. These methods take and give NumPy,
    check what they are given, and run in float64 on the host CPU in a local scope: no global setting of JAX is
    touched. Full buffers grow by `GROWTH`, and then the step is compiled anew. `start`, `insert` and `propose`, of
    `Program`, are what they are made of, for use inside jit, vmap and scan.

    Where we differ from the paper: the first mixtures are the uniform one and two random ones; the kernel is Matern
    5/2 on square roots of shares, with hyperparameters from their posterior mode.
    """

    def init(self) -> Observations:
        """No observations."""
        with _host():
            return self.start()

    def tell(
        self,
        state: Observations,
        mixture: object,
        value: Any,
        stderr: Any = None,
        *,
        settings: Mapping[str, Any] | None = None,
    ) -> Observations:
        """Adds an observation.

        Args:
          state: of `init`, `tell` or `step`.
          mixture: `[d]` shares.
          value: feedback of the search's kind; by default a number, higher is better.
          stderr: its standard error where it is known and independent of the other observations'.
          settings: the training settings by name, where the search has a space of them; a fidelity that is not named
            is the target.

        Raises:
          ValueError: the mixture is no point of the simplex, or a setting is missing, unknown or out of range.
          FeedbackError: the feedback is not of its kind.
        """
        row = self._row(mixture, value, stderr, settings)
        with _host():
            return _insert(self, self._room(state), *row)

    def ask(
        self, state: Observations, *, key: Array, pending: object = None, pending_settings: Settings = None
    ) -> tuple[np.ndarray, Diagnostics]:
        """Proposes a mixture, float64 `[d]` that sums to 1, and what the surrogate expects of it.

        Args:
          state: what is known.
          key: a typed PRNG key; the same key proposes the same mixture.
          pending: `[p, d]` mixtures whose feedback has not come; the proposal keeps away from them.
          pending_settings: their settings, one mapping each or one for all, where the search has a space of them.
        """
        mixtures, diagnostics = self.ask_batch(state, 1, key=key, pending=pending, pending_settings=pending_settings)
        return mixtures[0], diagnostics[0]

    def ask_batch(
        self,
        state: Observations,
        count: int,
        *,
        key: Array,
        pending: object = None,
        pending_settings: Settings = None,
    ) -> tuple[np.ndarray, list[Diagnostics]]:
        """Proposes `count` mixtures `[count, d]` to be tried at the same time, each away from those before it.

        It is one program, compiled once for each count. The first proposal is that of `ask` with the same key.
        """
        waiting = self._pending(pending, pending_settings)
        with _host():
            rule = self._rule(state)
            _, proposals = _step(self, count, state, self._nothing(), *waiting, _local(key), rule)
        proposals = jax.device_get(proposals)
        found = [self._finish(jax.tree.map(itemgetter(i), proposals)) for i in range(count)]
        mixtures = np.reshape([mixture for mixture, _ in found], (count, self.num_domains))
        return mixtures, [about for _, about in found]

    def step(
        self,
        state: Observations,
        mixture: object,
        value: Any,
        stderr: Any = None,
        *,
        key: Array,
        settings: Mapping[str, Any] | None = None,
        pending: object = None,
        pending_settings: Settings = None,
    ) -> tuple[Observations, np.ndarray, Diagnostics]:
        """`tell`, then `ask`, in one compiled program."""
        row = self._row(mixture, value, stderr, settings)
        waiting = self._pending(pending, pending_settings)
        with _host():
            state = self._room(state)
            rule = self._rule(state, row)
            state, proposals = _step(self, 1, state, (*row[:2], True, row[2]), *waiting, _local(key), rule)
        return state, *self._finish(jax.tree.map(itemgetter(0), jax.device_get(proposals)))

    def compiled(self) -> Any:
        """The program of `ask` and `step` for a buffer that has not grown, as JAX compiled it, to be looked at."""
        with _host():
            state = self.start()
            waiting, rule = self._pending(None, None), self._rule(state)
            return _step.lower(self, 1, state, self._nothing(), *waiting, _local(jax.random.key(0)), rule).compile()

    def best(self, state: Observations) -> Best:
        """The observed mixture (and settings) of highest posterior mean.

        Raises:
          ValueError: nothing has been observed.
        """
        count = self._count(state)
        mixtures, settings = np.asarray(state.mixtures)[:count], np.asarray(state.settings)[:count]
        with _host():
            targets = np.asarray(self.space.at_target(jnp.asarray(settings)))
        mean, stderr = self._predict(state, np.concatenate([mixtures, targets], axis=1))
        top = int(np.argmax(mean))
        return Best(mixtures[top], float(mean[top]), float(stderr[top]), self._settings(settings[top]))

    def recommend(self, state: Observations) -> Best:
        """The allowed mixture (and settings) of highest posterior mean, tried or not, without domains it hardly needs.

        Where all feedback is the same, the centre of what is allowed.

        Raises:
          ValueError: nothing has been observed.
        """
        self._count(state)
        best = self._greedy(state, 0)
        if best.initial:
            # No two trials were told apart. An empty design begins with the centre of what is allowed.
            best = self._greedy(jax.tree.map(jnp.zeros_like, state), 1)
        with _host():
            point = jnp.concatenate([best.mixture, best.settings])
            found = np.array(point if best.initial else _sparser(self, _fitted(self, state), point))
        mixture = simplex.renormalise(found[: self.num_domains])
        mean, stderr = self._predict(state, np.concatenate([mixture, found[self.num_domains :]])[None])
        return Best(mixture, float(mean[0]), float(stderr[0]), self._settings(found[self.num_domains :]))

    def _greedy(self, state: Observations, initial: int) -> Proposal:
        """What is proposed by the posterior mean alone, after a design of `initial` trials."""
        greedy, waiting = dataclasses.replace(self, acquisition="ucb"), self._pending(None, None)
        with _host():
            rule = (jnp.asarray(0.0), jnp.asarray(initial))
            _, proposals = _step(greedy, 1, state, self._nothing(), *waiting, jax.random.key(0), rule)
            return jax.tree.map(itemgetter(0), proposals)

    def predict(
        self, state: Observations, mixtures: object, settings: Settings = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of the noise-free value, each float64 `[n]`, for `[n, d]` mixtures.

        Args:
          state: what is known.
          mixtures: `[n, d]`.
          settings: one mapping each or one for all, where the search has a space of them; a fidelity that is not
            named is the target.
        """
        return self._predict(state, self._points(mixtures, settings))

    def _predict(self, state: Observations, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(points)
        padded = np.zeros((-(-count // QUERIES) * QUERIES, points.shape[1]))
        padded[:, : self.num_domains] = 1 / self.num_domains
        padded[:count] = points
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

    def _row(self, mixture: object, value: Any, stderr: Any, settings: Mapping[str, Any] | None) -> tuple:
        checked = simplex.check_mixture(mixture, self.num_domains)
        return checked, self.feedback.row(value, stderr, self.num_domains), self.space.encode(settings)

    def _nothing(self) -> tuple:
        return np.zeros(self.num_domains), self.feedback.blank(self.num_domains), False, np.zeros(self.space.width)

    def _points(self, mixtures: object, settings: Settings) -> np.ndarray:
        """Mixtures and coordinates of their settings, `[n, d + e]`."""
        # As objects, so that rows of different lengths come as far as the check of each.
        rows = np.atleast_1d(np.asarray(mixtures, object))
        checked = [simplex.check_mixture(row, self.num_domains) for row in rows]
        each = [settings] * len(checked) if settings is None or isinstance(settings, Mapping) else list(settings)
        if len(each) != len(checked):
            raise ValueError(f"There are settings for {len(each)} mixtures, but {len(checked)} mixtures.")
        coordinates = np.reshape([self.space.encode(one) for one in each], (len(checked), self.space.width))
        return np.concatenate([np.reshape(checked, (len(checked), self.num_domains)), coordinates], axis=1)

    def _settings(self, coordinates: np.ndarray) -> dict[str, Any]:
        """By name, without the fidelity, which is no property of what is best."""
        found = self.space.decode(np.asarray(coordinates))
        if self.space.fidelity is not None:
            del found[self.space.fidelity.name]
        return found

    def _room(self, state: Observations) -> Observations:
        """The same observations in buffers with at least one free row."""
        if not bool(np.asarray(state.mask)[-1]):
            return state

        def grow(x: Array) -> Array:
            old = np.asarray(x)
            return jnp.asarray(np.concatenate([old, np.zeros(((GROWTH - 1) * len(old), *old.shape[1:]), old.dtype)]))

        return jax.tree.map(grow, state)

    def _pending(self, pending: object, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """Pending points in a buffer that doubles when full, and which of its rows are in use."""
        rows = self._points([] if pending is None else pending, settings)
        room = PENDING
        while room < len(rows):
            room *= 2
        padded = np.zeros((room, rows.shape[1]))
        padded[: len(rows)] = rows
        return padded, np.arange(room) < len(rows)

    def _rule(self, state: Observations, row: object = None) -> tuple[Array, Array]:
        """Beta and the size of the initial design as arguments, so that `recommend` shares the compiled program."""
        count = int(np.sum(state.mask)) + (row is not None)
        return jnp.asarray(beta_at(self.schedule, self.beta, jnp.asarray(float(count)))), jnp.asarray(self.initial)

    def _finish(self, proposal: Proposal) -> tuple[np.ndarray, Diagnostics]:
        origin = "initial" if proposal.initial else self.acquisition
        settings = self.space.decode(np.asarray(proposal.settings))
        numbers = (float(getattr(proposal, name)) for name in Diagnostics._fields[:-2])
        mixture = simplex.renormalise(np.array(proposal.mixture, np.float64))
        return mixture, Diagnostics._make([*numbers, origin, settings])


@contextlib.contextmanager
def _host() -> Iterator[None]:
    """float64 on the CPU of this process, for the calls inside and nothing else."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _local(key: Array) -> Array:
    """The key on the host, wherever it was made."""
    implementation = jax.random.key_impl(key)
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(key))), impl=implementation)


# Compiled once for all equal searches: a search is a static argument. A row whose third entry is False leaves the
# observations as they are, so that asking and stepping are one program.
@partial(jax.jit, static_argnums=(0, 1))
def _step(
    search: Search,
    count: int,
    state: Observations,
    row: tuple,
    pending: Array,
    pending_mask: Array,
    key: Array,
    rule: tuple,
) -> tuple[Observations, Proposal]:
    state = search.insert(state, *row)
    return state, search.propose_batch(
        state, count, key=key, pending=pending, pending_mask=pending_mask, beta=rule[0], initial=rule[1]
    )


@partial(jax.jit, static_argnums=0)
def _insert(search: Search, state: Observations, mixture: Array, feedback: Any, settings: Array) -> Observations:
    return search.insert(state, mixture, feedback, settings=settings)


@partial(jax.jit, static_argnums=0)
def _fitted(search: Search, state: Observations) -> list[Posterior]:
    nothing = jnp.zeros((0, search.num_domains + search.space.width))
    return search.condition(search.fit(state), nothing, jnp.zeros(0, bool))


@partial(jax.jit, static_argnums=0)
def _sparser(search: Search, posteriors: list[Posterior], point: Array) -> Array:
    return search.sparser(posteriors, point)


@partial(jax.jit, static_argnums=0)
def _expect(search: Search, posteriors: list[Posterior], points: Array) -> tuple[Array, Array]:
    mean, deviation = search.moments(posteriors, search.roots(points))
    if len(posteriors) > 1:
        return mean, deviation
    return posteriors[0].centre + posteriors[0].spread * mean, posteriors[0].spread * deviation
