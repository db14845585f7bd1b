"""What the search believes after all feedback, rebuilt from the trial files."""

from __future__ import annotations

import dataclasses

import numpy as np

from duet_jax.recall import make_search, recall
from duet_jax.search.diagnostics import Report, diagnose
from duet_jax.study import Study

POINTS = 41


@dataclasses.dataclass(frozen=True)
class Slice:
    """Prediction along one domain: from none of it to nothing else, the other domains in fixed proportions.

    Attributes:
      shares: float64 `[n]`, of the domain, ascending.
      mean: float64 `[n]`, of the noise-free feedback.
      stderr: float64 `[n]`.
      at: share of the domain in the best mixture.
    """

    shares: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    at: float


@dataclasses.dataclass(frozen=True)
class Belief:
    """The surrogate's view of a study with at least one feedback.

    Attributes:
      best: index of the observation with the highest posterior mean.
      mixtures, values: the observations, float64 `[n, d]` and `[n]`.
      mean, stderr: posterior of the noise-free feedback at the observations, float64 `[n]`.
      uniform: posterior mean and standard deviation at the uniform mixture.
      slices: one a domain, through the best mixture.
      report: which domains matter, the learned noise, and each feedback predicted from all others.
    """

    best: int
    mixtures: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    uniform: tuple[float, float]
    slices: tuple[Slice, ...]
    report: Report


def believe(study: Study) -> Belief | None:
    """Tells the feedback of a study to its search; None before any."""
    search = make_search(study.config)
    state, mixtures, values = recall(search, study)
    count, domains = mixtures.shape
    if count == 0:
        return None
    mean, stderr = search.predict(state, mixtures)
    best = int(np.argmax(mean))
    lines = [_line(mixtures[best], i) for i in range(domains)]
    asked = np.concatenate([np.full((1, domains), 1 / domains), *lines])
    means, stderrs = search.predict(state, asked)
    slices = []
    for i in range(domains):
        part = slice(1 + i * POINTS, 1 + (i + 1) * POINTS)
        slices.append(Slice(lines[i][:, i], means[part], stderrs[part], float(mixtures[best, i])))
    uniform = (float(means[0]), float(stderrs[0]))
    return Belief(best, mixtures, values, mean, stderr, uniform, tuple(slices), diagnose(search, state))


def _line(mixture: np.ndarray, domain: int) -> np.ndarray:
    """Mixtures `[POINTS, d]`: the share of `domain` goes from 0 to 1, the others keep their proportions."""
    rest = mixture.copy()
    rest[domain] = 0.0
    if rest.sum() == 0:
        rest = np.ones_like(mixture)
        rest[domain] = 0.0
    shares = np.linspace(0.0, 1.0, POINTS)[:, None]
    return shares * np.eye(len(mixture))[domain] + (1.0 - shares) * rest / rest.sum()
