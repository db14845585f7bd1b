"""What a search says of itself, against what it says when it is asked the long way round."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.search import BestOf, Comparisons, Constraints, Group, Scores, Search, Stars
from duet_jax.search import diagnostics as module
from duet_jax.search.constraints import contains
from duet_jax.search.diagnostics import LEVELS, diagnose, difference, importances, share_grids

D, N = 4, 11
SEARCH = Search(num_domains=D)


def told(search: Search, count: int = N, scale: float = 1.0, noise: float = 0.05):
    rng = np.random.default_rng(0)
    state = search.init()
    for i, mixture in enumerate(rng.dirichlet(np.ones(search.num_domains), count)):
        value = 3 + np.sin(4 * mixture[0]) + 0.5 * mixture[1] + noise * rng.standard_normal()
        state = search.tell(state, mixture, scale * value, scale * 0.1 if i % 3 == 0 else None)
    return state


def fitted(search: Search, state):
    """The hyperparameters, and the problem that they were fitted to."""
    (posterior,) = module._fitted(search, state)
    return posterior.hyperparameters, search.feedback.problem(search.surrogate, state, 0)


def test_leaving_out_in_closed_form_is_really_leaving_out():
    state = told(SEARCH)
    report = diagnose(SEARCH, state)
    surrogate = SEARCH.surrogate
    with jax.enable_x64(True):
        hyperparameters, problem = fitted(SEARCH, state)
        noise = np.exp(hyperparameters.noise) + 1e-6 + problem.variances

        @jax.jit
        def predict_without(i):
            kept = jnp.arange(len(problem.values)) != i
            # A row out of use is one that was never told.
            inputs = problem.inputs._replace(mask=problem.inputs.mask * kept)
            without = problem._replace(inputs=inputs, values=problem.values * kept)
            posterior = surrogate.condition(hyperparameters, without, surrogate.inputs(jnp.zeros((0, D))))
            mean, deviation = surrogate.moments(posterior, jnp.sqrt(state.mixtures[i][None]))
            return problem.centre + problem.spread * mean[0], problem.spread * jnp.hypot(deviation[0], noise[i] ** 0.5)

        expected = np.array([predict_without(i) for i in range(N)])
    np.testing.assert_allclose(report.left_out.mean, expected[:, 0], atol=1e-8)
    np.testing.assert_allclose(report.left_out.stderr, expected[:, 1], atol=1e-8)
    values = np.asarray(state.feedback.values)[:N, 0]
    np.testing.assert_allclose(report.left_out.values, values, rtol=1e-9)


def test_calibration_is_counted_from_residuals():
    _, _, stderr, residuals, coverage, log_density = found = diagnose(SEARCH, told(SEARCH)).left_out
    np.testing.assert_allclose(residuals, (found.values - found.mean) / stderr)
    np.testing.assert_allclose(coverage, [np.mean(np.abs(residuals) < limit) for limit in (0.67449, 1.28155, 1.95996)])
    density = np.exp(-0.5 * residuals**2) / (stderr * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(log_density, np.log(density))


def test_main_effects_are_averages_of_the_posterior():
    state = told(SEARCH)
    effects = diagnose(SEARCH, state).effects
    rng = np.random.default_rng(1)
    for domain, at in ((0, 0), (0, 16), (1, 8), (2, 32)):
        share = effects.shares[domain, at]
        mixtures = np.insert((1 - share) * rng.dirichlet(np.ones(D - 1), 4000), domain, share, axis=1)
        mean, _ = SEARCH.predict(state, mixtures)
        assert effects.mean[domain, at] == pytest.approx(mean.mean(), abs=4 * mean.std() / 4000**0.5 + 2e-3)
    np.testing.assert_allclose(effects.shares[:, [0, -1]], [[0, 1]] * D)
    # All of one domain is one mixture.
    mean, stderr = SEARCH.predict(state, np.eye(D))
    np.testing.assert_allclose(effects.mean[:, -1], mean, atol=1e-9)
    np.testing.assert_allclose(effects.stderr[:, -1], stderr, atol=1e-9)


def test_the_deviation_of_an_average_is_that_of_joint_samples():
    state = told(SEARCH)
    effects = diagnose(SEARCH, state).effects
    surrogate, share = SEARCH.surrogate, effects.shares[1, 10]
    mixtures = np.insert((1 - share) * np.random.default_rng(2).dirichlet(np.ones(D - 1), 1500), 1, share, axis=1)
    with jax.enable_x64(True):
        hyperparameters, problem = fitted(SEARCH, state)
        queries, seen = surrogate.inputs(jnp.sqrt(mixtures)), problem.inputs
        noise = jnp.where(seen.mask > 0, jnp.exp(hyperparameters.noise) + 1e-6 + problem.variances, 1.0)
        inside = surrogate.covariance(hyperparameters, seen, seen) + jnp.diag(noise)
        cross = surrogate.covariance(hyperparameters, queries, seen)
        joint = surrogate.covariance(hyperparameters, queries, queries) - cross @ jnp.linalg.solve(inside, cross.T)
        expected = float(problem.spread * jnp.sqrt(jnp.mean(joint)))
    assert effects.stderr[1, 10] == pytest.approx(expected, rel=0.02)
    # The average is known better than what it is an average of.
    assert effects.stderr[1, 10] < 0.9 * SEARCH.predict(state, mixtures)[1].mean()


def test_the_domain_that_matters_is_found():
    search = Search(num_domains=9)
    state = search.init()
    rng = np.random.default_rng(0)
    for mixture in rng.dirichlet(np.ones(9), 50):
        state = search.tell(state, mixture, np.sqrt(mixture[2]) + 0.01 * rng.standard_normal())
    report = diagnose(search, state)
    others = np.delete(np.arange(9), 2)
    np.testing.assert_allclose(report.left_out.coverage, LEVELS, atol=0.15)
    assert report.effects.importance[2] > 0.97 and report.effects.importance[others].max() < 0.05
    assert report.relevance[2] > 0.6 and report.relevance.sum() == pytest.approx(1)
    assert report.lengthscales.argmin() == 2
    assert report.noise == pytest.approx(0.01, rel=0.6) and report.amplitude > 5 * report.noise
    at = np.searchsorted(report.effects.shares[2], 0.2)
    truth = np.sqrt(report.effects.shares[2, at])
    assert abs(report.effects.mean[2, at] - truth) < 3 * report.effects.stderr[2, at] + 0.01


def test_importance_of_a_linear_value_is_known_in_closed_form():
    # Of a share r of a uniform mixture, another one has mean (1 - r) / (d - 1).
    size = 5
    shares = share_grids(Constraints(), size)
    mean, within = (1 - shares) / (size - 1), np.zeros_like(shares)
    mean[0] = shares[0]
    scale = (1 - shares[1:]) ** 2
    within[1:] = scale * (size - 2) / ((size - 1) ** 2 * size)
    np.testing.assert_allclose(importances(shares, mean, within), [1, *[1 / (size - 1) ** 2] * 4], atol=2e-3)
    np.testing.assert_array_equal(importances(shares, 0 * mean, 0 * within), np.zeros(size))
    # Of two domains one is what the other leaves.
    pair = share_grids(Constraints(), 2)
    np.testing.assert_allclose(importances(pair, np.array([pair[0], 1 - pair[1]]), 0 * pair), 1)


def test_padding_and_units_change_nothing():
    reports = [
        diagnose(search, told(search, scale=scale))
        for search, scale in ((SEARCH, 1.0), (dataclasses.replace(SEARCH, capacity=40), 1.0), (SEARCH, 1e3))
    ]
    first, padded, scaled = reports
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-8)
    for name in ("mean", "stderr"):
        for part in ("effects", "left_out"):
            one, two = (getattr(getattr(report, part), name) for report in (first, scaled))
            np.testing.assert_allclose(1e3 * one, two, rtol=1e-6)
    np.testing.assert_allclose(first.left_out.residuals, scaled.left_out.residuals, rtol=1e-5, atol=1e-6)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(first) if isinstance(leaf, np.ndarray))
    assert not jax.config.jax_enable_x64


def test_constraints_hold_wherever_effects_are_averaged(monkeypatch):
    free = Constraints(minimum=(0.1, 0, 0, 0), maximum=(1, 0.5, 0.25, 1), groups=(Group((2, 3), 0.2, 0.4),))
    shares = share_grids(free, D)
    np.testing.assert_allclose(shares[:, [0, -1]], [[0.1, 0.8], [0, 0.5], [0, 0.25], [0, 0.4]], atol=1e-12)
    assert np.all(np.diff(shares) > 0)
    # With the second domain frozen.
    constraints = dataclasses.replace(free, minimum=(0.1, 0.3, 0, 0), maximum=(1, 0.3, 0.25, 1))
    seen: list[np.ndarray] = []
    surrogate = SEARCH.surrogate

    class Watched(type(surrogate)):
        def inputs(self, points, mask=None):
            jax.debug.callback(lambda x: seen.append(np.asarray(x) ** 2), points)
            return super().inputs(points, mask)

    monkeypatch.setattr(Search, "surrogate", Watched(D))
    effects = diagnose(dataclasses.replace(SEARCH, constraints=constraints), told(SEARCH)).effects
    jax.effects_barrier()
    averaged = [points for points in seen if len(points) == module.DRAWS]
    assert len(averaged) == shares.size
    with jax.enable_x64(True):
        assert all(bool(jnp.all(contains(points, constraints, D))) for points in averaged)
    fixed = np.sort([[points[:, i].std() < 1e-12 for i in range(D)] for points in averaged], axis=1)
    assert np.all(fixed[:, -1])
    assert np.all(np.isfinite(np.concatenate([np.ravel(x) for x in effects])))
    assert np.all((effects.importance >= 0) & (effects.importance <= 1)) and effects.importance[0] > 0.4
    np.testing.assert_allclose(effects.shares[1], 0.3)
    assert effects.importance[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("feedback", "tell"),
    [
        (Stars(levels=5), lambda x: [1 + round(4 * x), 1 + round(4 * x)]),
        (BestOf(), lambda x: [x, x - 0.1, x - 0.02]),
        (Scores(), lambda x: 0.5),
    ],
    ids=["stars", "best of", "constant"],
)
def test_every_kind_of_feedback_with_values_has_a_diagnosis(feedback, tell):
    search = Search(num_domains=3, feedback=feedback)
    state = search.init()
    for count, mixture in enumerate(np.random.default_rng(0).dirichlet(np.ones(3), 12), start=1):
        state = search.tell(state, mixture, tell(float(mixture[0])))
        if count in (1, 12):
            report = diagnose(search, state)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(report))
            assert len(report.left_out.values) == count and np.all(report.left_out.stderr > 0)
    if not isinstance(feedback, Scores):
        assert report.effects.importance.argmax() == 0
        assert np.corrcoef(report.left_out.values, np.asarray(state.mixtures)[:12, 0])[0, 1] > 0.5


@pytest.mark.parametrize("cutoff", [math.inf, 0.4])
def test_what_the_best_of_several_scores_falls_short_of(cutoff):
    search, rng = Search(num_domains=3, feedback=BestOf(cutoff)), np.random.default_rng(0)
    state = search.init()
    for number, mixture in enumerate(rng.dirichlet(np.ones(3), 12)):
        state = search.tell(state, mixture, float(mixture[0]) - rng.uniform(0.0, 0.3, 2 + number % 7))
    found = diagnose(search, state).shortfall
    np.testing.assert_array_equal(found.number, np.arange(1, 9))
    # Exponential variables of the rate that was found, given that they are at most the cutoff.
    uniform = rng.uniform(size=(200_000, 8))
    draws = -np.log1p(uniform * np.expm1(-found.rate * cutoff)) / found.rate
    least = np.minimum.accumulate(draws, axis=1)
    np.testing.assert_allclose(found.mean, least.mean(axis=0), rtol=0.02)
    np.testing.assert_allclose(found.deviation, least.std(axis=0), rtol=0.02)
    # Without a cutoff the least of k is exponential of k times the rate.
    if cutoff == math.inf:
        np.testing.assert_allclose(found.mean * found.number, 1 / found.rate)
    assert 2 < found.rate < 20


def test_what_cannot_be_diagnosed():
    with pytest.raises(ValueError, match="before the first feedback"):
        diagnose(SEARCH, SEARCH.init())
    tasks = Search(num_domains=3, feedback=Scores(weights=(0.5, 0.5)))
    with pytest.raises(ValueError, match="one task at a time"):
        diagnose(tasks, tasks.init())
    compared = Search(num_domains=3, feedback=Comparisons())
    with pytest.raises(ValueError, match="comparisons"):
        diagnose(compared, compared.init())


def test_the_difference_of_two_mixtures_is_that_of_the_joint_posterior():
    state = told(SEARCH)
    one, other = np.array([0.7, 0.1, 0.1, 0.1]), np.full(D, 0.25)
    mean, stderr = difference(SEARCH, state, one, other, {})
    means, deviations = SEARCH.predict(state, [one, other])
    assert mean == pytest.approx(means[0] - means[1], abs=1e-9)
    with jax.enable_x64(True):
        (posterior,) = module._fitted(SEARCH, state)
        queries = SEARCH.surrogate.inputs(jnp.sqrt(jnp.stack([one, other])))
        kernel = lambda a, b: np.asarray(SEARCH.surrogate.covariance(posterior.hyperparameters, a, b))  # noqa: E731
        cross = kernel(queries, posterior.inputs)
        known = kernel(posterior.inputs, posterior.inputs) + np.diag(posterior.diagonal)
        covariance = kernel(queries, queries) - cross @ np.linalg.solve(known, cross.T)
        spread = float(posterior.spread)
    assert stderr == pytest.approx(spread * np.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1])), rel=1e-6)
    # What is not known of both alike does not blur their comparison.
    assert covariance[0, 1] != 0 and stderr != pytest.approx(math.hypot(*deviations), rel=1e-3)
    assert difference(SEARCH, state, other, one, {}) == pytest.approx((-mean, stderr))
    assert difference(SEARCH, state, one, one, {}) == (0.0, pytest.approx(0.0, abs=1e-6))


def test_the_difference_of_several_tasks_has_no_scale():
    search = Search(num_domains=2, feedback=Scores(weights=(0.5, 0.5)))
    with pytest.raises(ValueError, match="of 2 tasks, which have no scale in common"):
        difference(search, search.init(), np.array([1.0, 0.0]), np.array([0.5, 0.5]), {})
