"""Acquisitions against closed forms and quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from duet_jax.search import Search
from duet_jax.search.acquisition import beta_at, draw, log_expected_improvement

D = 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_log_expected_improvement_is_exact_in_the_bulk_and_the_tail():
    z = np.array([-30.0, -6.0, -1.0, 0.0, 0.5, 3.0, 40.0])
    deviation = 0.7
    improvement = jax.jit(log_expected_improvement)
    found = improvement(jnp.asarray(1.0 + z * deviation), jnp.full(len(z), deviation), jnp.asarray(1.0))
    near = np.log(deviation * (stats.norm.pdf(z) + z * stats.norm.cdf(z)))
    np.testing.assert_allclose(found[1:], near[1:], rtol=1e-9)
    # phi(z) (1/z^2 - 3/z^4 + 15/z^6 - ...)
    tail = stats.norm.logpdf(z[0]) + np.log(z[0] ** -2 - 3 * z[0] ** -4 + 15 * z[0] ** -6) + np.log(deviation)
    assert float(found[0]) == pytest.approx(tail, rel=1e-8)
    slope = jax.vmap(jax.grad(lambda m: improvement(m, jnp.asarray(0.7), jnp.asarray(1.0))))
    assert np.all(np.asarray(slope(jnp.linspace(-3e3, 30, 200))) > 0)


def test_schedules():
    counts = jnp.arange(1.0, 50.0)
    assert np.all(beta_at("constant", 2.0, counts) == 2.0)
    assert np.all(np.diff(beta_at("growing", 2.0, counts)) > 0)
    np.testing.assert_allclose(beta_at("falling", 20.0, jnp.asarray(3.0)), 20 / (2 * np.sqrt(4)))


@pytest.mark.slow
@pytest.mark.parametrize("trend", [None, "linear"])
def test_samples_have_the_moments_of_the_posterior(trend):
    search = Search(num_domains=D, capacity=16, trend=trend)
    rng = np.random.default_rng(0)
    state = search.start()
    for mixture in rng.dirichlet(np.ones(D), 6):
        state = search.insert(state, mixture, (np.sin(4 * mixture[0]) + mixture[1], 0.1))
    [posterior] = search.condition(search.fit(state), jnp.zeros((0, D)), jnp.zeros(0, bool))
    points = jnp.sqrt(jnp.asarray(rng.dirichlet(np.ones(D), 5)))
    mean, deviation = search.moments([posterior], points)
    samples = jax.jit(jax.vmap(lambda key: draw(search.surrogate, posterior, 16, key=key)(points)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_allclose(samples.mean(0), mean, atol=5 * float(deviation.max()) / 4000**0.5)
    np.testing.assert_allclose(samples.std(0), deviation, rtol=0.12)
