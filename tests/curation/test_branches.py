"""Texts that share a beginning are read as if each stood alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.curation import branches
from duet_jax.models import llama

SHAPE = llama.LlamaConfig(
    vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def texts_of(rng: np.random.Generator, groups: int, longest: int) -> tuple[list[np.ndarray], list[int]]:
    texts, owners = [], []
    for group in range(groups):
        start = rng.integers(0, 11, rng.integers(0, longest))
        for _ in range(rng.integers(1, 6)):
            texts.append(np.concatenate([start, rng.integers(0, 11, rng.integers(1, 9))]).astype(np.int32))
            owners.append(group)
    order = rng.permutation(len(texts))
    return [texts[i] for i in order], [owners[i] for i in order]


@pytest.mark.parametrize("window", [None, 5])
def test_each_text_is_read_as_by_itself(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "LONGEST", 40)
    config = dataclasses.replace(SHAPE, sliding_window=window)
    params = llama.init(config, key=jax.random.key(0))
    readout = jax.random.normal(jax.random.key(1), (3, 16))
    texts, groups = texts_of(np.random.default_rng(0), 9, 45)
    found = branches.read_ends(
        config, params, None, readout, texts, groups, pad_id=0, batch_tokens=512, compute_dtype=jnp.float32
    )
    padded = np.zeros((len(texts), 64), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    hidden = jax.jit(lambda p, t: llama.hidden_states(config, p, t))(params, padded)
    ends = np.array([len(text) - 1 for text in texts])
    np.testing.assert_allclose(found, hidden[np.arange(len(texts)), ends] @ readout.T, atol=2e-5)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 2400))
def test_rows_hold_every_text_once(seed: int, groups: int, longest: int) -> None:
    texts, owners = texts_of(np.random.default_rng(seed), groups, longest)
    rows = branches.rows_of(texts, owners)
    assert sorted(number for row in rows for number in row.texts) == list(range(len(texts)))
    for row in rows:
        shared = int((row.branches == branches.BEGINNING).sum())
        assert len(row.tokens) <= max(branches.LONGEST, 2 * shared) or len(row.texts) == 1
        assert len(row.texts) == len(row.ends) <= branches.MOST_BRANCHES
        start = row.branches == branches.BEGINNING
        for branch, (number, end) in enumerate(zip(row.texts, row.ends, strict=True), start=1):
            own = start | (row.branches == branch)
            np.testing.assert_array_equal(row.tokens[own], texts[number])
            np.testing.assert_array_equal(row.positions[own], np.arange(len(texts[number])))
            assert np.flatnonzero(own)[-1] == end


def test_what_is_shared_is_read_once() -> None:
    start = np.arange(100) % 11
    texts = [np.append(start, [i, 1]).astype(np.int32) for i in range(6)]
    (row,) = branches.rows_of(texts, [0] * 6)
    assert len(row.tokens) == 100 + 6 * 2
    assert sum(len(row.tokens) for row in branches.rows_of(texts, range(6))) == 6 * 102
    # However long it is; what follows it is bounded, since attention costs the square of a row.
    start = np.arange(3000) % 11
    texts = [np.concatenate([start, np.full(300, i)]).astype(np.int32) for i in range(6)]
    assert [len(row.tokens) for row in branches.rows_of(texts, [0] * 6)] == [3000 + 3 * 300] * 2


def test_rows_take_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def read(params: object, lora: object, readout: np.ndarray, tokens: np.ndarray, *rest: object) -> np.ndarray:
        shapes.append(tokens.shape)
        return np.zeros((len(tokens), branches.MOST_BRANCHES, len(readout)))

    monkeypatch.setattr(branches, "compiled", lambda config, compute_dtype: read)
    texts = [np.zeros(1100, np.int32)] * 4
    branches.read_ends(
        SHAPE, {}, None, np.zeros((1, 16)), texts, range(4), pad_id=0, batch_tokens=2560, compute_dtype=jnp.float32
    )  # type: ignore[arg-type]
    assert shapes == [(1, 1280)] * 4
