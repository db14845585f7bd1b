"""The objectives of the benchmarks: their optimum is the optimum, both forms agree, and all is drawn by seed."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
objectives = importlib.import_module("search_objectives")

SIZES = (3, 9, 20)


@pytest.mark.parametrize("size", [2, *SIZES, 50])
@pytest.mark.parametrize("name", objectives.NAMES)
def test_no_random_mixture_beats_the_optimum(name, size):
    rng = np.random.default_rng(0)
    for seed in range(5):
        objective = objectives.draw(name, size, seed)
        best = objective.best
        assert np.all(best >= 0) and abs(best.sum() - 1) < 1e-12
        assert objective(best) == objective.optimum and objective.scale > 0
        # Everywhere, on faces, and closer and closer to the best mixture.
        near = best + rng.uniform(size=(2000, 1)) ** 4 * (rng.dirichlet(np.ones(size), 2000) - best)
        mixtures = np.concatenate(
            [np.eye(size), rng.dirichlet(np.ones(size), 2000), rng.dirichlet(np.full(size, 0.2), 2000), near]
        )
        values = objective(mixtures)
        assert np.all(np.isfinite(values))
        assert values.max() <= objective.optimum + 1e-9 * objective.scale


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", objectives.NAMES)
def test_no_local_search_beats_the_optimum(name, size):
    """From random mixtures, from where the best of them is, and from the optimum itself."""
    rng = np.random.default_rng(1)
    objective = objectives.draw(name, size, 0)
    draws = rng.dirichlet(np.ones(size), 500)
    starts = [draws[0], draws[np.argmax(objective(draws))], objective.best]
    for start in starts:
        found = minimize(
            lambda mixture: -float(objective(np.maximum(mixture, 0) / np.maximum(mixture, 0).sum())) / objective.scale,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * size,
            constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1},
            options={"maxiter": 30},
        )
        assert -found.fun <= objective.optimum / objective.scale + 1e-9


@pytest.mark.parametrize("size", [2, *SIZES, 50])
def test_a_gap_certifies_the_mixing_law(size):
    for seed in range(10):
        objective = objectives.draw("mixing-law", size, seed)
        weights, helps = objective.parameters["weights"], objective.parameters["helps"]
        slope = helps.T @ (weights * np.exp(-helps @ objective.best))
        assert slope.max() - slope @ objective.best <= 1e-10


@pytest.mark.parametrize("name", objectives.NAMES)
def test_both_forms_agree_inside_jit_vmap_and_scan(name):
    objective = objectives.draw(name, 5, 3)
    mixtures = np.concatenate([np.random.default_rng(0).dirichlet(np.ones(5), 50), np.eye(5), [objective.best]])
    expected = objective(mixtures)
    np.testing.assert_allclose([objective(mixture) for mixture in mixtures], expected, rtol=1e-12, atol=1e-12)
    with jax.enable_x64(True):
        traced = partial(objective, xp=jnp)
        mapped = jax.jit(jax.vmap(traced))(jnp.asarray(mixtures))
        _, scanned = jax.lax.scan(lambda _, mixture: (None, traced(mixture)), None, jnp.asarray(mixtures))
    np.testing.assert_allclose(mapped, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scanned, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", objectives.NAMES)
def test_a_seed_draws_the_same_objective_and_another_seed_another(name):
    first, again, other = (objectives.draw(name, 9, seed) for seed in (4, 4, 5))
    mixture = np.random.default_rng(0).dirichlet(np.ones(9))
    assert first(mixture) == again(mixture) != other(mixture)
    assert first.scale == again.scale and np.array_equal(first.best, again.best)


def test_regret_is_in_units_of_the_scale():
    objective = objectives.draw("linear", 4, 0)
    worst = np.eye(4)[np.argmin(objective.parameters["slope"])]
    assert objective.regret(objective.best) == 0
    span = np.ptp(objective.parameters["slope"])
    assert objective.regret(worst) == pytest.approx(span / objective.scale)


@pytest.mark.parametrize("kind", objectives.KINDS)
def test_noise_depends_on_seed_and_round_alone(kind):
    objective = objectives.draw("entropic", 4, 0)
    longer, shorter = (objectives.Feedback.draw(kind, objective, rounds, 7) for rounds in (60, 30))
    values = np.random.default_rng(0).normal(size=30)
    assert [longer(v, t) for t, v in enumerate(values)] == [shorter(v, t) for t, v in enumerate(values)]
    other = objectives.Feedback.draw(kind, objective, 30, 8)
    assert not np.array_equal(other.noise, longer.noise)


def test_gaussian_and_known_noise_have_the_size_they_claim():
    objective = objectives.draw("entropic", 4, 0)
    gaussian = objectives.Feedback.draw("gaussian", objective, 20_000, 0, fraction=0.3)
    heard = np.array([gaussian(1.0, t)[0] for t in range(20_000)])
    assert gaussian(1.0, 0)[1] is None
    assert heard.mean() == pytest.approx(1.0, abs=4 * 0.3 * objective.scale / 20_000**0.5)
    assert heard.std() == pytest.approx(0.3 * objective.scale, rel=0.03)
    known = objectives.Feedback.draw("known", objective, 20_000, 0, fraction=0.3)
    pairs = np.array([known(1.0, t) for t in range(20_000)])
    assert np.std((pairs[:, 0] - 1) / pairs[:, 1]) == pytest.approx(1.0, rel=0.03)
    assert np.median(pairs[:, 1]) == pytest.approx(0.3 * objective.scale, rel=0.05)


def test_stars_rise_with_the_value_and_are_a_mean_of_whole_ratings():
    objective = objectives.draw("quadratic-face", 9, 0)
    stars = objectives.Feedback.draw("stars", objective, 50, 0)
    assert np.all(np.diff(stars.thresholds) > 0)
    levels = np.linspace(objective.optimum - 20 * objective.scale, objective.optimum + 5 * objective.scale, 200)
    for t in range(50):
        heard = np.array([stars(level, t)[0] for level in levels])
        assert np.all(np.diff(heard) >= 0) and heard[0] == 1 and heard[-1] == 5
        np.testing.assert_allclose(heard * objectives.RATERS, np.round(heard * objectives.RATERS), atol=1e-12)
    with jax.enable_x64(True):
        traced = jax.jit(lambda value, t: stars(value, t, jnp)[0])(levels[100], 3)
    assert float(traced) == pytest.approx(stars(levels[100], 3)[0])
