"""Likelihoods: probabilities that sum to 1, right and concave far out in the tails, and normal in the limit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from duet_jax.errors import FeedbackError
from duet_jax.search import likelihoods
from duet_jax.search.laplace import approximate
from duet_jax.search.likelihoods import Comparisons, Intervals, Ratings, accuracy, mean_rating, ratings_to_row

INFINITE = float("inf")


class Told(NamedTuple):
    rows: Any
    centre: Any = 0.0
    spread: Any = 1.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def derivatives(function):
    """Value and three derivatives of an elementwise function in its first argument, compiled."""

    def along(f):
        return lambda x, *rest: jax.jvp(lambda x: f(x, *rest), (x,), (jnp.ones_like(x),))[1]

    first = along(function)
    second = along(first)
    return jax.jit(lambda *x: jnp.stack([function(*x), first(*x), second(*x), along(second)(*x)]))


def mills(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hazard of the normal tail and its excess over `x`, by quadrature of positive terms."""
    nodes, weights = np.polynomial.laguerre.laggauss(120)
    # h = 1 / int exp(-x u - u^2 / 2) du, and h - x = h^2 E..: for x > 4, with u = w / x.
    u = nodes / x[:, None]
    tail = np.exp(-0.5 * u**2) @ weights / x
    # int u exp(-x u - u^2/2) du = 1 - x tail, so that the excess is that over the tail.
    first = (u * np.exp(-0.5 * u**2)) @ weights / x
    return 1 / tail, first / tail


PROBIT = derivatives(likelihoods.log_probit)
INTERVAL = derivatives(lambda centre, width: likelihoods.log_interval(centre, jnp.broadcast_to(width, centre.shape)))


def test_log_probit_and_its_derivatives():
    z = np.concatenate([np.linspace(-50, 50, 401), [-4.0, 4.0, 0.0]])
    value, first, second, third = PROBIT(jnp.asarray(z))
    np.testing.assert_allclose(value, log_ndtr(z), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(first, np.exp(scipy.stats.norm.logpdf(z) - log_ndtr(z)), rtol=1e-11, atol=1e-300)
    hazard, excess = mills(np.linspace(7, 50, 50))
    tail = PROBIT(-jnp.linspace(7, 50, 50))
    np.testing.assert_allclose(tail[2], -hazard * excess, rtol=1e-12)
    assert np.all(np.asarray(second) <= 0) and np.all(np.asarray(third) >= -1e-14)
    # What is left of the third derivative is 2 / z^3; next to the curvature it is known to rounding.
    np.testing.assert_allclose(tail[3], hazard * ((hazard + excess) * excess - 1), atol=3e-11)


def test_log_probit_in_float32():
    z = np.linspace(-50, 50, 401)
    with jax.enable_x64(False):
        found = derivatives(likelihoods.log_probit)(jnp.asarray(z, jnp.float32))
    assert found.dtype == jnp.float32
    exact = PROBIT(jnp.asarray(z.astype(np.float32), jnp.float64))
    np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(found[3], exact[3], atol=5e-4)


@pytest.mark.parametrize("width", [1e-6, 0.01, 0.4999, 0.5001, 2.0, 30.0, 200.0])
def test_log_interval(width):
    edge = min(1 / width, 50)
    centre = np.concatenate([np.linspace(-50, 50, 201), [edge, -edge, 1e-9]])
    value, first, second, third = np.asarray(INTERVAL(jnp.asarray(centre), width))
    assert np.all(np.isfinite(np.stack([value, first, second, third])))
    assert np.all(second <= 1e-13)
    # Narrow intervals are a density, wide ones a certainty; in between SciPy is exact enough near the middle.
    near = np.abs(centre) < 5
    if width > 0.1:
        law = scipy.stats.norm
        left = -np.abs(centre[near])
        exact = np.log(law.cdf(left + width / 2) - law.cdf(left - width / 2))
        np.testing.assert_allclose(value[near], exact, rtol=1e-9, atol=1e-14)
    else:
        density = scipy.stats.norm.logpdf(centre) + np.log(width)
        np.testing.assert_allclose(value, density, rtol=1e-9, atol=(width * 51) ** 2)
        np.testing.assert_allclose(second, -1.0, atol=width**2)
    # Each derivative is the slope of the one before, by central differences.
    at = np.concatenate([np.linspace(-49.3, 49.3, 90), [0.0]])
    step = 1e-4 * (1 + np.abs(at) / 10)
    left, here, right = (np.asarray(INTERVAL(jnp.asarray(x), width)) for x in (at - step, at, at + step))
    for order in range(3):
        slope = (right[order] - left[order]) / (2 * step)
        np.testing.assert_allclose(here[order + 1], slope, rtol=2e-5, atol=2e-6)


def test_log_interval_in_float32():
    for width in (1e-4, 0.1, 0.6, 3.0, 100.0):
        centre = np.linspace(-50, 50, 201).astype(np.float32)
        exact = INTERVAL(jnp.asarray(centre, jnp.float64), np.float64(np.float32(width)))
        with jax.enable_x64(False):
            found = INTERVAL(jnp.asarray(centre), np.float32(width))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], exact[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], exact[1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[2], exact[2], atol=5e-3)


