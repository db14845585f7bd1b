"""Laplace's approximation: exact for normal feedback, equal to scikit-learn's for classes, with exact gradients."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from duet_jax.search import laplace
from duet_jax.search.laplace import approximate

N = 14
X = np.random.default_rng(0).uniform(-2, 2, (N, 2))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def prior(amplitude=1.5, lengthscale=0.8, noise=0.0):
    squared = jnp.sum((X[:, None] - X[None]) ** 2, axis=-1)
    return amplitude * jnp.exp(-0.5 * squared / lengthscale**2) + noise * jnp.eye(N)


def padded(covariance, values, size: int):
    whole = jnp.eye(size, dtype=covariance.dtype).at[:N, :N].set(covariance)
    return whole, jnp.zeros(size, covariance.dtype).at[:N].set(values)


SIGNS = np.where(np.random.default_rng(1).uniform(size=N) < 0.5, 1.0, -1.0)


def logistic(latent, parameters):
    return -jnp.logaddexp(0.0, -parameters * SIGNS.astype(latent.dtype) * latent)


plain = jax.jit(lambda covariance, scale: approximate(covariance, logistic, scale, jnp.zeros_like(scale * X[:, 0])))


def test_normal_feedback_gives_exact_regression():
    rng = np.random.default_rng(2)
    values, variances = rng.standard_normal(N), rng.uniform(0.05, 2, N)

    def density(latent, parameters):
        return jax.scipy.stats.norm.logpdf(values, latent, jnp.sqrt(variances))

    covariance = prior()
    found = jax.jit(lambda k: approximate(k, density, (), jnp.full(N, 3.0)))(covariance)
    whole = covariance + np.diag(variances)
    np.testing.assert_allclose(found.latent, covariance @ np.linalg.solve(whole, values), atol=1e-9)
    np.testing.assert_allclose(found.targets, values, atol=1e-9)
    np.testing.assert_allclose(found.variances, variances, rtol=1e-9)
    exact = scipy.stats.multivariate_normal(cov=whole).logpdf(values)
    assert float(found.log_evidence) == pytest.approx(exact, abs=1e-9)


def test_classes_as_in_scikit_learn():
    model = GaussianProcessClassifier(ConstantKernel(1.5) * RBF(0.8), optimizer=None, max_iter_predict=1000)
    model.fit(X, SIGNS > 0)
    model.base_estimator_._posterior_mode(np.asarray(prior()), return_temporaries=True)
    found = plain(prior(), 1.0)
    np.testing.assert_allclose(found.latent, model.base_estimator_.f_cached, atol=1e-7)
    # scikit-learn stops when a step raises the evidence by less than 1e-10.
    assert float(found.log_evidence) == pytest.approx(model.log_marginal_likelihood_value_, abs=1e-8)
    # At the mode the prior pulls exactly as much as the feedback.
    slope = jax.grad(lambda g: jnp.sum(logistic(g, 1.0)))(found.latent)
    np.testing.assert_allclose(prior() @ slope, found.latent, atol=1e-12)


def test_pseudo_observations_have_the_same_posterior():
    found = plain(prior(), 1.0)
    mean = prior() @ np.linalg.solve(prior() + np.diag(found.variances), found.targets)
    np.testing.assert_allclose(mean, found.latent, atol=1e-10)

    # Also where curvature is so small that its variance is clipped.
    def flat(latent, scale):
        return logistic(latent + 40.0 * SIGNS, scale)

    found = jax.jit(lambda k: approximate(k, flat, 1.0, jnp.zeros(N)))(prior())
    assert np.all(np.asarray(found.variances) == laplace.VAGUE)
    mean = prior() @ np.linalg.solve(prior() + np.diag(found.variances), found.targets)
    np.testing.assert_allclose(mean, found.latent, atol=1e-12)


def test_gradient_equals_finite_differences():
    mask = jnp.arange(16) < N
    signs = jnp.zeros(16).at[:N].set(SIGNS)

    def density(latent, parameters):
        scale, shift = parameters
        return jnp.where(mask, -jnp.logaddexp(0.0, -jnp.exp(scale) * (signs * latent - shift**3)), 0.0)

    @jax.jit
    def evidence(x):
        covariance, start = padded(prior(jnp.exp(x[0]), jnp.exp(x[1]), jnp.exp(x[2])), 0.3, 16)
        return approximate(covariance, density, (x[3], x[4]), start).log_evidence

    at = np.array([0.7, -0.3, -1.0, 0.4, 0.6])
    found = jax.jit(jax.grad(evidence))(jnp.asarray(at))
    for i, step in enumerate(1e-4 * np.eye(5)):
        # Five points: an error of the fourth power of the step.
        values = [float(evidence(at + m * step)) for m in (-2, -1, 1, 2)]
        expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 12e-4
        assert float(found[i]) == pytest.approx(expected, abs=1e-8)


def test_masked_rows_change_nothing():
    one = plain(prior(), 1.3)
    covariance, start = padded(prior(), 5.0, 32)
    # What is guessed for rows that are masked must not matter.
    start = start.at[N:].set(7.0)
    signs = jnp.zeros(32).at[:N].set(SIGNS)

    def density(latent, scale):
        return jnp.where(signs == 0, 0.0, -jnp.logaddexp(0.0, -scale * signs * latent))

    two = jax.jit(lambda k, s: approximate(k, density, 1.3, s))(covariance, start)
    np.testing.assert_allclose(two.latent[:N], one.latent, atol=1e-9)
    np.testing.assert_allclose(two.targets[:N], one.targets, atol=1e-9)
    np.testing.assert_array_equal(two.latent[N:], 0.0)
    np.testing.assert_array_equal(two.targets[N:], 0.0)
    assert float(two.log_evidence) == pytest.approx(float(one.log_evidence), abs=1e-10)


def test_reaches_the_mode_from_anywhere():
    # Far from the mode and with a nearly straight likelihood a whole Newton step overshoots.
    def density(latent, parameters):
        return 5.0 * logistic(latent, parameters)

    covariance = 100.0 * prior()

    @jax.jit
    def run(start, scale):
        found = approximate(covariance, density, scale, start)
        return found, jax.grad(lambda g: jnp.sum(density(g, scale)))(found.latent)

    cases = itertools.product((1e-3, 1.0, 30.0, 1000.0), (0.0, 50.0, -500.0, 1e4, float("nan")))
    for scale, start in cases:
        found, slope = run(jnp.full(N, start), scale)
        # An error of the mode comes back larger by the curvature, which is up to 1e8 times the prior's.
        np.testing.assert_allclose(covariance @ slope, found.latent, rtol=1e-7, atol=1e-9 + 1e-10 * scale**2)


def test_composes_and_runs_in_float32():
    def evidence(amplitude):
        covariance = amplitude * prior() + 0.01 * jnp.eye(N)
        return approximate(covariance, logistic, jnp.ones((), amplitude.dtype), jnp.zeros(N)).log_evidence

    amplitudes = jnp.asarray([0.5, 1.0, 2.0])
    together = jax.jit(jax.vmap(jax.value_and_grad(evidence)))(amplitudes)
    alone = jax.jit(lambda a: jax.lax.map(jax.value_and_grad(evidence), a))(amplitudes)
    np.testing.assert_allclose(together, alone, rtol=1e-10)

    single = jax.jit(lambda k: approximate(k, logistic, jnp.float32(1.0), jnp.zeros(N, jnp.float32)))
    found, exact = single(prior().astype(jnp.float32)), plain(prior(), 1.0)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found.latent, exact.latent, atol=2e-5)
    assert float(found.log_evidence) == pytest.approx(float(exact.log_evidence), abs=2e-5)
