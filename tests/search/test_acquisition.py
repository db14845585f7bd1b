"""The upper confidence bound is maximised where many random mixtures find nothing higher."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.search import acquisition, simplex
from duet_jax.search.surrogate import Hyperparameters, Observations, condition

D, N = 4, 16


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def posterior(values, seed: int):
    mixtures = np.random.default_rng(seed).dirichlet(np.ones(D), N)
    seen = Observations(*map(jnp.asarray, (mixtures, values(mixtures), np.zeros(N), np.arange(N) < 12)))
    chosen = Hyperparameters(*map(jnp.asarray, (np.log(0.7), 0.0, np.log(0.05))))
    return jax.jit(condition)(chosen, seen, jnp.zeros((1, D)), jnp.zeros(1, bool))


@partial(jax.jit, static_argnums=1)
def maximise(fitted, beta: float, key):
    draws = simplex.draws(key, 512, D)
    return acquisition.maximise(fitted, draws, beta, 0.0, key=jax.random.fold_in(key, 1))


def test_nothing_random_is_higher():
    bound = jax.jit(acquisition.upper_confidence_bound)
    many = jnp.concatenate([simplex.draws(jax.random.key(9), 50_000, D), jnp.asarray(simplex.landmarks(D))])
    for seed in range(10):
        rng = np.random.default_rng(seed)
        fitted = posterior(lambda mixtures, rng=rng: rng.standard_normal(len(mixtures)), seed)
        found = maximise(fitted, 2.0, jax.random.key(seed))
        reached = float(bound(fitted, simplex.hellinger(found)[None], 2.0)[0])
        assert reached >= float(jnp.max(bound(fitted, simplex.hellinger(many), 2.0))) - 1e-6


def test_an_optimum_at_a_vertex_has_exact_zeros():
    # Where nothing is known of the mean, the bound is highest farthest from all observations: at a vertex.
    fitted = posterior(lambda mixtures: np.zeros(len(mixtures)), 0)
    found = np.asarray(maximise(fitted, 2.0, jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(found), [0.0, 0.0, 0.0, 1.0])
