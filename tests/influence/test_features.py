"""Features equal their formulas, and Adam's equals what optax would do with the example's gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duet_jax.influence import features
from duet_jax.influence.features import Adam, FrozenAdam, Gradient, RankOne, Sign

GRADIENTS = 1e-3 * jax.random.normal(jax.random.key(0), (2, 6, 5))


def state_of_adam(steps: int = 7, b1: float = 0.9, b2: float = 0.999):
    optimiser = optax.scale_by_adam(b1, b2, eps=1e-8)
    state = optimiser.init(jnp.zeros((6, 5)))
    for i in range(steps):
        _, state = optimiser.update(1e-3 * jax.random.normal(jax.random.key(i), (6, 5)), state)
    return optimiser, state


def mapped(feature, state):
    found = features.moments(state)
    return feature.dense(GRADIENTS, feature.prepare(found.first, found.second, found.steps))


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_adam_is_the_next_step_of_optax(steps):
    optimiser, state = state_of_adam(steps)
    expected = jnp.stack([optimiser.update(g, state)[0] for g in GRADIENTS])
    np.testing.assert_allclose(mapped(Adam(), state), expected, rtol=1e-5)


def test_the_code_of_less():
    _, state = state_of_adam()
    m, v, g = (np.asarray(x, np.float64) for x in (state.mu, state.nu, GRADIENTS))
    expected = (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8)
    np.testing.assert_allclose(mapped(Adam("less_code"), state), expected, rtol=1e-4)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_frozen_second_moment(momentum):
    _, state = state_of_adam(7)
    m, v, g = (np.asarray(x, np.float64) for x in (state.mu, state.nu, GRADIENTS))
    over = np.sqrt(v / (1 - 0.999**7)) + 1e-8
    expected = (0.9 * m + 0.1 * g) / (1 - 0.9**8) / over if momentum else g / over
    feature = FrozenAdam(momentum)
    np.testing.assert_allclose(mapped(feature, state), expected, rtol=1e-4)
    assert feature.linear is not momentum


def test_rank_one_moments_scale_the_factors():
    """Where the second moment has rank one, Adafactor's estimate is exact."""
    rows, cols = jnp.arange(1.0, 7.0), jnp.arange(2.0, 7.0)
    second = 1e-6 * rows[:, None] * cols
    feature = RankOne(eps=0.0)
    state = feature.prepare(second, second, jnp.asarray(10_000_000))
    np.testing.assert_allclose(feature.dense(GRADIENTS, state), GRADIENTS / jnp.sqrt(second), rtol=1e-5)
    x, d = jax.random.normal(jax.random.key(1), (2, 3, 6)), jax.random.normal(jax.random.key(2), (2, 3, 5))
    scaled = jnp.einsum("btr,btc->brc", *feature.factors(x, d, state))
    np.testing.assert_allclose(scaled, jnp.einsum("btr,btc->brc", x, d) / jnp.sqrt(second), rtol=2e-5, atol=1e-2)


def test_rank_one_keeps_the_total_and_bears_zeros():
    _, state = state_of_adam()
    feature = RankOne()
    prepared = feature.prepare(state.mu, state.nu, state.count)
    estimate = 1 / (np.asarray(prepared.rows)[:, None] * np.asarray(prepared.whole)) ** 2
    np.testing.assert_allclose(estimate.mean(), state.nu.mean() / (1 - 0.999**7), rtol=1e-4)
    empty = feature.prepare(jnp.zeros((6, 5)), jnp.zeros((6, 5)), state.count)
    assert np.isfinite(feature.dense(jnp.zeros((1, 6, 5)), empty)).all()


def test_signs_and_plain_gradients():
    g = GRADIENTS.at[0, 0, 0].set(0.0)
    np.testing.assert_array_equal(Sign().dense(g, Sign().prepare(g, g, g)), np.sign(g))
    np.testing.assert_array_equal(Gradient().dense(g, Gradient().prepare(g, g, g)), g)


def test_moments_are_found_in_a_chain():
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    found = features.moments(chain.init({"a": jnp.ones(3)}))
    assert found.first["a"].shape == found.second["a"].shape == (3,) and int(found.steps) == 0
    scheduled = optax.adam(optax.linear_schedule(0.1, 0.0, 10)).init({"a": jnp.ones(3)})
    assert features.moments(scheduled).first["a"].shape == (3,)
    with pytest.raises(ValueError, match="no moments of Adam"):
        features.moments(optax.sgd(0.1).init(jnp.ones(3)))


def test_linear_features_say_so():
    _, state = state_of_adam()
    found = features.moments(state)
    for feature in (Gradient(), Sign(), Adam(), Adam("less_code"), FrozenAdam(), FrozenAdam(True), RankOne()):
        prepared = feature.prepare(found.first, found.second, found.steps)
        whole = feature.dense(GRADIENTS[:1] + 2 * GRADIENTS[1:], prepared)
        parts = feature.dense(GRADIENTS[:1], prepared) + 2 * feature.dense(GRADIENTS[1:], prepared)
        assert np.allclose(whole, parts, rtol=1e-4, atol=1e-5 * np.abs(parts).max()) is feature.linear, feature.name
    assert len({f.name for f in (Gradient(), Sign(), Adam(), Adam("less_code"), FrozenAdam(), RankOne())}) == 6
