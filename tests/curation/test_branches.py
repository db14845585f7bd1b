"""Texts that share a beginning are read as if each stood alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.curation import branches, trees
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
    # Texts alone, trees of one chunk and of several, and chunks that are longer than the others.
    monkeypatch.setattr(trees, "CHUNKS", (8,))
    monkeypatch.setattr(trees, "SHARES", (4,))
    config = dataclasses.replace(SHAPE, sliding_window=window)
    params = llama.init(config, key=jax.random.key(0))
    readout = jax.random.normal(jax.random.key(1), (3, 16))
    texts, groups = texts_of(np.random.default_rng(0), 9, 45)
    texts, groups = [*texts, np.append(texts[0], np.arange(10))], [*groups, groups[0]]
    passes = trees.plan(texts, groups, 512, 0)
    assert {one.chunks.shape[1] for one in passes} >= {0, 8, 16} and max(one.owners.max(initial=0) for one in passes)
    labels = [number % 12 - 1 for number in range(len(texts))]
    found, log_probs = branches.read_ends(
        config, params, None, readout, texts, groups, labels, pad_id=0, batch_tokens=512, compute_dtype=jnp.float32
    )
    padded = np.zeros((len(texts), 64), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    hidden = jax.jit(lambda p, t: llama.hidden_states(config, p, t))(params, padded)
    ends = np.array([len(text) - 1 for text in texts])
    hidden = hidden[np.arange(len(texts)), ends]
    np.testing.assert_allclose(found, hidden @ readout.T, atol=2e-5)
    every = jax.nn.log_softmax(hidden @ params["embedding"].T)
    expected = [0.0 if label < 0 else every[row, label] for row, label in enumerate(labels)]
    np.testing.assert_allclose(log_probs, expected, atol=2e-5)


def read_back(one: trees.Pass) -> dict[int, list[int]]:
    """The tokens that the last one of each text sees, by the text's number."""
    rows, length = one.trunks.shape
    seen = branches.visible(*map(jnp.asarray, one[2:4]), jnp.asarray(one.shared), length, None)
    found = {}
    for place, number in zip(one.places.tolist(), one.texts.tolist(), strict=False):
        if place < rows * length:
            found[number] = one.trunks[place // length, : place % length + 1].tolist()
            continue
        chunk, at = divmod(place - rows * length, one.chunks.shape[1])
        whole = np.concatenate([one.trunks[one.owners[chunk]], one.chunks[chunk]])
        mine = np.asarray(seen[chunk, at])
        position = np.concatenate([np.arange(length), one.positions[chunk]])[mine]
        assert position.tolist() == list(range(len(position)))
        found[number] = whole[mine].tolist()
    return found


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 300), st.integers(64, 3000))
def test_passes_hold_every_text_once(seed: int, groups: int, longest: int, batch_tokens: int) -> None:
    texts, owners = texts_of(np.random.default_rng(seed), groups, longest)
    found: dict[int, list[int]] = {}
    for one in trees.plan(texts, owners, batch_tokens, 0):
        back = read_back(one)
        assert not back.keys() & found.keys()
        found |= back
    assert [found[number] for number in range(len(texts))] == [text.tolist() for text in texts]


def test_what_is_shared_is_read_once() -> None:
    start = np.arange(100) % 11
    texts = [np.append(start, [i, 1]).astype(np.int32) for i in range(6)]
    (tree,) = trees.trees(texts, [0] * 6, 64)
    assert len(tree.trunk) == 100 and [len(chunk.tokens) for chunk in tree.chunks] == [6 * 2]
    alone = trees.trees(texts, range(6), 64)
    assert [(len(tree.trunk), tree.chunks) for tree in alone] == [(102, ())] * 6
    # Equal texts are one, and what a few of them share beyond the others is shared within a chunk.
    more = [np.append(texts[0], [2, i]) for i in range(3)]
    (tree,) = trees.trees([*texts, texts[1], *more], [0] * 10, 64)
    assert [len(chunk.tokens) for chunk in tree.chunks] == [6 * 2 + 1 + 3]
    # Two kinds of texts that hardly begin alike have a trunk each, unless a chunk holds all that follows.
    kinds = [np.concatenate([[9], np.full(100, kind), [i]]) for kind in (1, 2) for i in range(3)]
    assert [len(tree.trunk) for tree in trees.trees(kinds, [0] * 6, 64)] == [101, 101]
    assert [len(tree.trunk) for tree in trees.trees([text[:30] for text in kinds], [0] * 6, 256)] == [1]


def programs(passes: list[trees.Pass]) -> set[tuple[tuple[int, ...], ...]]:
    return {tuple(array.shape for array in one[:-1]) for one in passes}


def test_the_parts_of_a_work_come_to_share_their_programs() -> None:
    # As `in_parts` gives them: sorted by size, and each laid out by itself.
    seen: set[tuple[tuple[int, ...], ...]] = set()
    known = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for lengths in np.split(np.sort(rng.integers(60, 250, 12 * 24)), 12):
            texts, groups = [], []
            for group, length in enumerate(lengths):
                start = rng.integers(0, 9, length)
                texts += [np.append(start, rng.integers(0, 9, 20)).astype(np.int32) for _ in range(rng.integers(6, 20))]
                # The places of equal texts are part of a shape.
                texts += texts[-1:] * int(rng.integers(0, 4))
                groups += [group] * (len(texts) - len(groups))
            seen |= programs(trees.plan(texts, groups, 2048, 0))
        known.append(len(seen))
    # Trunks are padded to seven lengths: a work takes little more than a program for each, and the next ones those.
    assert known[0] <= 10 and known[1] <= known[0] + 2 and known[2] <= known[1] + 1, known


def test_the_layout_has_few_tokens_and_few_shapes() -> None:
    rng = np.random.default_rng(0)
    texts, groups = [], []
    for group in range(60):
        start = rng.integers(0, 9, rng.integers(100, 260))
        texts += [np.concatenate([start, rng.integers(0, 9, 30)]).astype(np.int32) for _ in range(16)]
        groups += [group] * 16
    passes = trees.plan(texts, groups, 4096, 0)
    needed = sum(len(texts[16 * group]) - 30 + 16 * 30 for group in range(60))
    assert sum(one.trunks.size + one.chunks.size for one in passes) < 1.25 * needed
    assert len(programs(passes)) <= 6
    assert max(one.trunks.size + one.chunks.size for one in passes) <= 4096
    # A tree that is longer than a pass is read in several.
    long = [np.concatenate([np.zeros(3000), rng.integers(0, 9, 100)]).astype(np.int32) for _ in range(16)]
    assert sum(len(one.texts) for one in trees.plan(long, [0] * 16, 1024, 0)) == 16
