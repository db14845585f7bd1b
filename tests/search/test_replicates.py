"""The best of k: its error's moments are exact, and it is taken away without a bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.search import replicates
from duet_jax.search.replicates import Replicates, check_scores, debias, fit_rate, log_likelihood, summarise

INFINITE = float("inf")
moments, truncated = jax.jit(replicates.moments), jax.jit(replicates.truncated_moments)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def errors(rng, rate: float, cutoff: float, shape) -> np.ndarray:
    """Truncated exponential draws by the inverse of their distribution function."""
    return -np.log1p(rng.uniform(size=shape) * np.expm1(-rate * cutoff)) / rate


@pytest.mark.parametrize("count", [1, 2, 4, 10, 100])
@pytest.mark.parametrize(("rate", "cutoff"), [(1e-6, 1.0), (1.0, 1.0), (1.0, 2.0), (7.0, 3.0), (500.0, 1.0)])
def test_moments_equal_adaptive_quadrature_and_simulation(count, rate, cutoff):
    law = scipy.stats.truncexpon(b=rate * cutoff, scale=1 / rate)
    until = min(cutoff, 60 / (rate * count))
    mean = scipy.integrate.quad(lambda u: law.sf(u) ** count, 0, until, epsabs=0, epsrel=1e-9)[0]
    square = scipy.integrate.quad(lambda u: 2 * u * law.sf(u) ** count, 0, until, epsabs=0, epsrel=1e-9)[0]
    found = moments(count, rate, cutoff)
    np.testing.assert_allclose(found, [mean, square - mean**2], rtol=1e-8)
    # The least of k uniform numbers has the distribution function 1 - (1 - u)^k.
    uniform = np.random.default_rng(count).uniform(size=400_000)
    least = law.ppf(-np.expm1(np.log1p(-uniform) / count))
    assert abs(least.mean() - found[0]) < max(1e-3, 5 * least.std() / 632)
    assert abs(least.var() - found[1]) < 1e-3


def test_moments_without_a_cutoff_and_of_one_error():
    counts, rates = jnp.asarray([1.0, 2.0, 10.0, 64.0]), jnp.asarray([0.2, 1.0, 3.0, 40.0])
    mean, variance = moments(counts, rates, INFINITE)
    np.testing.assert_allclose(mean, 1 / (counts * rates), rtol=1e-10)
    np.testing.assert_allclose(variance, 1 / (counts * rates) ** 2, rtol=1e-10)
    for rate, cutoff in ((1e-3, 1.0), (0.4, 1.0), (0.6, 1.0), (3.0, 2.0), (30.0, 5.0)):
        np.testing.assert_allclose(moments(1, rate, cutoff), truncated(rate, cutoff), rtol=1e-9)


def test_moments_of_the_table_of_the_bound():
    # Rate 1: cutoff, count, mean, standard deviation. DUET's bounds for them exceed the cutoff itself.
    for cutoff, count, mean, deviation in (
        (1.0, 1, 0.418, 0.282),
        (1.0, 4, 0.143, 0.129),
        (1.0, 10, 0.061, 0.059),
        (1.0, 100, 0.0063, 0.006),
        (2.0, 2, 0.39, None),
        (2.0, 4, 0.21, None),
        (2.0, 10, 0.085, None),
    ):
        found = moments(count, 1.0, cutoff)
        places = 5e-5 if mean < 0.01 else 5e-4 if cutoff == 1 else 5e-3
        assert float(found[0]) == pytest.approx(mean, abs=places)
        if deviation is not None:
            assert float(found[1]) ** 0.5 == pytest.approx(deviation, abs=6e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(-9, 9), st.floats(-9, 9))
def test_truncated_moments_equal_scipy(log_rate, log_cutoff):
    with jax.enable_x64(True):
        rate, cutoff = np.exp(log_rate), np.exp(log_cutoff)
        mean, variance = truncated(rate, cutoff)
    t = rate * cutoff
    if 1e-2 < t < 50:
        exact = scipy.stats.truncexpon(b=t, scale=1 / rate).stats("mv")
        np.testing.assert_allclose([mean, variance], exact, rtol=1e-6)
    assert 0 < mean <= min(cutoff / 2, 1 / rate) * (1 + 1e-12)
    assert 0 < variance <= min(cutoff**2 / 12, 1 / rate**2) * (1 + 1e-12)


def test_likelihood_is_the_integral_over_the_location():
    rate, cutoff, scores = 1.7, 2.0, np.array([0.3, 0.9, -0.4])
    row = jax.tree.map(lambda x: x[None], summarise(jnp.asarray(scores)))

    def density(location, rate):
        return np.prod(scipy.stats.truncexpon(b=rate * cutoff, scale=1 / rate).pdf(location - scores))

    def exact(rate):
        return np.log(scipy.integrate.quad(density, scores.max(), scores.min() + cutoff, args=(rate,))[0])

    found = [float(log_likelihood(row, jnp.asarray(r), cutoff)[0]) for r in (rate, 0.3)]
    # The constants, -log k here, do not depend on the rate.
    assert found[0] - found[1] == pytest.approx(exact(rate) - exact(0.3), abs=1e-9)
    assert found[0] - exact(rate) == pytest.approx(np.log(3), abs=1e-9)


@pytest.mark.parametrize("cutoff", [0.7, INFINITE])
@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_the_best_of_k_is_debiased(count, cutoff):
    rng = np.random.default_rng(count)
    rate, trials = 3.0, 20_000
    location = rng.standard_normal(trials)
    rows = summarise(jnp.asarray(location[:, None] - errors(rng, rate, cutoff, (trials, count))))
    value, variance = map(np.asarray, jax.jit(debias)(rows, rate, cutoff))
    error = value - location
    assert abs(error.mean()) < 2 * error.std() / trials**0.5
    # The stated variance is that of the error.
    assert np.mean(error**2) == pytest.approx(variance.mean(), rel=0.05)
    # The plain best is far off.
    assert abs((np.asarray(rows.best) - location).mean()) > 20 * abs(error.mean())


@pytest.mark.parametrize(("rate", "cutoff"), [(0.5, 1.0), (4.0, 1.0), (4.0, INFINITE), (1e3, 0.01), (1e-3, 4e3)])
def test_rate_is_found(rate, cutoff):
    rng = np.random.default_rng(5)
    rows = [summarise(jnp.asarray(-errors(rng, rate, cutoff, (500, k)))) for k in (2, 5, 12)]
    rows = Replicates(*(jnp.concatenate(x) for x in zip(*rows, strict=True)))
    found = float(jax.jit(fit_rate)(rows, cutoff, 3 * rate))
    # The likelihood knows the rate times the cutoff only to about 0.1 here.
    assert found == pytest.approx(rate, rel=0.05, abs=0.15 / cutoff)
    if cutoff == INFINITE:
        assert float(fit_rate(rows, INFINITE, 3 * rate)) == pytest.approx(found, rel=1e-5)
    logs = np.log(found) + np.array([-1e-3, 0, 1e-3])
    height = [float(jnp.sum(log_likelihood(rows, np.exp(x), cutoff))) + x - np.exp(x) / (3 * rate) for x in logs]
    assert height[1] >= max(height[0], height[2])


def test_prior_decides_alone_and_masked_rows_change_nothing():
    single = summarise(jnp.asarray(np.random.default_rng(0).standard_normal((6, 1))))
    for cutoff in (2.0, INFINITE):
        assert float(jax.jit(fit_rate)(single, cutoff, 2.5)) == pytest.approx(2.5, rel=1e-5)
    scores = np.random.default_rng(1).standard_normal((6, 3))
    rows = summarise(jnp.asarray(scores))
    padded = Replicates(*(jnp.concatenate([x, jnp.zeros(10)]) for x in rows))
    for cutoff in (9.0, INFINITE):
        rate = jax.jit(fit_rate)(rows, cutoff, 1.0)
        assert float(jax.jit(fit_rate)(padded, cutoff, 1.0)) == pytest.approx(float(rate), rel=1e-12)
        value, variance = debias(padded, rate, cutoff)
        np.testing.assert_allclose(value[:6], debias(rows, rate, cutoff)[0], rtol=1e-12)
        np.testing.assert_array_equal(value[6:], 0.0)
        np.testing.assert_array_equal(variance[6:], 0.0)


def test_derivatives_are_finite_and_float32_works():
    rows = summarise(jnp.asarray([[0.1, 0.4, 0.2], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]))
    for cutoff in (0.5, INFINITE):

        def total(rate, cutoff=cutoff):
            values, variances = debias(rows, rate, cutoff)
            return jnp.sum(values) + jnp.sum(variances) + sum(replicates.moments(3, rate, cutoff))

        slope = float(jax.grad(total)(2.0))
        assert slope == pytest.approx(float(total(2.0 + 1e-5) - total(2.0 - 1e-5)) / 2e-5, rel=1e-6)
    exact = debias(rows, 2.0, 0.5)
    assert all(x.dtype == jnp.float32 for x in replicates.moments(3, jnp.float32(2.0), 0.5))
    with jax.enable_x64(False):
        single = Replicates(*(np.asarray(x, np.float32) for x in rows))
        found = jax.jit(debias)(single, np.float32(2.0), np.float32(0.5))
        assert found[0].dtype == np.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5)
        np.testing.assert_allclose(replicates.moments(4, 1.0, 1.0), [0.143, 0.129**2], rtol=1e-2)


def test_what_are_no_scores():
    np.testing.assert_array_equal(check_scores([1, 2]), [1.0, 2.0])
    for bad, sentence in (
        ([], "at least one"),
        ([[1.0]], "at least one"),
        ([1.0, float("nan")], "finite"),
        (["good"], "numbers"),
        ([0.0, 3.0], "cutoff"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_scores(bad, 2.0)
