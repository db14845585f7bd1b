"""Objectives on the simplex whose optimum is known, and ways to hear them: with noise, or as stars.

Needs NumPy alone, so that other tools, in other environments, search the same things and hear the same noise.
Every formula takes its array module: `objective(mixture)` is NumPy, `objective(mixture, jnp)` works inside jit,
vmap and scan. All values are to be maximised.

    objective = draw("bumps", 9, seed=0)
    feedback = Feedback.draw("gaussian", objective, rounds=30, seed=0)
    value, stderr = feedback(objective(mixture), 0)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# What a domain without a share gets from the others: keeps logarithms and powers finite on faces.
SPILL = 0.01
POWER = 0.5


@dataclasses.dataclass(frozen=True)
class Objective:
    """A drawn function of a mixture.

    Attributes:
      name: one of `NAMES`.
      parameters: arrays of its formula; those of several seeds can be stacked where their shapes agree.
      best: float64 `[d]`, a mixture of the highest value.
      optimum: the highest value on the simplex.
      scale: standard deviation of the value over Dirichlet(1) draws, the unit of noise and of regret.
    """

    name: str
    parameters: dict[str, np.ndarray]
    best: np.ndarray
    optimum: float
    scale: float

    def __call__(self, mixture: Any, xp: Any = np) -> Any:
        """Values `[...]` of mixtures `[..., d]`."""
        return _FAMILIES[self.name][1](xp, mixture, **self.parameters)

    def regret(self, mixture: np.ndarray) -> float:
        """What the mixture lacks to the optimum, in units of `scale`, at least 0."""
        return max(0.0, float(self.optimum - self(mixture)) / self.scale)


def _linear(xp: Any, mixture: Any, slope: Any) -> Any:
    return mixture @ slope


def _entropic(xp: Any, mixture: Any, slope: Any, temperature: Any) -> Any:
    positive = xp.where(mixture > 0, mixture, 1.0)
    return mixture @ slope - temperature * xp.sum(mixture * xp.log(positive), axis=-1)


def _quadratic(xp: Any, mixture: Any, target: Any, root: Any) -> Any:
    return -xp.sum(((mixture - target) @ root) ** 2, axis=-1)


def _weighted_log(xp: Any, mixture: Any, weights: Any) -> Any:
    return xp.log(mixture + SPILL) @ weights


def _power_law(xp: Any, mixture: Any, weights: Any) -> Any:
    return -((mixture + SPILL) ** -POWER @ weights)


def _mixing_law(xp: Any, mixture: Any, weights: Any, helps: Any) -> Any:
    return -(xp.exp(-(mixture @ helps.T)) @ weights)


def _bumps(xp: Any, mixture: Any, centres: Any, heights: Any, widths: Any) -> Any:
    return xp.exp((xp.sqrt(mixture) @ centres.T - 1.0) / widths**2) @ heights


def _ackley(xp: Any, mixture: Any, target: Any) -> Any:
    size = target.shape[-1]
    # So that two random mixtures are about one ripple apart in every coordinate, whatever the number of domains.
    z = (3 * size) ** 0.5 * (xp.sqrt(mixture) - xp.sqrt(target))
    hill = 20 * xp.expm1(-0.2 * xp.sqrt(xp.mean(z**2, axis=-1)))
    return hill + xp.exp(xp.mean(xp.cos(2 * np.pi * z), axis=-1)) - np.e


def _draw_linear(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    slope = rng.standard_normal(size)
    return {"slope": slope}, np.eye(size)[np.argmax(slope)]


def _draw_entropic(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    slope, temperature = rng.standard_normal(size), 0.4
    shares = np.exp((slope - slope.max()) / temperature)
    return {"slope": slope, "temperature": np.float64(temperature)}, shares / shares.sum()


def _draw_quadratic(rng: np.random.Generator, size: int, support: int) -> tuple[dict, np.ndarray]:
    target = np.zeros(size)
    target[rng.permutation(size)[:support]] = rng.dirichlet(np.full(support, 2.0))
    root = rng.standard_normal((size, size)) / size**0.5 + 0.5 * np.eye(size)
    return {"target": target, "root": root}, target


def _draw_weighted_log(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    # The slopes w / (r + spill) are equal at the target.
    target = rng.dirichlet(np.ones(size))
    return {"weights": (target + SPILL) / (1 + size * SPILL)}, target


def _draw_power_law(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    target = rng.dirichlet(np.ones(size))
    return {"weights": (target + SPILL) ** (POWER + 1)}, target


def _draw_mixing_law(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    """As many losses as domains; each is helped by about a third of the domains."""
    helps = rng.exponential(3.0, (size, size)) * (rng.uniform(size=(size, size)) < 0.3) + 3.0 * np.eye(size)
    weights = rng.dirichlet(np.ones(size))
    return {"weights": weights, "helps": helps}, _solve_mixing_law(weights, helps)


def _draw_bumps(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    count = rng.integers(3, 6)
    parameters = {
        "centres": np.sqrt(rng.dirichlet(np.full(size, 0.7), count)),
        "heights": np.concatenate([[1.0], rng.uniform(0.6, 0.95, count - 1)]),
        "widths": rng.uniform(0.25, 0.45, count),
    }
    return parameters, _solve_bumps(rng=rng, **parameters)


def _draw_ackley(rng: np.random.Generator, size: int) -> tuple[dict, np.ndarray]:
    target = rng.dirichlet(np.ones(size))
    return {"target": target}, target


def _solve_mixing_law(weights: np.ndarray, helps: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """The highest point: Newton's method with a logarithmic barrier, until the Frank-Wolfe gap certifies it."""
    size = helps.shape[1]
    mixture = np.full(size, 1 / size)
    for barrier in 10.0 ** np.arange(-1.0, -13.0, -0.5):
        for _ in range(30):
            losses = weights * np.exp(-helps @ mixture)
            # In units of the shares, so that those near 0 do not spoil the condition of the system.
            slope = mixture * (helps.T @ losses) + barrier
            curvature = (helps.T * losses) @ helps * np.outer(mixture, mixture) + barrier * np.eye(size)
            free, ones = np.linalg.solve(curvature, np.stack([slope, mixture], 1)).T
            step = free - (mixture @ free) / (mixture @ ones) * ones
            mixture = mixture * (1 + step * min(1.0, 0.9 / max(-step.min(), 1e-12)))
            mixture /= mixture.sum()
            if np.abs(step).max() < 1e-6:
                break
    slope = helps.T @ (weights * np.exp(-helps @ mixture))
    if slope.max() - slope @ mixture > tolerance:
        raise RuntimeError(f"The optimum of the mixing law was not found to {tolerance}.")
    return mixture


