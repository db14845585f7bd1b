"""One round of the outer search as a pure function: record, fit, propose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.search import simplex
from duet_jax.search.acquisition import Schedule, beta_at, draw, log_expected_improvement
from duet_jax.search.constraints import Constraints, bounds, contains, project, support
from duet_jax.search.kernel import Map
from duet_jax.search.maximise import maximise
from duet_jax.search.observations import Kind, Observations, Scores
from duet_jax.search.space import Space
from duet_jax.search.surrogate import Hyperparameters, Posterior, Problem, Surrogate

# Random candidates, and the best observations around which candidates are tried.
RANDOM, CENTRES = 512, 8
# What a recommended mixture may lose for each domain fewer: standard deviations of the feedback, and of the loss.
CHEAP, UNSURE = 0.06, 2.0
# Squared distance on the map below which a point of the first design is one that there is.
SAME = 1e-5


class Proposal(NamedTuple):
    """What the program returns: a mixture and what the surrogate thinks of it, in units of the feedback.

    With feedback of several tasks the units are those of the weighted sum of standardised values.

    Attributes:
      mixture: `[d]`.
      settings: `[e]`, coordinates of the training settings, see `Space`.
      mean, stderr: of the noise-free value of the mixture with these settings, at the target fidelity.
      acquisition: its upper confidence bound, log expected improvement or sampled value; -inf in the initial design,
        which maximises nothing.
      gap: Frank-Wolfe gap of the standardised acquisition: to first order no other allowed mixture is better by more
        than this; inf in the initial design.
      noise: learned standard deviation of the feedback's noise.
      lengthscale: common lengthscale in the map; on the Hellinger map, vertices are sqrt 2 apart.
      amplitude: prior standard deviation of the value.
      initial: whether it belongs to the first design.
    """

    mixture: Array
    settings: Array
    mean: Array
    stderr: Array
    acquisition: Array
    gap: Array
    noise: Array
    lengthscale: Array
    amplitude: Array
    initial: Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a search is, and what its rounds compute: pure functions on arrays of any float type.

    They compose with jit, vmap, scan and shard; nothing is checked in them.

    A proposal is a function of the observations, the pending mixtures and the key alone: the fit starts from the same
    points whatever came before, so that a search rebuilt from its feedback goes on as the one that was lost.

    Attributes:
      num_domains: d, at least 2; or 1 where only settings are searched.
      capacity: rows of a new buffer.
      acquisition: "ucb" (Srinivas et al. 2010), "log_ei" (Ament et al. 2023) or "thompson".
      beta: standard deviations that the upper confidence bound adds to the mean.
      schedule: how beta changes with the number of observations, see `acquisition.beta_at`.
      initial: size of the first design, the uniform mixture and then random ones; it goes on for as long as all
        feedback is the same.
      constraints: which mixtures may be proposed.
      prior: a mixture towards which proposals are pulled, or ().
      penalty: standardised value that a proposal gives up per nat of divergence from `prior`.
      space: training settings that are searched together with the mixture, and the fidelity of trials.
      map, ard, trend: of the surrogate, see `Surrogate`.
      feedback: what is told, see `Scores` and its neighbours.
    """

    num_domains: int
    capacity: int = 16
    acquisition: Literal["ucb", "log_ei", "thompson"] = "ucb"
    beta: float = 2.0
    schedule: Schedule = "constant"
    initial: int = 3
    constraints: Constraints = Constraints()
    prior: tuple[float, ...] = ()
    penalty: float = 0.0
    space: Space = Space()
    map: Map = "hellinger"
    ard: bool = True
    trend: Literal["linear", "log"] | tuple[float, ...] | None = None
    feedback: Kind = Scores()

    def __post_init__(self) -> None:
        if self.num_domains < 2 and not (self.num_domains == 1 and self.space.width):
            raise ValueError(f"num_domains is {self.num_domains}; a mixture needs at least 2 domains.")
        if self.beta < 0 or self.penalty < 0 or self.initial < 0 or self.capacity < 1:
            raise ValueError(
                f"beta={self.beta}, penalty={self.penalty} and initial={self.initial} must not be negative, and "
                f"capacity={self.capacity} must be at least 1."
            )
        self.constraints.check(self.num_domains)
        if self.penalty and not self.prior:
            raise ValueError(f"penalty is {self.penalty}, but there is no prior mixture to be pulled towards.")
        if self.prior:
            simplex.check_mixture(self.prior, self.num_domains)
        if isinstance(self.trend, tuple) and len(self.trend) != self.num_domains:
            raise ValueError(f"trend has {len(self.trend)} utilities; it must have one for each domain.")

    @property
    def surrogate(self) -> Surrogate:
        return Surrogate(
            self.num_domains, self.map, self.ard, self.trend, self.space.width, self.space.fidelity is not None
        )

    def start(self, dtype: Any = None) -> Observations:
        """Empty buffers of a float type, by default the widest that is enabled."""
        row = self.feedback.blank(self.num_domains)
        empty = jax.tree.map(lambda x: jnp.zeros((self.capacity, *np.shape(x)), dtype or float), row)
        return Observations(
            jnp.zeros((self.capacity, self.num_domains), dtype or float),
            jnp.zeros((self.capacity, self.space.width), dtype or float),
            empty,
            jnp.zeros(self.capacity, bool),
        )

    def insert(
        self, state: Observations, mixture: Array, feedback: Any, present: Any = True, settings: Array | None = None
    ) -> Observations:
        """The observations and one more; as they were if not `present`. Nothing is checked, and a full buffer drops it.

        Args:
          mixture: `[d]`.
          feedback: a row of the kind of feedback; for one task's score, `(value, stderr)`.
          settings: `[e]`, coordinates in the space of settings, if there is one.
        """
        at = jnp.sum(state.mask)
        row = jax.tree.unflatten(jax.tree.structure(state.feedback), jax.tree.leaves(feedback))
        beside = jnp.zeros_like(state.settings[0]) if settings is None else settings
        new = Observations(mixture, beside, row, jnp.asarray(True))
        added = jax.tree.map(lambda old, x: old.at[at].set(jnp.reshape(x, old.shape[1:]), mode="drop"), state, new)
        return jax.tree.map(partial(jnp.where, present), added, state)

    def fit(self, state: Observations) -> list[tuple[Hyperparameters, Problem]]:
        """Hyperparameters of each task's surrogate, and its observations."""
        return [self.surrogate.fit(problem, self.feedback.likelihood) for problem in self._problems(state)]

    def _problems(self, state: Observations) -> list[Problem]:
        kind = self.feedback
        return [kind.problem(self.surrogate, state, task) for task in range(len(kind.weights))]

    def condition(
        self, fits: list[tuple[Hyperparameters, Problem]], pending: Array, pending_mask: Array
    ) -> list[Posterior]:
        """The surrogate of each task after all observations and pending points `[p, d + e]`."""
        later = self.surrogate.inputs(self.roots(pending), pending_mask)
        return [self.surrogate.condition(*fit, later) for fit in fits]

    def roots(self, points: Array) -> Array:
        """Mixtures and coordinates of settings `[n, d + e]` as the surrogate takes them."""
        size = self.num_domains
        return jnp.concatenate([simplex.hellinger(points[:, :size]), points[:, size:]], axis=1)

    def moments(self, posteriors: list[Posterior], points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, standardised, of the weighted sum of tasks at points `[m, d + e]`."""
        mean, variance = jnp.zeros(points.shape[0], points.dtype), jnp.zeros(points.shape[0], points.dtype)
        for weight, posterior in zip(self.feedback.weights, posteriors, strict=True):
            one, deviation = self.surrogate.moments(posterior, points)
            mean, variance = mean + weight * one, variance + (weight * deviation) ** 2
        return mean, jnp.sqrt(variance)

    def sparser(self, posteriors: list[Posterior], point: Array) -> Array:
        """A recommended point `[d + e]` without the domains that it hardly needs.

        On the map of square roots a smooth function has a slope at a share of 0, so maxima of the posterior mean have
        small shares there that feedback does not speak for. Those below an even share are left out, smallest first,
        as long as the mean is lower by at most `CHEAP`, and by no more than might be chance.
        """
        size = self.num_domains
        shares, rest = point[:size], point[size:]
        order = jnp.argsort(shares)
        # Candidate j lacks the j smallest shares.
        kept = jnp.where(jnp.argsort(order) >= jnp.arange(size)[:, None], shares, 0.0)
        mixtures = kept / jnp.sum(kept, axis=1, keepdims=True)
        points = self.roots(jnp.concatenate([mixtures, jnp.broadcast_to(rest, (size, len(rest)))], axis=1))
        loss, variance = jnp.zeros(size, point.dtype), jnp.zeros(size, point.dtype)
        for weight, posterior in zip(self.feedback.weights, posteriors, strict=True):
            mean, covariance = self.surrogate.joint(posterior, points)
            loss = loss + weight * (mean[0] - mean)
            own = jnp.diagonal(covariance)
            variance = variance + weight**2 * (own[0] + own - 2.0 * covariance[0])
        largest = jnp.concatenate([jnp.zeros(1, point.dtype), shares[order][:-1]])
        chance = UNSURE * jnp.sqrt(jnp.maximum(variance, 0.0))
        fine = (loss <= CHEAP * sum(self.feedback.weights)) & (loss <= chance) & (largest <= 1.0 / size)
        fine = fine & contains(mixtures, self.constraints, size)
        fewest = jnp.max(jnp.where(fine, jnp.arange(size), 0))
        return jnp.concatenate([mixtures[fewest], rest])

    def propose(
        self,
        state: Observations,
        *,
        key: Array,
        pending: Array | None = None,
        pending_mask: Array | None = None,
        beta: Array | None = None,
        initial: Array | None = None,
    ) -> Proposal:
        """Fits the surrogate and maximises the acquisition.

        Args:
          state: in buffers of any capacity.
          key: a typed PRNG key.
          pending: `[p, d + e]` mixtures and coordinates of settings whose feedback has not come, from which the
            proposal keeps away.
          pending_mask: bool `[p]`, True for rows in use.
          beta, initial: in place of the search's own.
        """
        proposals = self.propose_batch(
            state, 1, key=key, pending=pending, pending_mask=pending_mask, beta=beta, initial=initial
        )
        return jax.tree.map(lambda x: x[0], proposals)

    def propose_batch(
        self,
        state: Observations,
        count: int,
        *,
        key: Array,
        pending: Array | None = None,
        pending_mask: Array | None = None,
        beta: Array | None = None,
        initial: Array | None = None,
    ) -> Proposal:
        """`count` proposals to be tried at the same time, each away from those before it: a leading axis on all.

        The surrogate is fitted once, and each proposal narrows its variance, not its mean, for the next (GP-BUCB,
        Desautels et al. 2014).
        """
        dtype, room = state.mixtures.dtype, count - 1
        if pending is None:
            pending = jnp.zeros((0, self.num_domains + self.space.width), dtype)
        if pending_mask is None:
            pending_mask = jnp.ones(pending.shape[0], bool)
        waiting = pending.shape[0]
        pending = jnp.concatenate([pending, jnp.zeros((room, pending.shape[1]), dtype)])
        pending_mask = jnp.concatenate([pending_mask, jnp.zeros(room, bool)])
        if beta is None:
            beta = beta_at(self.schedule, self.beta, jnp.sum(state.mask))
        if initial is None:
            initial = jnp.asarray(self.initial)
        fits = self.fit(state)
        # While no two trials have been told apart there is nothing to model, and the design goes on.
        alike = jnp.all(jnp.stack([jnp.all(problem.values == 0) for problem in self._problems(state)]))

        def one(waiting_for: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Proposal]:
            key_one = jax.random.fold_in(key, number)
            proposal = self._choose(state, fits, *waiting_for, beta, initial, alike, key=key_one)
            if room:
                point = jnp.concatenate([proposal.mixture, proposal.settings])
                pending, mask = waiting_for
                at = waiting + number
                waiting_for = (pending.at[at].set(point, mode="drop"), mask.at[at].set(True, mode="drop"))
            return waiting_for, proposal

        return jax.lax.scan(one, (pending, pending_mask), jnp.arange(count))[1]

    def _choose(
        self,
        state: Observations,
        fits: list[tuple[Hyperparameters, Problem]],
        pending: Array,
        pending_mask: Array,
        beta: Array,
        initial: Array,
        alike: Array,
        *,
        key: Array,
    ) -> Proposal:
        """The next proposal of fitted surrogates; of the design where all feedback is `alike`."""
        dtype, size, space = state.mixtures.dtype, self.num_domains, self.space
        key_draws, key_maximise, key_sample = jax.random.split(key, 3)
        posteriors = self.condition(fits, pending, pending_mask)
        draws = simplex.draws(key_draws, RANDOM, size).astype(dtype)
        tried = jnp.concatenate([state.mixtures, state.settings], axis=1)
        points = self.roots(jnp.concatenate([tried, pending]))
        taken = jnp.concatenate([state.mask, pending_mask])
        targets = jnp.concatenate([points[:, :size], space.at_target(points[:, size:])], axis=1)

        # Rows that are masked out are no mixtures, and never taken for a centre.
        means = jnp.where(taken, self.moments(posteriors, targets)[0], -jnp.inf)
        _, best = jax.lax.top_k(means, min(CENTRES, len(means)))
        centres = targets[jnp.where(taken[best], best, best[0])]
        observed = len(state.mask)
        highest = jnp.max(jnp.where(state.mask, means[:observed], -jnp.inf))
        highest = jnp.where(jnp.any(state.mask), highest, 0.0)
        score = self._score(posteriors, observed, highest, beta, key_sample)
        found = maximise(score, centres, draws, self.constraints, space, key=key_maximise)
        first = (jnp.sum(taken) < initial) | alike
        point = jnp.where(first, self._design(targets, taken, draws, key_maximise), found.point)
        mean, deviation = (x[0] for x in self.moments(posteriors, point[None]))
        single = len(posteriors) == 1
        centre, spread = (posteriors[0].centre, posteriors[0].spread) if single else (0.0, 1.0)
        value = jnp.where(first, -jnp.inf, found.score)
        hyper = posteriors[0].hyperparameters
        if space.fidelity is not None:
            point = point.at[-1].set(self._level(posteriors, point))
        return Proposal(
            mixture=point[:size] ** 2 / jnp.sum(point[:size] ** 2),
            settings=point[size:],
            mean=centre + spread * mean,
            stderr=spread * deviation,
            acquisition=value if self.acquisition == "log_ei" else centre + spread * value,
            gap=jnp.where(first, jnp.inf, found.gap),
            noise=spread * jnp.exp(0.5 * hyper.noise),
            lengthscale=jnp.exp(hyper.lengthscale),
            amplitude=spread * jnp.exp(0.5 * hyper.signal),
            initial=first,
        )

    def _level(self, posteriors: list[Posterior], point: Array) -> Array:
        """The coordinate of the fidelity at which a trial at `point` `[d + e]` tells most per cost.

        That is the part of the variance of the value at the target that its feedback takes away, over the cost of the
        level; a cheap trial that nothing more is to be learnt from gives way to a dearer one. The information in nats,
        which multi-fidelity searches for the maximum use (Takeno et al. 2020), would pay for digits of a value that
        nobody needs.
        """
        assert self.space.fidelity is not None
        levels = jnp.asarray(self.space.fidelity.grid, point.dtype)
        points = jnp.tile(point, (len(levels), 1)).at[:, -1].set(levels)
        told = jnp.zeros_like(levels)
        for weight, posterior in zip(self.feedback.weights, posteriors, strict=True):
            told = told + weight**2 * self.surrogate.told(posterior, points)
        costs = jnp.asarray(self.space.fidelity.relative_costs, point.dtype)
        return levels[jnp.argmax(told / costs)]

    def _score(
        self, posteriors: list[Posterior], observed: int, highest: Array, beta: Array, key: Array
    ) -> Callable[[Array], Array]:
        """The acquisition of points `[m, d]`; `highest` is the best mean of the first rows, those observed."""
        if self.acquisition == "thompson":
            keys = jax.random.split(key, len(posteriors))
            samples = [
                draw(self.surrogate, posterior, observed, key=k) for posterior, k in zip(posteriors, keys, strict=True)
            ]

        def score(points: Array) -> Array:
            if self.acquisition == "thompson":
                each = zip(self.feedback.weights, samples, strict=True)
                value = sum((weight * sample(points) for weight, sample in each), jnp.zeros_like(points[:, 0]))
            else:
                mean, deviation = self.moments(posteriors, points)
                if self.acquisition == "ucb":
                    value = mean + beta * deviation
                else:
                    value = log_expected_improvement(mean, deviation, highest)
            if self.penalty:
                shares = points[:, : self.num_domains] ** 2
                prior = jnp.asarray(np.maximum(self.prior, 1e-6), points.dtype)
                ratio = jnp.log(jnp.maximum(shares, 1e-30)) - jnp.log(prior)
                value = value - self.penalty * jnp.sum(shares * ratio, axis=1)
            return value

        return score

    def _design(self, points: Array, taken: Array, draws: Array, key: Array) -> Array:
        """The first that is not taken: the uniform mixture with middle settings, then random ones.

        What is farthest from all there is would lie on faces, and a search that begins there does worse where the
        optimum is inside.
        """
        size, space = self.num_domains, self.space
        candidates = jnp.concatenate([jnp.full((1, size), 1 / size, draws.dtype), draws])
        candidates = project(candidates, *bounds(self.constraints, size), self.constraints.groups)
        candidates = project(candidates, *support(candidates, self.constraints), self.constraints.groups)
        candidates = simplex.hellinger(candidates)
        if space.width:
            settings = jnp.asarray(space.middle()[None], draws.dtype)
            settings = jnp.concatenate([settings, space.draws(key, len(draws)).astype(draws.dtype)])
            candidates = jnp.concatenate([candidates, settings], axis=1)
        apart = jnp.sum(candidates**2, axis=1)[:, None] + jnp.sum(points**2, axis=1) - 2.0 * candidates @ points.T
        nearest = jnp.min(jnp.where(taken[None], apart, jnp.inf), axis=1)
        # Rounding leaves more than 0 between a point and itself.
        return candidates[jnp.argmax(nearest > SAME)]
