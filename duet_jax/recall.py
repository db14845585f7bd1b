"""The search that a study's files amount to: its settings, and its state after all feedback."""

from __future__ import annotations

import numpy as np

from duet_jax.config import StudyConfig
from duet_jax.search import Observations, Search
from duet_jax.study import Study


def make_search(config: StudyConfig) -> Search:
    """The outer search that a study's configuration describes."""
    chosen = config.search
    return Search(num_domains=len(config.data.domains), beta=chosen.beta, floor=chosen.floor, initial=chosen.initial)


def recall(search: Search, study: Study) -> tuple[Observations, np.ndarray, np.ndarray]:
    """The search's state after all feedback, and the mixtures `[n, d]` and values `[n]` that it was told."""
    state = search.init()
    mixtures, values, errors = study.observations()
    for mixture, value, error in zip(mixtures, values, errors, strict=True):
        state = search.tell(state, mixture, float(value), error)
    return state, mixtures, values
