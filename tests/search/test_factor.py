"""Factors by products: what solves would give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from duet_jax.search.factor import inverse_factor, log_density


def covariance(size: int) -> np.ndarray:
    root = np.random.default_rng(size).standard_normal((size, size + 2))
    return root @ root.T / size + 1e-3 * np.eye(size)


@pytest.mark.parametrize("size", [1, 5, 16, 17, 72])
def test_inverse_factor(size):
    matrix = covariance(size)
    with jax.enable_x64(True):
        inverse, log_determinant = jax.jit(inverse_factor)(jnp.asarray(matrix))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(matrix)), atol=1e-10)
    assert float(log_determinant) == pytest.approx(np.linalg.slogdet(matrix)[1], abs=1e-10)


def test_log_density_and_its_gradient():
    size = 9
    matrix, values = covariance(size), np.random.default_rng(0).standard_normal(size)

    def plain(scale, values):
        factor = jnp.linalg.cholesky(scale * jnp.asarray(matrix))
        white = jax.scipy.linalg.solve_triangular(factor, values, lower=True)
        return -0.5 * white @ white - jnp.sum(jnp.log(jnp.diagonal(factor)))

    def ours(scale, values):
        return log_density(scale * jnp.asarray(matrix), values)

    with jax.enable_x64(True):
        at = jnp.asarray(1.3), jnp.asarray(values)
        expected, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*at) for f in (plain, ours))
        for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-9)
    exact = scipy.stats.multivariate_normal(cov=1.3 * matrix).logpdf(values)
    assert float(found[0]) - 0.5 * size * np.log(2 * np.pi) == pytest.approx(exact, abs=1e-9)
