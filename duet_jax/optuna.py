"""The search as an Optuna sampler, for Optuna's storage, dashboard and workers: `pip install 'duet_jax[optuna]'`.

sampler = DuetSampler(["code", "maths", "web"])
study = optuna.create_study(sampler=sampler, direction="maximize", storage="sqlite:///study.db")
study.optimize(lambda trial: score(sampler.suggest_mixture(trial)), n_trials=30)
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from duet_jax._checks import distinct
from duet_jax.errors import FeedbackError
from duet_jax.search import Observations, Scores, Search
from duet_jax.search.search import GROWTH
from duet_jax.search.simplex import check_mixture

try:
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.study import Study, StudyDirection
    from optuna.trial import BaseTrial, FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise ImportError("duet_jax.optuna needs Optuna; install it with: pip install 'duet_jax[optuna]'.") from error


class DuetSampler(BaseSampler):
    """Proposes mixtures by `duet_jax.search.Search`, from the trials in the study's storage and nothing else.

    Each share is a parameter of the trial, a float from 0 to 1, and all shares of a trial are proposed together. A
    proposal is a pure function of the seed, the trial's number and the other trials, so that a study goes on in a new
    process as it would have in the old one.

    Completed trials are the observations; a trial's user attribute "stderr" is the known standard error of its value
    (with several objectives: one each). The mixtures of all other trials are avoided as if their feedback were still
    to come: of those running, also in other processes, of those enqueued, and of those that failed, were pruned or
    have an infinite value; intermediate values are not used. A share that a trial lacks is 0, and completed trials
    whose shares do not sum to 1, as other samplers make them, are ignored with a warning.

    The joint search of mixture and settings is not part of this: parameters other than shares are sampled on their
    own by `independent_sampler`, the search does not see them, and what they change in the values is noise to it.

    Attributes:
      domains: names, in the order of the search's arrays.
      search: the search that proposes.
      seed: of all randomness.
      prefix: what a domain's name has before it in the name of its parameter.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        seed: int = 0,
        prefix: str = "share/",
        weights: Sequence[float] | None = None,
        independent_sampler: BaseSampler | None = None,
        **options: Any,
    ) -> None:
        """Makes a sampler.

        Args:
          domains: at least two different names.
          seed: the same seed and the same trials give the same proposal.
          prefix: put before a domain's name to name its parameter.
          weights: of the objectives, for studies with several: each is standardised, and their weighted sum improved.
          independent_sampler: samples all other parameters; by default a TPE sampler, seeded by trial and parameter.
          **options: of `duet_jax.search.Search`, such as beta, acquisition, initial and constraints.

        Raises:
          ValueError: a name comes twice, or the search cannot be as the options say.
        """
        distinct("domains", domains)
        self.domains = tuple(domains)
        self.seed = seed
        self.prefix = prefix
        feedback = Scores() if weights is None else Scores(tuple(weights))
        self.search = Search(num_domains=len(self.domains), feedback=feedback, **options)
        self._independent = independent_sampler
        self._warned: set[str] = set()

    def suggest_mixture(self, trial: BaseTrial) -> dict[str, float]:
        """The trial's share of each domain, by name; their exact sum rounds to 1.

        Raises:
          ValueError: the shares were not sampled by this sampler, and do not sum to 1.
        """
        shares = [trial.suggest_float(self.prefix + name, 0.0, 1.0) for name in self.domains]
        try:
            mixture = check_mixture(shares, len(shares))
        except ValueError:
            raise ValueError(
                f"The shares of trial {trial.number} sum to {sum(shares):.8g}, not to 1; give the study this sampler "
                f"(sampler=...), and enqueue shares that sum to 1."
            ) from None
        return self._named(mixture, "")

    def best(self, study: Study) -> tuple[dict[str, float], float, float]:
        """The completed mixture whose value is best once noise is taken out, unlike that of `study.best_trial`.

        Returns:
          Shares by name, posterior mean of the noise-free value and its standard deviation, in units of the value;
          with several objectives, of the weighted sum of standardised values, higher is better.

        Raises:
          ValueError: no trial has been completed.
        """
        state, _, _ = self._recall(study, None)
        mixture, mean, stderr, _ = self.search.best(state)
        sign = self._signs(study)[0] if len(self.search.feedback.weights) == 1 else 1.0
        return self._named(mixture, ""), float(sign * mean), stderr

    # What Optuna calls.

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        del study, trial
        return {self.prefix + name: FloatDistribution(0.0, 1.0) for name in self.domains}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, float]:
        if search_space.keys() & trial.system_attrs.get("fixed_params", {}).keys():
            # Some shares are enqueued: they are the mixture, and the others 0.
            return dict.fromkeys(search_space, 0.0)
        state, pending, asking = self._recall(study, trial.number)
        # Trials before this one that are being asked for at the same moment, as by several workers at the start, are
        # supposed to be given what this sampler gives them.
        for number in [*asking, trial.number]:
            key = jax.random.fold_in(jax.random.key(self.seed), number)
            mixture, _ = self.search.ask(state, key=key, pending=pending)
            pending.append(mixture)
        return self._named(mixture, self.prefix)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        other = self._independent
        if other is None:
            # A new one for each parameter has no state that a restart would lose.
            other = TPESampler(seed=zlib.crc32(f"{self.seed} {trial.number} {param_name}".encode()))
        return other.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if self._independent is not None:
            self._independent.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        if self._independent is not None:
            self._independent.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        if self._independent is not None:
            self._independent.reseed_rng()

    # How trials are read.

    def _recall(self, study: Study, but: int | None) -> tuple[Observations, list[np.ndarray], list[int]]:
        """The observations, the pending mixtures, and which trials before trial `but` are being asked for."""
        signs = self._signs(study)
        mixtures, rows, pending, ignored = [], [], [], []
        finished, silent = -1, []
        for trial in study.get_trials(deepcopy=False):
            if trial.number == but:
                continue
            if trial.state.is_finished():
                finished = max(finished, trial.number)
            mixture = self._mixture(trial)
            if mixture is None:
                if trial.state == TrialState.COMPLETE:
                    ignored.append(trial.number)
                elif trial.state == TrialState.RUNNING:
                    silent.append(trial.number)
                continue
            if trial.state == TrialState.COMPLETE and np.all(np.isfinite(trial.values)):
                mixtures.append(mixture)
                rows.append(self._row(signs * np.array(trial.values), trial))
            else:
                pending.append(mixture)
        if ignored:
            self._warn(
                "shares",
                f"{len(ignored)} completed trials, trial {ignored[0]} the first, have no shares of "
                f"{', '.join(self.domains)} that sum to 1; they are ignored.",
            )
        # A trial that is silent while a later one has finished is not asking: its worker died, or does other work.
        asking = [number for number in silent if but is not None and finished < number < but]
        return self._observations(mixtures, rows), pending, asking

    def _mixture(self, trial: FrozenTrial) -> np.ndarray | None:
        """The trial's shares, known or enqueued; None while or where they do not sum to 1."""
        known: Mapping[str, Any] = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        try:
            return check_mixture([known.get(self.prefix + name, 0.0) for name in self.domains], len(self.domains))
        except ValueError:
            return None

    def _row(self, value: np.ndarray, trial: FrozenTrial) -> Any:
        feedback, size = self.search.feedback, len(self.domains)
        try:
            return feedback.row(value, trial.user_attrs.get("stderr"), size)
        except FeedbackError as error:
            # What is stored cannot be corrected, and must not end the study.
            self._warn("stderr", f"In trial {trial.number}: {error} It is taken for unknown.")
            return feedback.row(value, None, size)

    def _observations(self, mixtures: list[np.ndarray], rows: list[Any]) -> Observations:
        """What telling one after another would give, without as many calls."""
        empty, count = self.search.init(), len(rows)
        room = self.search.capacity
        while room < count:
            room *= GROWTH
        settings = np.zeros(empty.settings.shape[1:])
        told = [Observations._make((mixture, settings, row, True)) for mixture, row in zip(mixtures, rows, strict=True)]

        def fill(old: jax.Array, *new: Any) -> np.ndarray:
            buffer = np.zeros((room, *old.shape[1:]), old.dtype)
            buffer[:count] = np.reshape(new, (count, *old.shape[1:]))
            return buffer

        return jax.tree.map(fill, empty, *told)

    def _signs(self, study: Study) -> np.ndarray:
        """1 for each objective that is maximised, and -1 for each that is minimised."""
        weights = self.search.feedback.weights
        if len(study.directions) != len(weights):
            raise ValueError(
                f"The study has {len(study.directions)} objectives, and the sampler weights {len(weights)}; "
                f"give DuetSampler weights=(...), one for each objective."
            )
        return np.array([1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions])

    def _named(self, mixture: np.ndarray, prefix: str) -> dict[str, float]:
        return {prefix + name: float(share) for name, share in zip(self.domains, mixture, strict=True)}

    def _warn(self, subject: str, message: str) -> None:
        """Warns once of each subject, not before every trial."""
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, stacklevel=3)
