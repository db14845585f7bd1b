"""The search that a study's files amount to: its settings, and its state after all feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from duet_jax._search_config import is_whole
from duet_jax.config import StudyConfig
from duet_jax.errors import ConfigError, StudyError
from duet_jax.search import Choice, Constraints, Fidelity, Number, Observations, Scores, Search, Space, Stars, Subset
from duet_jax.search.constraints import Group
from duet_jax.study import Study
from duet_jax.trial import Trial


def make_search(config: StudyConfig, sizes: Mapping[str, int] | None = None) -> Search:
    """The outer search that a study's configuration describes.

    Args:
      config: the study's configuration.
      sizes: examples of each domain by name, which limit how often they are repeated; None: no limit is known yet.

    Raises:
      ConfigError: no mixture fulfils all its constraints.
    """
    chosen = config.search
    names = [domain.name for domain in config.data.domains]
    prior, total = chosen.prior, sum(chosen.prior.values())
    people = config.task.people
    try:
        return Search(
            num_domains=len(names),
            acquisition=chosen.acquisition,
            beta=chosen.beta,
            schedule=chosen.schedule,
            initial=chosen.initial,
            constraints=_constraints(config, sizes),
            prior=tuple(prior.get(name, 0.0) / total for name in names) if prior else (),
            penalty=chosen.penalty,
            space=make_space(config),
            feedback=Stars(people.stars) if people is not None and people.heard == "ordinal" else Scores(),
        )
    except ValueError as error:
        raise ConfigError(f"No mixture can be proposed under data.domains and search: {error}") from None


def make_space(config: StudyConfig) -> Space:
    """The settings that are searched together with the mixture, by dotted path, and the trials' fidelity."""
    parts = [
        Number(part.field, part.low, part.high, part.log, is_whole(part, config.training))
        if part.low is not None and part.high is not None
        else Choice(part.field, part.values)
        if part.values
        else Subset(part.field, part.members, part.least)
        for part in config.search.settings
    ]
    given = config.search.fidelity
    return Space(tuple(parts), None if given is None else Fidelity(given.field, given.levels, given.costs))


def recall(search: Search, study: Study) -> tuple[Observations, list[Trial], np.ndarray, np.ndarray]:
    """The search's state after all feedback, and what it was told: trials, mixtures `[n, d]` and values `[n]`.

    Raises:
      StudyError: a trial's settings are not those of the study.
    """
    state = search.init()
    told = study.completed()
    mixtures, values, errors = study.observations(told)
    for trial, mixture, value, error in zip(told, mixtures, values, errors, strict=True):
        try:
            if isinstance(search.feedback, Stars):
                assert trial.feedback is not None
                stars = np.repeat(np.arange(1, search.feedback.levels + 1), trial.feedback.get("ratings") or 0)
                state = search.tell(state, mixture, stars, settings=trial.settings)
            else:
                state = search.tell(state, mixture, float(value), error, settings=trial.settings)
        except ValueError as problem:
            raise StudyError(f"Trial {trial.trial} of {study.address} does not fit its study: {problem}") from None
    return state, told, mixtures, values


def at_target(config: StudyConfig, trial: Trial) -> dict[str, Any]:
    """A trial's settings without its fidelity: the target is meant."""
    fidelity = config.search.fidelity
    return {name: value for name, value in trial.settings.items() if fidelity is None or name != fidelity.field}


def _constraints(config: StudyConfig, sizes: Mapping[str, int] | None) -> Constraints:
    chosen, domains = config.search, config.data.domains
    names = [domain.name for domain in domains]
    maximum = [domain.maximum for domain in domains]
    if chosen.repetition is not None and sizes is not None:
        each = Constraints.repetition([sizes[name] for name in names], config.budget, chosen.repetition)
        maximum = [min(pair) for pair in zip(maximum, each, strict=True)]
    bounded = any(domain.minimum > 0 for domain in domains) or min(maximum) < 1
    return Constraints(
        minimum=tuple(domain.minimum for domain in domains) if bounded else (),
        maximum=tuple(maximum) if bounded else (),
        groups=tuple(
            Group(tuple(names.index(name) for name in group.domains), group.minimum, group.maximum)
            for group in chosen.groups
        ),
        floor=chosen.floor,
        most=chosen.most,
    )
