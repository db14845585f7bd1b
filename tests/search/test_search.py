"""The search: valid mixtures, reproducible, compiled once, and better than chance."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.errors import FeedbackError
from duet_jax.search import Constraints, Group, Scores, Search, simplex
from duet_jax.search import search as module
from duet_jax.search.constraints import contains

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


SEARCH = Search(num_domains=D, constraints=Constraints(floor=0.03))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**31 - 1), st.integers(0, 4))
def test_proposals_are_mixtures_that_respect_the_floor(count, seed, open_):
    pending = np.random.default_rng(seed).dirichlet(np.ones(D), open_)
    mixture, diagnostics = SEARCH.ask(told(SEARCH, count, seed), key=jax.random.key(seed), pending=pending)
    assert mixture.dtype == np.float64 and mixture.shape == (D,)
    assert np.all(mixture >= 0)
    assert math.fsum(mixture) == 1.0
    assert np.all((mixture == 0) | (mixture >= 0.03 * (1 - 1e-9)))
    # From one value nothing is learnt about mixtures.
    assert diagnostics.origin == ("initial" if count + open_ < 3 or count < 2 else "ucb")
    assert diagnostics.stderr > 0 and np.isfinite(diagnostics.acquisition) == (diagnostics.origin == "ucb")


def test_what_is_proposed_is_recorded_to_the_bit():
    state = told(SEARCH, 6)
    mixture, _ = SEARCH.ask(state, key=jax.random.key(5))
    state = SEARCH.tell(state, mixture, 0.0)
    np.testing.assert_array_equal(np.asarray(state.mixtures)[6], mixture)


def test_the_same_key_and_observations_propose_the_same():
    state = told(SEARCH, 6)
    first, _ = SEARCH.ask(state, key=jax.random.key(1))
    again, _ = Search(num_domains=D, constraints=Constraints(floor=0.03)).ask(told(SEARCH, 6), key=jax.random.key(1))
    other, _ = SEARCH.ask(state, key=jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() < 0.5


def test_step_is_tell_then_ask():
    state = told(SEARCH, 5)
    mixture = np.array([0.4, 0.4, 0.1, 0.1])
    stepped, proposal, diagnostics = SEARCH.step(state, mixture, -0.1, 0.02, key=jax.random.key(3))
    told_ = SEARCH.tell(state, mixture, -0.1, 0.02)
    jax.tree.map(np.testing.assert_array_equal, stepped, told_)
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


@pytest.mark.slow
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
    assert state.mixtures.shape == (16, D) and int(np.sum(state.mask)) == 8
    np.testing.assert_allclose(np.asarray(state.mixtures)[:8], mixtures)
    np.testing.assert_array_equal(np.asarray(state.feedback.values)[:8, 0], np.arange(8))
    assert module._step._cache_size() == before + 2


def test_best_has_the_highest_posterior_mean_of_the_observed():
    state = told(SEARCH, 10)
    mixture, mean, stderr, _ = SEARCH.best(state)
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
        alike = len(set(values)) == 1
        assert diagnostics.origin == ("initial" if alike else "ucb")
        numbers = diagnostics._replace(acquisition=0.0, gap=0.0) if alike else diagnostics
        assert np.all(np.isfinite(numbers[:-2])) and diagnostics.stderr > 0, diagnostics
    # Equal up to rounding: there is no scale, and none is made of rounding errors.
    same = SEARCH.init()
    for mixture in mixtures:
        same = SEARCH.tell(same, mixture, 0.1)
    assert SEARCH.ask(same, key=jax.random.key(0))[1].stderr > 1e-3


def test_runs_on_the_host_whatever_the_default_device_is():
    code = """
import jax, numpy as np
from duet_jax.search import Constraints, Group, Scores, Search
search = Search(num_domains=3, capacity=4)
key = jax.device_put(jax.random.key(0), jax.devices()[1])
with jax.default_device(jax.devices()[1]):
    state, one, _ = search.step(search.init(), [0.2, 0.3, 0.5], 1.0, key=key)
two, _ = search.ask(state, key=jax.random.key(0))
assert state.mixtures.devices() == {jax.devices()[0]}, state.mixtures.devices()
assert one.tolist() == two.tolist() and state.mixtures.dtype == np.float64
assert jax.numpy.ones(1).dtype == np.float32
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
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


