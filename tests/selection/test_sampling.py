from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.config import SelectorConfig
from duet_jax.errors import DataError
from duet_jax.selection import choose, floor_share, plan, pool_size, sample, sampling

RULES = ("weighted", "top_k", "remove_lowest")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    utilities=st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    count=st.integers(0, 100),
    rule=st.sampled_from(RULES),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 3),
)
def test_sample_is_without_replacement_and_epochs_repeat_evenly(utilities, count, rule, fraction, seed):
    utilities = np.array(utilities)
    draw = [sample(utilities, count, rule=rule, fraction=fraction, rng=np.random.default_rng(seed)) for _ in range(2)]
    np.testing.assert_array_equal(*draw)
    chosen = draw[0]
    size = pool_size(len(utilities), rule=rule, fraction=fraction)
    assert chosen.dtype == np.int64 and chosen.shape == (count,) and 1 <= size <= len(utilities)
    times = np.bincount(chosen, minlength=len(utilities))
    if count <= size:
        assert times.max(initial=0) <= 1
    else:
        used = np.sort(times)[-size:]
        assert used.min() >= count // size and used.max() <= -(-count // size)
        assert times.sum() == used.sum()
    for start in range(0, count, size):
        epoch = chosen[start : start + size]
        assert len(set(epoch.tolist())) == len(epoch)


def _inclusion(utilities, count):
    """Probability of each example to be among `count` drawn one after another, by enumeration."""
    total = np.zeros(len(utilities))
    for order in itertools.permutations(range(len(utilities)), count):
        probability, left = 1.0, sum(utilities)
        for i in order:
            probability *= utilities[i] / left
            left -= utilities[i]
        total[list(order)] += probability
    return total


@pytest.mark.parametrize("count", [1, 2])
def test_weighted_sampling_has_the_exact_inclusion_probabilities(count):
    utilities = np.array([1.0, 2.0, 5.0])
    if count == 2:  # 1 - the probability to be last
        last = 1 - _inclusion(utilities, 2)
        assert last[2] == pytest.approx(1 / 8 * 2 / 7 + 2 / 8 * 1 / 6)
    draws, rng = 20000, np.random.default_rng(0)
    times = np.zeros(3)
    for _ in range(draws):
        times[sample(utilities, count, rule="weighted", rng=rng)] += 1
    expected = _inclusion(utilities, count)
    assert np.all(np.abs(times / draws - expected) < 4 * np.sqrt(expected * (1 - expected) / draws))