def _solve_bumps(centres: np.ndarray, heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The highest point of a sum of bumps, by a dense search and a polish.

    On the sphere of roots the value is a convex function, so a step to the direction of its gradient never descends.
    The gradient is a sum of centres with positive weights: every maximum is such a sum, and so the search runs over
    the few weights, whatever the number of domains.
    """
    roots = rng.dirichlet(np.full(len(centres), 0.5), 4096) @ centres
    roots = np.concatenate([centres, roots / np.linalg.norm(roots, axis=1, keepdims=True)])

    def each(roots: np.ndarray) -> np.ndarray:
        return heights * np.exp((roots @ centres.T - 1.0) / widths**2)

    roots = roots[np.argsort(-each(roots).sum(1))[:256]]
    for _ in range(2000):
        moved = (each(roots) / widths**2) @ centres
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        change, roots = np.abs(moved - roots).max(), moved
        if change < 1e-14:
            break
    best = roots[np.argmax(each(roots).sum(1))]
    return best**2 / np.sum(best**2)


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "linear": (_draw_linear, _linear),
    "entropic": (_draw_entropic, _entropic),
    "quadratic-interior": (lambda rng, size: _draw_quadratic(rng, size, size), _quadratic),
    "quadratic-face": (lambda rng, size: _draw_quadratic(rng, size, (size + 1) // 2), _quadratic),
    "quadratic-vertex": (lambda rng, size: _draw_quadratic(rng, size, 1), _quadratic),
    "weighted-log": (_draw_weighted_log, _weighted_log),
    "power-law": (_draw_power_law, _power_law),
    "mixing-law": (_draw_mixing_law, _mixing_law),
    "bumps": (_draw_bumps, _bumps),
    "ackley": (_draw_ackley, _ackley),
}
NAMES = tuple(_FAMILIES)


def draw(name: str, size: int, seed: int) -> Objective:
    """An objective of a family for `size` domains; the same arguments always draw the same one."""
    rng = np.random.default_rng([seed, size, NAMES.index(name)])
    parameters, best = _FAMILIES[name][0](rng, size)
    bare = Objective(name, parameters, best, float("nan"), 1.0)
    spread = float(np.std(bare(np.random.default_rng(0).dirichlet(np.ones(size), 4096))))
    return dataclasses.replace(bare, optimum=float(bare(best)), scale=spread)


KINDS = ("gaussian", "known", "stars")
# People who rate each model, and what they disagree by, in units of the objective's scale.
RATERS, DISAGREEMENT = 5, 0.5


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What is heard of an objective in each round: the same noise for every tool.

    Attributes:
      kind: "gaussian" noise of one size that the search is not told; "known" standard errors that differ by round;
        "stars", the mean of 1 to 5 stars of `RATERS` people.
      noise: float64 `[rounds, 1]`, or `[rounds, RATERS]`.
      stderrs: float64 `[rounds]`, known standard errors, or None.
      thresholds: float64 `[4]`, values at which a rater gives one more star, or None.
    """

    kind: str
    noise: np.ndarray
    stderrs: np.ndarray | None
    thresholds: np.ndarray | None

    @classmethod
    def draw(cls, kind: str, objective: Objective, rounds: int, seed: int, fraction: float = 0.2) -> Feedback:
        """Noise of `fraction` of the objective's scale (for "known" its median; for "stars" it does not count)."""
        # One draw of rows by round, so that a longer study begins with the noise of a shorter one.
        numbers = np.random.default_rng([seed, KINDS.index(kind)]).standard_normal((rounds, RATERS))
        if kind == "stars":
            return cls(kind, DISAGREEMENT * objective.scale * numbers, None, _thresholds(objective))
        sizes = fraction * objective.scale * np.exp(0.7 * numbers[:, 1] * (kind == "known"))
        return cls(kind, sizes[:, None] * numbers[:, :1], sizes if kind == "known" else None, None)

    def __call__(self, value: Any, number: Any, xp: Any = np) -> tuple[Any, Any]:
        """What is heard of `value` in a round counted from 0, and its standard error where that is known."""
        heard = self.ratings(value, number, xp)
        stderr = None if self.stderrs is None else xp.asarray(self.stderrs)[number]
        return xp.mean(heard), stderr

    def ratings(self, value: Any, number: Any, xp: Any = np) -> Any:
        """Each rater's stars `[RATERS]`; of other feedback the one number `[1]`."""
        heard = value + xp.asarray(self.noise)[number]
        if self.thresholds is None:
            return heard
        return 1.0 + xp.sum(heard[:, None] > xp.asarray(self.thresholds), axis=1)


def _thresholds(objective: Objective) -> np.ndarray:
    """Quintiles over random mixtures that are pulled a random part of the way to the best one.

    Over random mixtures alone, five stars would come long before the search is near the optimum.
    """
    rng = np.random.default_rng(1)
    mixtures = rng.dirichlet(np.ones(len(objective.best)), 4096)
    part = rng.uniform(size=(4096, 1))
    return np.quantile(objective(mixtures + part * (objective.best - mixtures)), [0.2, 0.4, 0.6, 0.8])