RATINGS = Ratings(5)


@jax.jit
def each_level(latent, parameters):
    """Log probabilities `[levels]` of one rating, and their first and second derivatives in the value."""

    def one(latent):
        return RATINGS.log_density(jnp.full(5, latent), parameters, Told(jnp.eye(5), 3.0, 1.3))

    return one(latent), jax.jacfwd(one)(latent), jax.jacfwd(jax.jacfwd(one))(latent)


@settings(max_examples=150, deadline=None)
@given(st.floats(-30, 30), st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(-4, 4), st.floats(-3, 3))
def test_probabilities_sum_to_one_and_are_log_concave(latent, gaps, first, noise):
    parameters = np.array([noise, first, *gaps])
    with jax.enable_x64(True):
        value, slope, bend = map(np.asarray, each_level(latent, jnp.asarray(parameters)))
        thresholds = np.asarray(RATINGS.thresholds(jnp.asarray(parameters)))
    assert np.all(np.diff(thresholds) > 0)
    assert np.exp(value).sum() == pytest.approx(1, abs=1e-12)
    # Derivatives of a sum that is always 1, wherever probabilities are not too small to count.
    unit = 1.3 / np.exp(noise)
    assert np.sum(np.exp(value) * slope) == pytest.approx(0, abs=1e-10 * unit)
    assert np.all(bend <= 1e-12 * unit**2)
    assert np.all(np.isfinite(np.concatenate([value, slope, bend])))


def test_even_thresholds_by_default():
    np.testing.assert_allclose(RATINGS.thresholds(jnp.asarray(RATINGS.mean)), [1.5, 2.5, 3.5, 4.5])
    fixed = Ratings(5, learned=False)
    assert len(fixed.mean) == len(fixed.scale) == 1 and len(RATINGS.mean) == len(RATINGS.scale) == 5
    np.testing.assert_array_equal(fixed.thresholds(jnp.asarray(fixed.mean)), [1.5, 2.5, 3.5, 4.5])
    # A value of 3 stars with noise of 0.7 stars is rated 3 as often as it is rounded to it.
    value, *_ = each_level(0.0, jnp.asarray(RATINGS.mean))
    assert np.exp(value[2]) == pytest.approx(1 - 2 * scipy.stats.norm.cdf(-0.5 / 0.7), abs=1e-12)
    np.testing.assert_allclose(RATINGS.guess(jnp.asarray([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], float)), [3.5, 0])
    with pytest.raises(ValueError, match="at least 2"):
        Ratings(1)


def told_rows():
    ratings = Told(jnp.asarray([[1.0, 0, 2, 0, 1], [0, 3, 1, 0, 0], [0, 0, 0, 0, 0]]), 2.0, 0.7)
    bounds = Told(jnp.asarray([[0.1, 0.2], [-INFINITE, 1.0], [0.3, INFINITE], [-INFINITE, INFINITE]]), 0.3, 2.0)
    comparisons = Told(jnp.asarray([[1.0, 0], [2.5, 1.5], [0, 0]]))
    return [(RATINGS, ratings), (Intervals(), bounds), (Comparisons(), comparisons), (Ratings(2), binary())]


def binary():
    return Told(jnp.asarray([[3.0, 7.0], [0, 10], [0, 0]]), 1.6, 0.2)