@pytest.mark.parametrize(
    "bad", [{"num_domains": 1}, {"constraints": Constraints(floor=1.5)}, {"beta": -1.0}, {"initial": -1}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        Search(**{"num_domains": D, **bad})


@pytest.mark.slow
def test_at_most_three_compilations_from_1_to_200_observations():
    search = Search(num_domains=3, beta=1.7)
    before = module._step._cache_size()
    rng = np.random.default_rng(0)
    state = search.init()
    for i, mixture in enumerate(rng.dirichlet(np.ones(3), 200)):
        value = float(mixture @ [1, 2, 3])
        if i in (0, 1, 14, 15, 16, 17, 62, 63, 64, 65, 150, 198, 199):
            state, proposal, _ = search.step(state, mixture, value, key=jax.random.key(0))
            assert np.all(proposal >= 0) and math.fsum(proposal) == 1.0
        else:
            state = search.tell(state, mixture, value)
    assert module._step._cache_size() - before <= 3
    assert state.mixtures.shape[0] == 256


@pytest.mark.slow
def test_a_whole_study_is_one_program_under_scan_and_vmap():
    search = Search(num_domains=3, capacity=8)
    target = jnp.array([0.6, 0.4, 0.0])

    def study(key):
        def round_(state, key):
            proposal = search.propose(state, key=key)
            value = -jnp.sum((simplex.hellinger(proposal.mixture) - jnp.sqrt(target)) ** 2)
            return search.insert(state, proposal.mixture, (value, 0.0)), (proposal.mixture, value)

        return jax.lax.scan(round_, search.start(), jax.random.split(key, 8))[1]

    with jax.enable_x64(True):
        mixtures, values = jax.jit(jax.vmap(study))(jax.random.split(jax.random.key(0), 3))
        alone, _ = jax.jit(study)(jax.random.split(jax.random.key(0), 3)[1])
    mixtures, values, alone = map(np.asarray, (mixtures, values, alone))
    assert mixtures.shape == (3, 8, 3) and mixtures.dtype == np.float64
    np.testing.assert_allclose(mixtures[1], alone, atol=1e-6)
    np.testing.assert_allclose(mixtures.sum(-1), 1, atol=1e-12)
    assert np.all(values.max(axis=1) > -0.02) and np.all(values.max(axis=1) > values[:, 0] + 0.1)


def test_float32_agrees_with_float64_within_the_noise_floor():
    search = Search(num_domains=3, capacity=16)
    rng = np.random.default_rng(0)
    told_ = [(m, -float(((m - 0.3) ** 2).sum()) + 0.05 * rng.standard_normal()) for m in rng.dirichlet(np.ones(3), 10)]
    results = []
    for wide in (True, False):
        with jax.enable_x64(wide):
            state = search.start()
            for mixture, value in told_:
                state = search.insert(state, jnp.asarray(mixture), (value, 0.05))
            proposal = jax.jit(search.propose)(state, key=jax.random.key(0))
            assert proposal.mixture.dtype == (np.float64 if wide else np.float32)
            results.append(proposal)
    wide, narrow = results
    # The floor adds a tenth of the feedback's standard deviation as noise, and the draws differ.
    np.testing.assert_allclose(narrow.mean, wide.mean, atol=0.3 * float(wide.amplitude))
    np.testing.assert_allclose(narrow.acquisition, wide.acquisition, atol=0.15 * float(wide.amplitude))
    assert np.all(np.isfinite(np.asarray(narrow.mixture))) and abs(float(narrow.mixture.sum()) - 1) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("acquisition", ["log_ei", "thompson"])
def test_other_acquisitions_find_the_optimum(acquisition):
    search = Search(num_domains=D, acquisition=acquisition)
    state = search.init()
    mixture, _ = search.ask(state, key=jax.random.key(0))
    for i in range(16):
        state, mixture, diagnostics = search.step(state, mixture, objective(mixture), key=jax.random.key(i))
    assert diagnostics.origin == acquisition
    best, mean, stderr, _ = search.recommend(state)
    assert objective(best) > -0.01 and abs(mean - objective(best)) < 4 * stderr + 0.01


@pytest.mark.slow
def test_the_best_of_several_tasks():
    # One task wants the first domain and has large units, the other wants the second.
    search = Search(num_domains=3, feedback=Scores(weights=(0.5, 0.5)))
    state = search.init()
    for mixture in np.random.default_rng(0).dirichlet(np.ones(3), 12):
        values = [-1e4 * (1 - mixture[0]) ** 2, -((1 - mixture[1]) ** 2)]
        state = search.tell(state, mixture, values, [1e2, 1e-2])
    best, _, _, _ = search.recommend(state)
    assert best[2] < 0.05 and 0.3 < best[0] < 0.7
    with pytest.raises(FeedbackError, match="2 finite numbers"):
        search.tell(state, np.full(3, 1 / 3), 1.0)


def test_proposals_keep_all_constraints():
    constraints = Constraints(
        minimum=(0.1, 0, 0, 0), maximum=(1, 0.5, 0.25, 0.25), groups=(Group((2, 3), 0.1, 0.4),), floor=0.05, most=3
    )
    search = Search(num_domains=D, constraints=constraints)
    state = search.init()
    mixture, _ = search.ask(state, key=jax.random.key(0))
    for i in range(8):
        assert bool(contains(mixture, constraints, D)), mixture
        state, mixture, _ = search.step(state, mixture, objective(mixture), key=jax.random.key(i))
    assert bool(contains(search.recommend(state)[0], constraints, D))


@pytest.mark.slow
def test_a_prior_mixture_pulls():
    prior = (0.1, 0.1, 0.1, 0.7)
    distances = []
    for penalty in (0.0, 3.0, 100.0):
        search = Search(num_domains=D, prior=prior, penalty=penalty)
        mixture, _ = search.ask(told(search, 8), key=jax.random.key(0))
        distances.append(np.abs(mixture - prior).sum())
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.1


def test_batches_are_apart_and_reproducible():
    state = told(SEARCH, 8)
    mixtures, diagnostics = SEARCH.ask_batch(state, 3, key=jax.random.key(0))
    again, _ = SEARCH.ask_batch(state, 3, key=jax.random.key(0))
    np.testing.assert_array_equal(mixtures, again)
    assert mixtures.shape == (3, D) and len(diagnostics) == 3
    assert min(np.abs(mixtures[i] - mixtures[j]).max() for i in range(3) for j in range(i)) > 1e-3


def test_a_search_goes_on_from_its_serialised_state_to_the_bit():
    state = told(SEARCH, 7)
    file = io.BytesIO()
    leaves, structure = jax.tree.flatten(state)
    np.savez(file, *leaves)
    file.seek(0)
    restored = jax.tree.unflatten(structure, list(np.load(file).values()))
    one, _ = SEARCH.ask(state, key=jax.random.key(4))
    two, _ = SEARCH.ask(restored, key=jax.random.key(4))
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 64])
def test_few_and_many_domains(size):
    search = Search(num_domains=size)
    state, rng = search.init(), np.random.default_rng(0)
    mixture, _ = search.ask(state, key=jax.random.key(0))
    for i in range(5):
        state, mixture, diagnostics = search.step(state, mixture, float(rng.standard_normal()), key=jax.random.key(i))
        assert math.fsum(mixture) == 1.0 and np.all(mixture >= 0)
    assert np.all(np.isfinite(diagnostics[:-2]))


@pytest.mark.slow
def test_five_hundred_observations():
    search = Search(num_domains=D, capacity=500)
    state = told(search, 500)
    mixture, diagnostics = search.ask(state, key=jax.random.key(0))
    assert math.fsum(mixture) == 1.0 and np.all(np.isfinite(diagnostics[:-2]))
    assert objective(search.recommend(state)[0]) > -0.01


def test_the_first_design_has_no_mixture_twice():
    search, key, even = Search(num_domains=D), jax.random.key(0), np.full(D, 1 / D)
    np.testing.assert_array_equal(search.ask(search.init(), key=key)[0], even)
    heard = search.tell(search.init(), even, 1.0)
    for state, pending in ((heard, np.zeros((0, D))), (search.init(), even[None])):
        mixture, diagnostics = search.ask(state, key=key, pending=pending)
        assert diagnostics.origin == "initial"
        assert np.all(mixture > 0) and np.abs(mixture - even).max() > 0.01
