"""What is recommended in the end: the best mixture, without the domains that it hardly needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.search import Constraints, Search
from duet_jax.search.program import CHEAP

D = 5
SLOPE = np.array([0.0, -0.2, -1.0, -1.5, -2.0])


def told(search: Search, objective, rounds: int, noise: float = 0.02):  # type: ignore[no-untyped-def]
    rng, state, key = np.random.default_rng(0), search.init(), jax.random.key(0)
    for number in range(rounds):
        mixture, _ = search.ask(state, key=jax.random.fold_in(key, number))
        state = search.tell(state, mixture, objective(mixture) + noise * rng.standard_normal())
    return state


@pytest.fixture(scope="module")
def linear():  # type: ignore[no-untyped-def]
    search = Search(num_domains=D)
    return search, told(search, lambda r: r @ SLOPE, 14)


def test_a_vertex_is_recommended_as_such(linear) -> None:  # type: ignore[no-untyped-def]
    search, state = linear
    np.testing.assert_array_equal(search.recommend(state).mixture, np.eye(D)[0])


def test_it_costs_next_to_nothing(linear) -> None:  # type: ignore[no-untyped-def]
    search, state = linear
    best = search.recommend(state)
    rng = np.random.default_rng(1)
    others = np.concatenate([rng.dirichlet(np.ones(D), 2000), rng.dirichlet([20, 1, 0.3, 0.3, 0.3], 2000)])
    mean, _ = search.predict(state, others)
    spread = np.std(np.asarray(state.feedback.values)[np.asarray(state.mask), 0], ddof=1)
    assert best.mean >= mean.max() - 1.01 * CHEAP * spread
    again, stderr = search.predict(state, best.mixture[None])
    assert (best.mean, best.stderr) == (again[0], stderr[0])


def test_domains_that_matter_stay() -> None:
    search = Search(num_domains=3)
    target = np.array([0.5, 0.3, 0.2])
    state = told(search, lambda r: -np.sum((r - target) ** 2), 14, noise=0.001)
    np.testing.assert_allclose(search.recommend(state).mixture, target, atol=0.06)


def test_least_shares_are_kept() -> None:
    constraints = Constraints(minimum=(0, 0, 0.1, 0, 0), maximum=(0.8, 1, 1, 1, 1))
    search = Search(num_domains=D, constraints=constraints)
    best = search.recommend(told(search, lambda r: r @ SLOPE, 14)).mixture
    np.testing.assert_allclose(best, [0.8, 0.1, 0.1, 0, 0], atol=0.03)
    assert best[2] >= 0.1 - 1e-9 and best[0] <= 0.8 + 1e-9 and not best[3:].any()


@pytest.mark.slow
def test_leaving_out_is_in_order_and_never_beyond_chance(linear) -> None:  # type: ignore[no-untyped-def]
    """The loss of what is left out against the joint posterior by plain linear algebra."""
    search, state = linear
    with jax.enable_x64(True):
        nothing = jnp.zeros((0, D)), jnp.zeros(0, bool)
        posteriors = search.condition(search.fit(state), *nothing)
        start = jnp.asarray([0.9, 0.06, 0.03, 0.01, 0.0])
        found = np.asarray(search.sparser(posteriors, start))
        pairs = search.roots(jnp.stack([start, jnp.asarray(found)]))
        mean, covariance = (np.asarray(x) for x in search.surrogate.joint(posteriors[0], pairs))
        _, deviation = search.moments(posteriors, pairs)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), deviation, rtol=1e-6)
    loss, sd = mean[0] - mean[1], np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert loss <= CHEAP and loss <= 2 * sd
    left_out = np.asarray(start)[found == 0]
    assert left_out.max() < np.asarray(start)[found > 0].min()