@pytest.mark.parametrize("case", range(4))
def test_derivatives_and_masked_rows(case):
    model, told = told_rows()[case]
    count = told.rows.shape[0]
    parameters = jnp.asarray(model.mean) + 0.1
    latent = jnp.asarray(np.random.default_rng(case).standard_normal(count))

    def value(latent, parameters):
        return model.log_density(latent, parameters, told)

    jacobian = jax.jit(jax.jacfwd(value, argnums=(0, 1)))
    curvature = jax.jit(jax.jacfwd(jax.grad(lambda g, p: jnp.sum(value(g, p))), argnums=(0, 1)))
    by_latent, by_parameter = map(np.asarray, jacobian(latent, parameters))
    assert np.count_nonzero(by_latent - np.diag(np.diagonal(by_latent))) == 0
    both = np.concatenate([np.diagonal(by_latent)[:, None], by_parameter], axis=1)
    bend = np.concatenate([np.asarray(x)[:count] for x in curvature(latent, parameters)], axis=1)
    for column in range(count + len(parameters)):
        step = 1e-5 * np.eye(count + len(parameters))[column]
        ends = [(latent + s * step[:count], parameters + s * step[count:]) for s in (-1, 1)]
        change = np.asarray(value(*ends[1]) - value(*ends[0])) / 2e-5
        exact = by_latent[:, column] if column < count else by_parameter[:, column - count]
        np.testing.assert_allclose(exact, change, atol=1e-7)
        slopes = [np.diagonal(np.asarray(jacobian(*end)[0])) for end in ends]
        np.testing.assert_allclose(bend[:, column], (slopes[1] - slopes[0]) / 2e-5, atol=1e-6)
    # The last row says nothing.
    assert value(latent, parameters)[-1] == 0 and np.all(both[-1] == 0) and np.all(bend[-1] == 0)


def test_finite_everywhere():
    for dtype in (jnp.float64, jnp.float32):
        for model, told in told_rows():
            told = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), told)

            def total(latent, parameters, model=model, told=told):
                return jnp.sum(model.log_density(latent, parameters, told))

            def slope(latent, parameters, total=total):
                return jnp.sum(jax.grad(total)(latent, parameters))

            both = jax.jit(
                lambda *at, total=total, slope=slope: (total(*at), jax.value_and_grad(slope, argnums=(0, 1))(*at))
            )
            parameters = jnp.asarray(model.mean, dtype)
            for latent in (-50.0, -5.0, 0.0, 5.0, 50.0):
                found = jax.tree.leaves(both(jnp.full(len(told.rows), latent, dtype), parameters))
                assert all(np.all(np.isfinite(x)) for x in found)
                assert all(x.dtype == dtype for x in found)


def test_two_levels_are_accuracy():
    parameters = jnp.asarray([0.3, -0.2])
    latent = jnp.asarray([0.4, -1.0, 0.0])
    p = scipy.stats.norm.cdf((1.6 + 0.2 * np.asarray(latent) - 1.3) / np.exp(0.3))
    exact = np.array([3, 0, 0]) * np.log(1 - p) + np.array([7, 10, 0]) * np.log(p)
    np.testing.assert_allclose(Ratings(2).log_density(latent, parameters, binary()), exact, rtol=1e-12)


def test_intervals_and_fixed_ratings_are_the_same():
    latent, noise = jnp.linspace(-2, 2, 5), jnp.asarray([np.log(0.6)])
    ratings = Ratings(5, learned=False).log_density(latent, noise, Told(jnp.eye(5), 3.0, 1.0))
    bounds = jnp.asarray([[-INFINITE, 1.5], [1.5, 2.5], [2.5, 3.5], [3.5, 4.5], [4.5, INFINITE]])
    np.testing.assert_allclose(Intervals().log_density(latent, noise, Told(bounds, 3.0, 1.0)), ratings, rtol=1e-12)


def covariance(size: int):
    x = np.linspace(0, 1, size)
    return jnp.asarray(np.exp(-0.5 * ((x[:, None] - x) / 0.3) ** 2) + 0.01 * np.eye(size))


