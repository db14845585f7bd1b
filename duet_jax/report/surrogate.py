"""What the search believes after all feedback, rebuilt from the trial files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from duet_jax.recall import at_target, make_search, make_space, recall
from duet_jax.search.diagnostics import Report, diagnose, difference
from duet_jax.search.space import Choice, Number, Setting
from duet_jax.study import Study
from duet_jax.trial import words

# Of a line, and along each side of a triangle (less one).
POINTS, SIDE = 41, 20


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
class Along:
    """Prediction along one training setting, the mixture and all other settings those of the best.

    Attributes:
      name: of the field, without those above it.
      values: numbers, ascending; or words.
      mean, stderr: float64 `[n]`, of the noise-free feedback.
      at: value of the best.
      log: whether the numbers are on a logarithmic scale.
    """

    name: str
    values: tuple[float, ...] | tuple[str, ...]
    mean: np.ndarray
    stderr: np.ndarray
    at: float | str
    log: bool


@dataclasses.dataclass(frozen=True)
class Belief:
    """The surrogate's view of a study with at least one feedback.

    All but `heard` is at the target fidelity, and all along mixtures with the settings of the best.

    Attributes:
      best: index of the observation with the highest posterior mean.
      settings: of the best, by dotted path.
      mixtures, values: the observations, float64 `[n, d]` and `[n]`.
      mean, stderr: posterior of the noise-free feedback at the observations, float64 `[n]`.
      heard: posterior mean at the observations with the fidelity that they had, float64 `[n]`.
      uniform: posterior mean and standard deviation at the uniform mixture.
      gain: of the best over the uniform mixture, posterior mean and standard deviation of the difference.
      field: mixtures float64 `[g, 3]` all over the triangle and their posterior means `[g]`; None but of three domains.
      slices: one a domain, through the best mixture; none of a single domain.
      along: one a setting.
      report: which domains matter, the learned noise, and each feedback predicted from all others; None of a single
        domain.
    """

    best: int
    settings: dict[str, Any]
    mixtures: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    heard: np.ndarray
    uniform: tuple[float, float]
    gain: tuple[float, float]
    field: tuple[np.ndarray, np.ndarray] | None
    slices: tuple[Slice, ...]
    along: tuple[Along, ...]
    report: Report | None


def believe(study: Study) -> Belief | None:
    """Tells the feedback of a study to its search; None before any."""
    search = make_search(study.config, study.sizes())
    state, told, mixtures, values = recall(search, study)
    count, domains = mixtures.shape
    if count == 0:
        return None
    at = [at_target(study.config, trial) for trial in told]
    mean, stderr = search.predict(state, mixtures, at)
    heard, _ = search.predict(state, mixtures, [trial.settings for trial in told])
    # Of trials as good as the same the first one, as `duet run` says it.
    best = int(np.argmax(mean >= mean.max() - 1e-6 * np.ptp(mean)))
    lines = [_line(mixtures[best], i) for i in range(domains)] if domains > 1 else []
    uniform = np.full(domains, 1 / domains)
    everywhere = _triangle() if domains == 3 else np.zeros((0, domains))
    asked = np.concatenate([uniform[None], *lines, everywhere])
    means, stderrs = search.predict(state, asked, at[best])
    slices = []
    for i, line in enumerate(lines):
        part = slice(1 + i * POINTS, 1 + (i + 1) * POINTS)
        slices.append(Slice(line[:, i], means[part], stderrs[part], float(mixtures[best, i])))
    equal = (float(means[0]), float(stderrs[0]))
    field = (everywhere, means[len(means) - len(everywhere) :]) if domains == 3 else None
    # The shares of a trial are those of whole examples.
    same = np.abs(mixtures[best] - uniform).max() * study.config.budget < 1.0
    gain = (0.0, 0.0) if same else difference(search, state, mixtures[best], uniform, at[best])
    along = []
    for setting in make_space(study.config).settings:
        own = at[best][setting.name]
        others = _others(setting, own)
        given = [{**at[best], setting.name: value} for value in others]
        means, stderrs = search.predict(state, np.tile(mixtures[best], (len(given), 1)), given)
        along.append(_along(setting, others, means, stderrs, own))
    report = diagnose(search, state)
    return Belief(
        best, at[best], mixtures, values, mean, stderr, heard, equal, gain, field, tuple(slices), tuple(along), report
    )


def _others(setting: Setting, own: Any) -> list[Any]:
    """Values of a setting to compare, ascending if they are numbers: of members, those that differ by one or none."""
    if isinstance(setting, Number):
        values = [setting.decode(np.array([x])) for x in np.linspace(0.0, 1.0, POINTS)]
        return sorted(set(values))
    if isinstance(setting, Choice):
        return list(setting.values)
    changed = [
        tuple(each for each in setting.members if (each in own) != (each == member)) for member in setting.members
    ]
    return [own, *(members for members in changed if len(members) >= setting.least)]


def _along(setting: Setting, values: Sequence[Any], mean: np.ndarray, stderr: np.ndarray, own: Any) -> Along:
    name = setting.name.rpartition(".")[2]
    if isinstance(setting, Number):
        return Along(name, tuple(map(float, values)), mean, stderr, float(own), setting.log)
    told = [words({name: value})[name] for value in values]
    return Along(name, tuple(told), mean, stderr, words({name: own})[name], False)


def _line(mixture: np.ndarray, domain: int) -> np.ndarray:
    """Mixtures `[POINTS, d]`: the share of `domain` goes from 0 to 1, the others keep their proportions."""
    rest = mixture.copy()
    rest[domain] = 0.0
    if rest.sum() == 0:
        rest = np.ones_like(mixture)
        rest[domain] = 0.0
    shares = np.linspace(0.0, 1.0, POINTS)[:, None]
    return shares * np.eye(len(mixture))[domain] + (1.0 - shares) * rest / rest.sum()


def _triangle() -> np.ndarray:
    """Mixtures of three domains all over the simplex, `[g, 3]`."""
    parts = [(i, j, SIDE - i - j) for i in range(SIDE + 1) for j in range(SIDE + 1 - i)]
    return np.array(parts, np.float64) / SIDE
