"""The masked Gaussian process: scikit-learn's posterior, whatever the padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from duet_jax.search import surrogate
from duet_jax.search.surrogate import Hyperparameters, Observations

D, N = 4, 11
condition, moments, fit, log_posterior = map(
    jax.jit, (surrogate.condition, surrogate.moments, surrogate.fit, surrogate.log_posterior)
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def observations(capacity: int, known: bool = True) -> Observations:
    rng = np.random.default_rng(0)
    mixtures, values = np.zeros((capacity, D)), np.zeros(capacity)
    stderrs = np.zeros(capacity)
    mixtures[:N] = rng.dirichlet(np.ones(D), N)
    values[:N] = 3 + 2 * np.sin(5 * mixtures[:N, 0]) + 0.1 * rng.standard_normal(N)
    if known:
        stderrs[:N] = rng.uniform(0.05, 0.3, N)
    return Observations(*map(jnp.asarray, (mixtures, values, stderrs, np.arange(capacity) < N)))


def hyperparameters() -> Hyperparameters:
    return Hyperparameters(*map(jnp.asarray, (np.log(0.6), np.log(1.7), np.log(0.03))))


def nothing_pending() -> tuple:
    return jnp.zeros((0, D)), jnp.zeros(0, bool)


def test_posterior_and_likelihood_equal_scikit_learn():
    seen, chosen = observations(16), hyperparameters()
    x, y = np.sqrt(seen.mixtures[:N]), np.asarray(seen.values[:N])
    spread = y.std(ddof=1)
    noise = 0.03 + surrogate.NOISE_FLOOR + (np.asarray(seen.stderrs[:N]) / spread) ** 2
    kernel = ConstantKernel(1.7) * Matern(0.6, nu=2.5)
    reference = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    reference.fit(x, (y - y.mean()) / spread)

    queries = np.random.default_rng(1).dirichlet(np.ones(D), 7)
    mean, deviation = reference.predict(np.sqrt(queries), return_std=True)
    posterior = condition(chosen, seen, *nothing_pending())
    found_mean, found_deviation = moments(posterior, jnp.sqrt(queries))
    np.testing.assert_allclose(found_mean, mean, atol=1e-8)
    np.testing.assert_allclose(found_deviation, deviation, atol=1e-8)

    prior = sum(
        -0.5 * ((value - m) / s) ** 2
        for value, m, s in zip(chosen, surrogate.PRIOR_MEAN, surrogate.PRIOR_SCALE, strict=True)
    )
    # We leave out the constant of the normal density; padded rows then add nothing.
    likelihood = reference.log_marginal_likelihood_value_ + 0.5 * N * np.log(2 * np.pi)
    assert float(log_posterior(chosen, seen)) == pytest.approx(float(likelihood + prior), abs=1e-8)


def test_padding_changes_nothing():
    queries = jnp.sqrt(np.random.default_rng(2).dirichlet(np.ones(D), 5))
    results = []
    for capacity in (N, 16, 64):
        seen = observations(capacity)
        fitted = fit(seen)
        posterior = condition(fitted, seen, *nothing_pending())
        results.append([*fitted, *moments(posterior, queries)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-8)


def test_fit_is_a_stationary_point_that_no_random_point_beats():
    seen = observations(16)
    fitted = fit(seen)
    top = float(log_posterior(fitted, seen))
    gradient = jax.grad(log_posterior)(fitted, seen)
    assert max(abs(float(g)) for g in gradient) < 0.05
    rng = np.random.default_rng(3)
    for _ in range(200):
        point = Hyperparameters(
            *(
                jnp.asarray(rng.normal(m, 1.5 * s))
                for m, s in zip(surrogate.PRIOR_MEAN, surrogate.PRIOR_SCALE, strict=True)
            )
        )
        assert float(log_posterior(point, seen)) <= top + 1e-3


def test_equal_feedback_and_a_single_observation_are_no_trouble():
    seen = observations(16)
    flat = seen._replace(values=jnp.where(seen.mask, 2.5, 0.0))
    single = seen._replace(mask=jnp.arange(16) < 1)
    for case in (flat, single):
        posterior = condition(fit(case), case, *nothing_pending())
        mean, deviation = moments(posterior, jnp.sqrt(case.mixtures[:3]))
        assert np.all(np.isfinite(mean)) and np.all(deviation > 0)


def test_pending_mixtures_lower_the_deviation_and_not_the_mean():
    seen, chosen = observations(16), hyperparameters()
    there = jnp.asarray([[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    without = condition(chosen, seen, *nothing_pending())
    with_ = condition(chosen, seen, there, jnp.asarray([True, False]))
    query = jnp.sqrt(there[:1])
    (mean, deviation), (new_mean, new_deviation) = (moments(p, query) for p in (without, with_))
    np.testing.assert_allclose(new_mean, mean, atol=1e-10)
    assert float(new_deviation[0]) < 0.5 * float(deviation[0])