def test_fine_levels_and_many_ratings_are_normal_feedback():
    size, levels, noise = 8, 60, 0.8
    rng = np.random.default_rng(0)
    # A star is 1/10 of the standard deviation of the values.
    value = rng.multivariate_normal(np.zeros(size), covariance(size))
    drawn = 30.5 + 10 * (value[:, None] + noise * rng.standard_normal((size, 40)))
    rows = np.stack([ratings_to_row(np.clip(np.round(x), 1, levels), levels) for x in drawn])
    model = Ratings(levels, learned=False)
    told = Told(jnp.asarray(rows), 30.5, 10.0)
    run = jax.jit(lambda k: approximate(k, lambda g, p: model.log_density(g, p, told), np.log([10 * noise]), 0 * k[0]))
    found = run(covariance(size))
    mean = (np.asarray(model.guess(jnp.asarray(rows))) - 30.5) / 10
    np.testing.assert_allclose(found.targets, mean, atol=2e-3)
    np.testing.assert_allclose(found.variances, noise**2 / 40, rtol=2e-3)
    exact = covariance(size) @ np.linalg.solve(covariance(size) + noise**2 / 40 * np.eye(size), mean)
    np.testing.assert_allclose(found.latent, exact, atol=2e-3)


def test_intervals_of_rounded_numbers_are_normal_feedback():
    values = np.random.default_rng(3).standard_normal(8)
    told = Told(jnp.stack([values - 1e-4, values + 1e-4], axis=1))
    run = jax.jit(lambda k: approximate(k, lambda g, p: Intervals().log_density(g, p, told), np.log([0.5]), 0 * k[0]))
    found = run(covariance(8))
    np.testing.assert_allclose(found.targets, values, atol=1e-6)
    np.testing.assert_allclose(found.variances, 0.25, rtol=1e-6)
    whole = np.asarray(covariance(8)) + 0.25 * np.eye(8)
    exact = scipy.stats.multivariate_normal(cov=whole).logpdf(values) + 8 * np.log(2e-4)
    assert float(found.log_evidence) == pytest.approx(exact, abs=1e-5)


def test_gradient_of_the_evidence_of_ratings():
    rng = np.random.default_rng(4)
    told = Told(jnp.asarray(rng.integers(0, 3, (8, 5)), float), 3.0, 0.8)

    @jax.jit
    def evidence(x):
        scaled = jnp.exp(x[0]) * covariance(8)
        return approximate(scaled, lambda g, p: RATINGS.log_density(g, p, told), x[1:], jnp.zeros(8)).log_evidence

    at = jnp.asarray([0.2, -0.3, 0.1, 0.2, -0.4, 0.3])
    found = jax.jit(jax.grad(evidence))(at)
    for i, step in enumerate(1e-4 * np.eye(6)):
        assert float(found[i]) == pytest.approx(float(evidence(at + step) - evidence(at - step)) / 2e-4, abs=1e-6)


def test_accuracy_has_an_error_at_its_ends():
    assert accuracy(0, 10) == pytest.approx((2 / 14, (2 * 12 / 14**3) ** 0.5))
    assert accuracy(10, 10)[1] > 0.05
    share, error = accuracy(700, 1000)
    assert share == pytest.approx(0.7, abs=1e-3) and error == pytest.approx((0.21 / 1000) ** 0.5, rel=1e-2)
    for bad in ((-1, 10), (11, 10), (0, 0), (float("nan"), 3), ("many", 10), (None, 1)):
        with pytest.raises(FeedbackError, match="is no accuracy"):
            accuracy(*bad)


def test_rows_and_means_of_stars():
    np.testing.assert_array_equal(ratings_to_row([5, 1, 5], 5), [1, 0, 0, 0, 2])
    assert mean_rating([3], 5) == pytest.approx((3, (1 + 1 / 12) ** 0.5))
    stars = np.random.default_rng(0).integers(1, 6, 4000)
    mean, error = mean_rating(stars.tolist(), 5)
    assert mean == pytest.approx(stars.mean())
    assert error == pytest.approx(((stars.var() + 1 / 12) / 4000) ** 0.5, rel=1e-3)
    for bad in ([0], [6], [2.5], [float("nan")], ["good"], [None]):
        with pytest.raises(FeedbackError, match="whole number of stars from 1 to 5"):
            ratings_to_row(bad, 5)
    with pytest.raises(FeedbackError, match="at least one"):
        mean_rating([], 5)
