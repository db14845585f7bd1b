"""The search that a study's files amount to: its settings, and its state after all feedback."""

from __future__ import annotations

import numpy as np

from duet_jax.config import StudyConfig
from duet_jax.errors import ConfigError
from duet_jax.search import Constraints, Observations, Search
from duet_jax.study import Study


def make_search(config: StudyConfig) -> Search:
    """The outer search that a study's configuration describes.

    Raises:
      ConfigError: no mixture fulfils all its constraints.
    """
    chosen = config.search
    domains = config.data.domains
    bounded = any(domain.minimum > 0 or domain.maximum < 1 for domain in domains)
    constraints = Constraints(
        minimum=tuple(domain.minimum for domain in domains) if bounded else (),
        maximum=tuple(domain.maximum for domain in domains) if bounded else (),
        floor=chosen.floor,
        most=chosen.most,
    )
    try:
        return Search(
            num_domains=len(domains),
            acquisition=chosen.acquisition,
            beta=chosen.beta,
            schedule=chosen.schedule,
            initial=chosen.initial,
            constraints=constraints,
        )
    except ValueError as error:
        raise ConfigError(f"No mixture can be proposed under data.domains and search: {error}") from None


def recall(search: Search, study: Study) -> tuple[Observations, np.ndarray, np.ndarray]:
    """The search's state after all feedback, and the mixtures `[n, d]` and values `[n]` that it was told."""
    state = search.init()
    mixtures, values, errors = study.observations()
    for mixture, value, error in zip(mixtures, values, errors, strict=True):
        state = search.tell(state, mixture, float(value), error)
    return state, mixtures, values
