"""The minimiser against SciPy, alone and under vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from duet_jax.search.quasi_newton import minimise


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rosenbrock(point, carry):
    return jnp.sum(10 * (point[1:] - point[:-1] ** 2) ** 2 + (1 - point[:-1]) ** 2), carry + 1


def test_reaches_the_minimum_of_a_curved_valley():
    start = jnp.array([-1.2, 1.0, 0.3])
    point, value, _, accepted, inverse, _ = jax.jit(lambda x: minimise(rosenbrock, x, jnp.zeros(()), 80))(start)
    np.testing.assert_allclose(point, 1.0, atol=1e-5)
    assert value < 1e-10
    # Only accepted points are carried.
    assert 10 < float(accepted) < 80
    # What was learnt of the curvature makes the way back from a point nearby short.
    again = minimise(rosenbrock, point + jnp.array([0.02, 0.0, -0.01]), jnp.zeros(()), 8, inverse)
    afresh = minimise(rosenbrock, point + jnp.array([0.02, 0.0, -0.01]), jnp.zeros(()), 8)
    assert again.value < 0.1 * afresh.value


def test_a_quadratic_needs_few_evaluations():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    matrix, target = jnp.asarray(root @ root.T + np.eye(6)), jnp.asarray(rng.standard_normal(6))

    def quadratic(point, carry):
        return 0.5 * (point - target) @ matrix @ (point - target), carry

    starts = jnp.asarray(rng.standard_normal((4, 6)))
    points, values, *_ = jax.jit(jax.vmap(lambda x: minimise(quadratic, x, (), 30)))(starts)
    np.testing.assert_allclose(points, jnp.broadcast_to(target, points.shape), atol=1e-4)
    theirs = scipy.optimize.minimize(lambda x: float(quadratic(x, ())[0]), starts[0], method="BFGS")
    assert float(values[0]) <= theirs.fun + 1e-8


def test_values_that_are_not_finite_are_stepped_back_from():
    def barrier(point, carry):
        return jnp.sum(point - jnp.log(point)), carry

    point, value, *_ = jax.jit(lambda x: minimise(barrier, x, (), 40))(jnp.array([0.05, 3.0]))
    np.testing.assert_allclose(point, 1.0, atol=1e-5)
    assert float(value) == pytest.approx(2.0)
