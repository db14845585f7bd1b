"""The kernel is tinygp's, evaluated at once; the maps are what they say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tinygp

from duet_jax.search import kernel
from duet_jax.search.kernel import Inputs


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def features(count: int, seed: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, 3)))


def test_all_pairs_at_once_equal_tinygp_pair_by_pair():
    inverse = jnp.array([0.5, 2.0, 1.3])
    ours = kernel.Matern52(inverse)
    theirs = tinygp.transforms.Linear(inverse, tinygp.kernels.Matern52(distance=tinygp.kernels.distance.L2Distance()))
    a, b = features(5, 0), features(4, 1)
    np.testing.assert_allclose(ours(a, b), theirs(a, b), atol=1e-12)
    np.testing.assert_allclose(ours(a), theirs(a, a), atol=1e-12)
    np.testing.assert_allclose(ours.evaluate(a[0], b[0]), theirs(a[:1], b[:1])[0, 0], atol=1e-14)


def test_gradients_are_finite_where_points_coincide():
    points = jnp.concatenate([features(3, 0)] * 2)

    @jax.jit
    def total(inverse):
        return jnp.sum(jnp.cos(jnp.arange(36.0)).reshape(6, 6) * kernel.Matern52(inverse)(points))

    at, step = jnp.ones(3), 1e-6
    slope = jax.grad(total)(at)
    assert np.all(np.isfinite(slope))
    for i in range(3):
        moved = (total(at.at[i].add(step)) - total(at.at[i].add(-step))) / (2 * step)
        assert float(slope[i]) == pytest.approx(float(moved), rel=1e-6)


def test_differences_are_linear_functionals():
    plain = kernel.Matern52(jnp.ones(3))
    x, y, z = features(4, 0), features(4, 1), features(5, 2)

    def inputs(at, against=None):
        return Inputs(at, at[:, :1], jnp.ones(len(at)), against)

    @jax.jit
    def covariance(a, b):
        return kernel.covariance(plain, jnp.asarray(1.5), jnp.asarray(0.2), a, b)

    difference = inputs(x, inputs(y))
    single = covariance(inputs(x), inputs(z)) - covariance(inputs(y), inputs(z))
    np.testing.assert_allclose(covariance(difference, inputs(z)), single, atol=1e-12)
    np.testing.assert_allclose(covariance(inputs(z), difference), single.T, atol=1e-12)
    both = covariance(difference, inputs(x)) - covariance(difference, inputs(y))
    np.testing.assert_allclose(covariance(difference, difference), both, atol=1e-12)
    np.testing.assert_allclose(covariance(inputs(x, inputs(x)), inputs(z)), 0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 9, 40])
def test_spread_is_the_distance_of_random_mixtures(size):
    rng = np.random.default_rng(5)
    one, two = rng.dirichlet(np.ones(size), (2, 4000))
    for kind in ("hellinger", "raw", "log"):
        apart = np.asarray(kernel.transform(kind, jnp.sqrt(one)) - kernel.transform(kind, jnp.sqrt(two)))
        assert kernel.spread_of(kind, size) == pytest.approx(np.sqrt((apart**2).sum(1).mean()), rel=0.04), kind
