"""The acquisition is maximised where many random mixtures find nothing higher, and says how sure that is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from duet_jax.search import Constraints, Group, simplex
from duet_jax.search.constraints import contains
from duet_jax.search.maximise import maximise
from duet_jax.search.space import Space
from duet_jax.search.surrogate import Problem, Surrogate

D, N = 4, 12
SURROGATE = Surrogate(D, ard=False)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def posterior(values, seed: int):
    mixtures = np.random.default_rng(seed).dirichlet(np.ones(D), N)
    inputs = SURROGATE.inputs(jnp.sqrt(mixtures))
    mean, _ = SURROGATE.prior(None)
    chosen = mean._replace(lengthscale=jnp.log(0.7), noise=jnp.log(0.05))
    problem = Problem(inputs, jnp.asarray(values(mixtures)), jnp.zeros(N), jnp.zeros(()), jnp.ones(()))
    return SURROGATE.condition(chosen, problem, SURROGATE.inputs(jnp.zeros((0, D))))


def bound(fitted, roots):
    mean, deviation = SURROGATE.moments(fitted, roots)
    return mean + 2.0 * deviation


NONE = Constraints()


def run(fitted, constraints=NONE):
    key = jax.random.key(0)
    centres = jnp.full((1, D), D**-0.5)
    draws = simplex.draws(key, 512, D)
    return maximise(lambda x: bound(fitted, x), centres, draws, constraints, Space(), key=jax.random.fold_in(key, 1))


COMPILED = jax.jit(run)


def noise(seed):
    return lambda mixtures: np.random.default_rng(seed).standard_normal(len(mixtures))


def test_neither_random_mixtures_nor_scipy_find_anything_higher():
    many = simplex.hellinger(jnp.concatenate([simplex.draws(jax.random.key(9), 50_000, D), np.eye(D)]))
    value = jax.jit(bound)
    slope = jax.jit(jax.value_and_grad(lambda x, fitted: -bound(fitted, (x / jnp.linalg.norm(x))[None])[0]))
    for seed in range(10):
        fitted = posterior(noise(seed), seed)
        found = COMPILED(fitted)
        scores = value(fitted, many)
        assert float(found.score) >= float(jnp.max(scores)) - 1e-6
        for start in np.asarray(many)[np.argsort(-np.asarray(scores))[:300:100]]:
            theirs = optimize.minimize(
                lambda x, fitted=fitted: [np.asarray(y, float) for y in slope(x, fitted)],
                start,
                jac=True,
                bounds=[(0, 1)] * D,
                method="L-BFGS-B",
            )
            assert float(found.score) >= -theirs.fun - 1e-6
        assert 0 <= float(found.gap) < 1e-3


def test_an_optimum_at_a_vertex_has_exact_zeros():
    # Where nothing is known of the mean, the bound is highest farthest from all observations: at a vertex.
    found = COMPILED(posterior(lambda mixtures: np.zeros(len(mixtures)), 0))
    np.testing.assert_array_equal(np.sort(found.point), [0.0, 0.0, 0.0, 1.0])
    assert float(found.gap) == 0.0


def test_constraints_hold_and_nothing_allowed_is_higher():
    convex = Constraints(minimum=(0.1, 0, 0, 0), maximum=(1, 0.4, 0.3, 1), groups=(Group((1, 2), 0.2, 0.5),))
    compiled = jax.jit(lambda fitted: run(fitted, convex))
    allowed = simplex.draws(jax.random.key(3), 200_000, D)
    allowed = allowed[np.asarray(contains(allowed, convex, D))]
    assert len(allowed) > 1000
    for seed in range(6):
        fitted = posterior(noise(seed), seed)
        found = compiled(fitted)
        assert bool(contains(found.point**2, convex, D))
        assert float(found.score) >= float(jnp.max(bound(fitted, jnp.sqrt(allowed)))) - 1e-6
        assert 0 <= float(found.gap) < 1e-2


def test_a_floor_is_not_only_cut_off_but_optimised_on_its_support():
    fitted = posterior(noise(1), 1)
    limited = Constraints(floor=0.3, most=2)
    found = jax.jit(lambda fitted: run(fitted, limited))(fitted)
    shares = np.asarray(found.point) ** 2
    assert bool(contains(shares, limited, D))
    grid = np.concatenate([[1.0], np.linspace(0.3, 0.7, 401)])
    best = -np.inf
    for i in range(D):
        for j in range(D):
            if i != j:
                mixtures = np.zeros((len(grid), D))
                mixtures[:, i], mixtures[:, j] = grid, 1 - grid
                best = max(best, float(jnp.max(bound(fitted, jnp.sqrt(mixtures)))))
    assert float(found.score) >= best - 1e-3
