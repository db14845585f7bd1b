"""The search: valid mixtures, reproducible, compiled once, and better than chance."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.errors import FeedbackError
from duet_jax.search import Search
from duet_jax.search import search as module

D = 4
TARGET = np.array([0.5, 0.3, 0.2, 0.0])


def objective(mixture: np.ndarray) -> float:
    return -float(((np.sqrt(mixture) - np.sqrt(TARGET)) ** 2).sum())


def told(search: Search, count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    state = search.init()
    for mixture in rng.dirichlet(np.ones(D), count):
        state = search.tell(state, mixture, objective(mixture) + 0.01 * rng.standard_normal())
    return state


SEARCH = Search(num_domains=D, floor=0.03)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**31 - 1), st.integers(0, 4))
def test_proposals_are_mixtures_that_respect_the_floor(count, seed, open_):
    pending = np.random.default_rng(seed).dirichlet(np.ones(D), open_)
    mixture, diagnostics = SEARCH.ask(told(SEARCH, count, seed), key=jax.random.key(seed), pending=pending)
    assert mixture.dtype == np.float64 and mixture.shape == (D,)
    assert np.all(mixture >= 0)
    assert math.fsum(mixture) == 1.0
    assert np.all((mixture == 0) | (mixture >= 0.03 * (1 - 1e-9)))
    assert diagnostics.origin == ("initial" if count + open_ < 3 else "ucb")
    assert diagnostics.stderr > 0 and np.isfinite(diagnostics.acquisition)


def test_what_is_proposed_is_recorded_to_the_bit():
    state = told(SEARCH, 6)
    mixture, _ = SEARCH.ask(state, key=jax.random.key(5))
    state = SEARCH.tell(state, mixture, 0.0)
    np.testing.assert_array_equal(np.asarray(state.mixtures)[6], mixture)


def test_the_same_key_and_observations_propose_the_same():
    state = told(SEARCH, 6)
    first, _ = SEARCH.ask(state, key=jax.random.key(1))
    again, _ = Search(num_domains=D, floor=0.03).ask(told(SEARCH, 6), key=jax.random.key(1))
    other, _ = SEARCH.ask(state, key=jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() < 0.5


def test_step_is_tell_then_ask():
    state = told(SEARCH, 5)
    mixture = np.array([0.4, 0.4, 0.1, 0.1])
    stepped, proposal, diagnostics = SEARCH.step(state, mixture, -0.1, 0.02, key=jax.random.key(3))
    told_ = SEARCH.tell(state, mixture, -0.1, 0.02)
    for one, two in zip(stepped, told_, strict=True):
        np.testing.assert_array_equal(one, two)
    expected, expected_diagnostics = SEARCH.ask(told_, key=jax.random.key(3))
    np.testing.assert_allclose(proposal, expected, atol=1e-9)
    assert diagnostics.mean == pytest.approx(expected_diagnostics.mean, abs=1e-9)


def test_proposals_keep_away_from_pending_mixtures():
    state = told(SEARCH, 8)
    key = jax.random.key(0)
    batch: list[np.ndarray] = []
    for _ in range(4):
        batch.append(SEARCH.ask(state, key=key, pending=np.array(batch))[0])
    distances = [np.linalg.norm(a - b) for i, a in enumerate(batch) for b in batch[:i]]
    assert min(distances) > 1e-3


def test_buffers_grow_without_loss_and_compile_once_per_size():
    search = Search(num_domains=D, capacity=4, beta=1.5)
    before = module._step._cache_size()
    state = search.init()
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(D), 8)
    for i, mixture in enumerate(mixtures):
        pending = mixtures[: i % 3] if i % 2 else None
        stderr = 0.1 if i % 4 else None
        state, _, _ = search.step(state, mixture, float(i), stderr, key=jax.random.key(i), pending=pending)
        search.ask(state, key=jax.random.key(i), pending=pending)
    assert state.mixtures.shape == (8, D) and bool(np.all(state.mask))
    np.testing.assert_allclose(np.asarray(state.mixtures), mixtures)
    np.testing.assert_array_equal(np.asarray(state.values), np.arange(8))
    assert module._step._cache_size() == before + 2


def test_best_has_the_highest_posterior_mean_of_the_observed():
    state = told(SEARCH, 10)
    mixture, mean, stderr = SEARCH.best(state)
    observed = np.asarray(state.mixtures)[:10]
    means, deviations = SEARCH.predict(state, observed)
    top = int(means.argmax())
    np.testing.assert_array_equal(mixture, observed[top])
    assert (mean, stderr) == pytest.approx((means[top], deviations[top]))
    with pytest.raises(ValueError, match="before the first feedback"):
        SEARCH.best(SEARCH.init())


def test_beats_random_search_on_noisy_feedback():
    ours, chance = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        state = SEARCH.init()
        mixture, _ = SEARCH.ask(state, key=jax.random.key(seed))
        for round_ in range(15):
            value = objective(mixture) + 0.02 * rng.standard_normal()
            state, mixture, _ = SEARCH.step(state, mixture, value, key=jax.random.key(100 * seed + round_))
        ours.append(-objective(SEARCH.best(state)[0]))
        draws = [np.full(D, 1 / D), *rng.dirichlet(np.ones(D), 14)]
        noisy = [objective(draw) + 0.02 * rng.standard_normal() for draw in draws]
        chance.append(-objective(draws[int(np.argmax(noisy))]))
    assert np.median(ours) < 0.4 * np.median(chance)


def test_units_of_the_feedback_do_not_matter():
    small, large = SEARCH.init(), SEARCH.init()
    rng = np.random.default_rng(4)
    for mixture in rng.dirichlet(np.ones(D), 6):
        small = SEARCH.tell(small, mixture, objective(mixture), 0.01)
        large = SEARCH.tell(large, mixture, 1000 * objective(mixture) + 5e4, 10.0)
    one, first = SEARCH.ask(small, key=jax.random.key(0))
    two, second = SEARCH.ask(large, key=jax.random.key(0))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert second.stderr == pytest.approx(1000 * first.stderr, rel=1e-6)
    assert second.mean == pytest.approx(1000 * first.mean + 5e4, rel=1e-6)


def test_coarse_equal_and_extreme_feedback_give_mixtures():
    rng = np.random.default_rng(1)
    mixtures = rng.dirichlet(np.ones(D), 6)
    for values in (
        [0.1] * 6,
        [1.0, 1.0, 2.0, 1.0, 2.0, 2.0],
        [0.1, 0.2, -1e200, 0.1, 0.3, 0.2],
        [1e-200 * i for i in range(6)],
    ):
        state = SEARCH.init()
        for mixture, value in zip(mixtures, values, strict=True):
            state = SEARCH.tell(state, mixture, value)
        mixture, diagnostics = SEARCH.ask(state, key=jax.random.key(0))
        assert math.fsum(mixture) == 1.0 and np.all(mixture >= 0)
        assert np.all(np.isfinite(diagnostics[:-1])) and diagnostics.stderr > 0
    # Equal up to rounding: there is no scale, and none is made of rounding errors.
    same = SEARCH.init()
    for mixture in mixtures:
        same = SEARCH.tell(same, mixture, 0.1)
    assert SEARCH.ask(same, key=jax.random.key(0))[1].stderr > 1e-3


def test_runs_on_the_host_whatever_the_default_device_is():
    code = """
