from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.data import Encoded, gather_batch, plan_batches, plan_forward

BUCKETS = (8, 16, 32)
lengths_lists = st.lists(st.integers(0, 32), max_size=60)


def _encoded(lengths, prompt_lengths=None):
    tokens = tuple(np.arange(10, 10 + n, dtype=np.int32) for n in lengths)
    prompts = np.zeros(len(lengths), np.int32) if prompt_lengths is None else np.array(prompt_lengths, np.int32)
    return Encoded(tokens, prompts, tuple(map(str, range(len(lengths)))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=lengths_lists, batch_size=st.integers(1, 7), seed=st.one_of(st.none(), st.integers(0, 5)))
def test_plan_covers_every_example_once_with_at_most_one_partial_batch(lengths, batch_size, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    plan = plan_batches(lengths, BUCKETS, batch_size, rng=rng)
    chosen = [i for _, indices in plan for i in indices.tolist()]
    assert sorted(chosen) == list(range(len(lengths)))
    assert len(plan) == -(-len(lengths) // batch_size)
    assert sum(len(indices) < batch_size for _, indices in plan) <= 1
    for bucket, indices in plan:
        assert bucket in BUCKETS and indices.dtype == np.int32
        longest = max(lengths[i] for i in indices)
        assert longest <= bucket
        # The batch's longest example would not fit a smaller bucket, unless all were promoted together.
        smaller = [b for b in BUCKETS if longest <= b]
        assert bucket == smaller[0] or len(indices) == batch_size


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=lengths_lists, batch_size=st.integers(1, 7))
def test_at_most_one_promoted_remainder_per_bucket_boundary(lengths, batch_size):
    plan = plan_batches(lengths, BUCKETS, batch_size)
    fits = Counter(min(b for b in BUCKETS if n <= b) for n in lengths)
    promoted = sum(1 for bucket, ix in plan for i in ix if bucket > 8 and lengths[i] <= 8)
    assert promoted <= fits[8] % batch_size


def test_plan_is_a_function_of_the_seed():
    lengths = np.random.default_rng(0).integers(1, 33, 100)
    plans = [plan_batches(lengths, BUCKETS, 8, rng=np.random.default_rng(s)) for s in (3, 3, 4)]
    flat = [[(b, ix.tolist()) for b, ix in plan] for plan in plans]
    assert flat[0] == flat[1] != flat[2]
    in_order = [(b, ix.tolist()) for b, ix in plan_batches([5, 20, 6, 7], BUCKETS, 2)]
    assert in_order == [(8, [0, 2]), (32, [3, 1])]


def test_lonely_short_examples_do_not_ask_for_a_large_bucket():
    assert [b for b, _ in plan_batches([3, 4], BUCKETS, 8)] == [8]
    assert plan_batches([], BUCKETS, 8) == []


def test_plan_rejects_bad_input():
    with pytest.raises(ValueError, match="example 1 has 33 tokens, more than the largest bucket 32"):
        plan_batches([3, 33], BUCKETS, 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        plan_batches([3], BUCKETS, 0)
    for buckets in ([], [0, 8]):
        with pytest.raises(ValueError, match="buckets must be one or more positive lengths"):
            plan_batches([3], buckets, 2)


def test_gather_pads_and_masks_exactly_the_predicted_tokens():
    encoded = _encoded([4, 6, 3], prompt_lengths=[2, 1, 0])
    batch = gather_batch(encoded, np.array([2, 0]), 5, 3, pad_id=99)
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 99, 99], [10, 11, 12, 13, 99], [99] * 5])
    # Row 0 has no prompt and no BOS: its first token has nothing before it and is not predicted.
    np.testing.assert_array_equal(batch.loss_mask, np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0] * 5], bool))
    np.testing.assert_array_equal(batch.index, [2, 0, -1])
    assert (batch.tokens.dtype, batch.loss_mask.dtype, batch.index.dtype) == (np.int32, np.bool_, np.int32)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), lengths=st.lists(st.integers(2, 32), min_size=1, max_size=30))
def test_planned_batches_hold_every_loss_token_once(data, lengths):
    prompts = [data.draw(st.integers(0, n - 1)) for n in lengths]
    encoded = _encoded(lengths, prompts)
    plan = plan_batches(encoded.lengths, BUCKETS, 4, rng=np.random.default_rng(0))
    batches = [gather_batch(encoded, indices, bucket, 4, 0) for bucket, indices in plan]
    total = sum(int(batch.loss_mask.sum()) for batch in batches)
    assert total == sum(n - max(p, 1) for n, p in zip(lengths, prompts, strict=True))


def test_gather_rejects_what_does_not_fit():
    encoded = _encoded([4, 6])
    with pytest.raises(ValueError, match="2 examples do not fit a batch of 1"):
        gather_batch(encoded, np.array([0, 1]), 8, 1, 0)
    with pytest.raises(ValueError, match="example 1 has 6 tokens and does not fit a bucket of 5"):
        gather_batch(encoded, np.array([1]), 5, 1, 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=lengths_lists, batch_size=st.integers(1, 7))
def test_forward_batches_cover_every_example_within_the_budget(lengths, batch_size):
    plan = plan_forward(lengths, BUCKETS, batch_size)
    assert sorted(i for _, _, rows in plan for i in rows.tolist()) == list(range(len(lengths)))
    assert sum(len(rows) < size for _, size, rows in plan) <= 1
    for length, size, rows in plan:
        assert length in (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
        assert size * length <= 32 * batch_size and max(lengths[i] for i in rows) <= length
        # Budget is given away only where there is no room for one more row, or one batch is enough for all.
        assert (size + 1) * length > 32 * batch_size or len(plan) == 1
    if len(plan) == 1:
        assert len(plan[0][2]) <= plan[0][1] < 2 * len(plan[0][2])
    padded = sum(size * length for length, size, _ in plan)
    assert padded <= 32 * max(len(lengths) + batch_size, 1)


def test_rows_of_other_processes_are_not_read():
    encoded = _encoded([3, 4, 2])
    held = np.array([False, True, True, False])
    whole, own = (gather_batch(encoded, np.array([2, 0, 1]), 5, 4, 99, given) for given in (None, held))
    np.testing.assert_array_equal(own.tokens[held], whole.tokens[held])
    np.testing.assert_array_equal(own.loss_mask[held], whole.loss_mask[held])
    assert (own.tokens[~held] == 99).all() and not own.loss_mask[~held].any()
    np.testing.assert_array_equal(own.index, whole.index)


def test_forward_batches_pad_less_than_those_of_training():
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    forward = sum(length * size for length, size, _ in plan_forward(lengths, BUCKETS, 8))
    training = sum(length * 8 for length, _ in plan_batches(lengths, BUCKETS, 8))
    assert forward < 1.15 * lengths.sum() < training


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=lengths_lists, batch_size=st.integers(1, 9), multiple=st.integers(1, 8))
def test_forward_batches_are_shared_evenly_by_devices(lengths, batch_size, multiple):
    plan = plan_forward(lengths, BUCKETS, batch_size, multiple)
    assert sorted(i for _, _, rows in plan for i in rows.tolist()) == list(range(len(lengths)))
    for length, size, rows in plan:
        assert size % multiple == 0 and len(rows) <= size
        assert size * length <= 32 * batch_size or size == multiple