def test_weighted_repeats_follow_utilities_in_the_partial_epoch_only():
    utilities = np.array([1.0, 3.0])
    rng = np.random.default_rng(0)
    twice = sum(np.bincount(sample(utilities, 3, rule="weighted", rng=rng))[1] == 2 for _ in range(4000))
    assert abs(twice / 4000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_zero_utilities_come_last_and_uniformly():
    utilities = np.array([0.0, 1e-300, 0.0, 1e300, 0.0])
    rng = np.random.default_rng(0)
    third = np.zeros(5)
    for _ in range(3000):
        chosen = sample(utilities, 3, rule="weighted", rng=rng)
        assert {1, 3} <= set(chosen.tolist())
        third[[i for i in chosen if i not in (1, 3)]] += 1
    assert np.all(np.abs(third[[0, 2, 4]] / 3000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000))
    assert sorted(sample(np.zeros(4), 4, rule="weighted", rng=rng).tolist()) == [0, 1, 2, 3]


def test_equal_utilities_are_uniform_sampling():
    rng = np.random.default_rng(1)
    for rule in RULES:
        times = np.zeros(4)
        for _ in range(3000):
            times[sample(np.ones(4), 1, rule=rule, rng=rng)] += 1
        assert np.all(np.abs(times / 3000 - 0.25) < 4 * math.sqrt(0.1875 / 3000)), rule


def test_top_k_takes_the_highest():
    utilities = np.array([3.0, -1.0, 7.0, 5.0, 5.0])
    rng = np.random.default_rng(0)
    assert set(sample(utilities, 3, rule="top_k", rng=rng).tolist()) == {2, 3, 4}
    ties = [set(sample(utilities, 2, rule="top_k", rng=rng).tolist()) for _ in range(50)]
    assert all(2 in tie for tie in ties) and {2, 3} in ties and {2, 4} in ties
    np.testing.assert_array_equal(np.bincount(sample(utilities, 6, rule="top_k", rng=rng)), [1, 1, 2, 1, 1])


def test_remove_lowest_is_uniform_over_the_rest():
    utilities = np.array([5.0, -2.0, 8.0, 1.0, 100.0])
    rng = np.random.default_rng(0)
    times = np.zeros(5)
    for _ in range(3000):
        times[sample(utilities, 2, rule="remove_lowest", fraction=0.4, rng=rng)] += 1
    assert np.all(times[[1, 3]] == 0)
    assert np.all(np.abs(times[[0, 2, 4]] / 3000 - 2 / 3) < 4 * math.sqrt(2 / 9 / 3000))
    np.testing.assert_array_equal(
        np.bincount(sample(utilities, 6, rule="remove_lowest", fraction=0.4, rng=rng)), [2, 0, 2, 0, 2]
    )


def test_pool_size_rounds_the_removed_down():
    assert pool_size(5, rule="remove_lowest", fraction=0.2) == 4
    assert pool_size(100, rule="remove_lowest", fraction=0.29) == 71
    assert pool_size(3, rule="remove_lowest", fraction=0.3) == 3
    assert pool_size(1, rule="remove_lowest", fraction=0.99) == 1
    assert pool_size(100, rule="top_k", fraction=0.5) == 100


def test_sample_rejects_bad_input():
    rng = np.random.default_rng(0)
    for value, text in (
        (-1.0, "finite and at least 0, but example 1 has -1.0"),
        (math.nan, "example 1 has nan"),
        (math.inf, "example 1 has inf"),
    ):
        with pytest.raises(DataError, match=f"the rule 'weighted' needs utilities that are .*{text}"):
            sample(np.array([1.0, value]), 1, rule="weighted", rng=rng)
    with pytest.raises(DataError, match="the rule 'top_k' needs utilities that are finite, but example 0 has nan"):
        sample(np.array([math.nan]), 1, rule="top_k", rng=rng)
    with pytest.raises(ValueError, match="there is no rule 'best'; the rules are weighted, top_k, remove_lowest"):
        sample(np.ones(2), 1, rule="best", rng=rng)
    with pytest.raises(ValueError, match="cannot choose 1 of 0 examples"):
        sample(np.ones(0), 1, rule="top_k", rng=rng)
    with pytest.raises(ValueError, match=r"the fraction to remove must be in \[0, 1\), not 1.0"):
        sample(np.ones(2), 1, rule="remove_lowest", fraction=1.0, rng=rng)
    with pytest.raises(ValueError, match="utilities must be one number an example"):
        sample(np.ones((2, 2)), 1, rule="top_k", rng=rng)
    assert sample(np.ones(0), 0, rule="top_k", rng=rng).shape == (0,)


def test_plan_states_repeats():
    assert doctest.testmod(sampling).failed == 0
    assert plan("a", 120, 300) == "a: 300 wanted of 120 examples: each 2 or 3 times"
    assert plan("a", 120, 240) == "a: 240 wanted of 120 examples: each 2 times"
    assert plan("a", 120, 121) == "a: 121 wanted of 120 examples: each 1 or 2 times"
    assert plan("a", 120, 120) == "a: 120 of 120 examples, each once"
    assert plan("a", 120, 0) == "a: none of 120 examples"


@pytest.mark.parametrize("rule", RULES)
@given(
    utilities=st.lists(st.one_of(st.floats(0, 10), st.just(-math.inf)), min_size=1, max_size=12),
    count=st.integers(0, 30),
)
def test_what_must_never_be_chosen_is_as_if_it_were_not_there(rule, utilities, count):
    utilities = np.array(utilities)
    eligible = np.flatnonzero(utilities > -np.inf)
    if not len(eligible) and count:
        with pytest.raises(ValueError, match=f"cannot choose {count} of 0 examples"):
            sample(utilities, count, rule=rule, rng=np.random.default_rng(0))
        return
    found = sample(utilities, count, rule=rule, fraction=0.3, rng=np.random.default_rng(0))
    alone = sample(utilities[eligible], count, rule=rule, fraction=0.3, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(found, eligible[alone])


def test_scores_of_a_model_are_shifted_by_the_lowest_that_counts():
    """-inf is no score: were it subtracted, all weights would be infinite."""
    selector = SelectorConfig(kind="davir", rule="weighted")
    scores = np.array([-2.0, -np.inf, 1.0, 0.0])
    draws = np.array([choose(selector, scores, 1, np.random.default_rng(i))[0] for i in range(3000)])
    expected = np.array([0, 0, 3, 2]) / 5
    assert np.abs(np.bincount(draws, minlength=4) / 3000 - expected).max() < 4 * math.sqrt(0.25 / 3000)


@given(percent=st.integers(1, 100), number=st.integers(1, 10**6))
def test_n9_a_share_is_rounded_down(percent, number):
    assert floor_share(0.05, 270_679) == 13_533
    assert floor_share(percent / 100, number) == percent * number // 100