import jax, numpy as np
from duet_jax.search import Search
search = Search(num_domains=3, capacity=4)
key = jax.device_put(jax.random.key(0), jax.devices()[1])
with jax.default_device(jax.devices()[1]):
    state, one, _ = search.step(search.init(), [0.2, 0.3, 0.5], 1.0, key=key)
two, _ = search.ask(state, key=jax.random.key(0))
assert state.values.devices() == {jax.devices()[0]}, state.values.devices()
assert one.tolist() == two.tolist() and state.values.dtype == np.float64
assert jax.numpy.ones(1).dtype == np.float32
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("mixture", "sentence"),
    [
        ("half", "one number for each of 4 domains"),
        ([0.5, 0.5], "one share for each of 4 domains"),
        ([0.5, 0.7, -0.2, 0.0], "negative"),
        ([0.5, 0.5, 0.5, 0.0], "sums to 1.5"),
        ([float("nan"), 0.5, 0.5, 0.0], "not finite"),
    ],
)
def test_what_is_no_mixture(mixture, sentence):
    with pytest.raises(ValueError, match=sentence):
        SEARCH.tell(SEARCH.init(), mixture, 0.0)
    with pytest.raises(ValueError, match=sentence):
        SEARCH.ask(SEARCH.init(), key=jax.random.key(0), pending=[mixture])


@pytest.mark.parametrize(
    ("value", "stderr"), [(float("nan"), None), (float("inf"), None), ("good", None), (0.0, -1.0), (0.0, float("nan"))]
)
def test_what_is_no_feedback(value, stderr):
    with pytest.raises(FeedbackError, match="finite"):
        SEARCH.tell(SEARCH.init(), np.full(D, 0.25), value, stderr)


def test_no_global_setting_changes():
    assert not jax.config.jax_enable_x64
    told(SEARCH, 3)
    assert not jax.config.jax_enable_x64
    with module._host():
        pass
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("bad", [{"num_domains": 1}, {"floor": 0.5}, {"beta": -1.0}, {"initial": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        Search(**{"num_domains": D, **bad})
