"""Near duplicates: planted ones are found, exactly as by comparing all pairs, across domains and through `score`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import SelectorConfig, TrainingConfig
from duet_jax.data import Encoded
from duet_jax.models import llama
from duet_jax.selection import Pool, score
from duet_jax.selection.duplicates import first_of_each, shingles
from duet_jax.training.sft import Trainer

MODEL = llama.LlamaConfig(
    vocab_size=512, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
)


def encoded(rows: list[list[int]], tag: str = "") -> Encoded:
    tokens = tuple(np.array(row, np.int32) for row in rows)
    return Encoded(tokens, np.ones(len(rows), np.int32), tuple(f"{tag}{i}" for i in range(len(rows))))


def grams(row: list[int]) -> set[tuple[int, ...]]:
    """The definition: 5-grams of tokens; short rows are one."""
    return {tuple(row[i : i + 5]) for i in range(max(len(row) - 4, 1))}


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=14), min_size=1, max_size=16)


@given(ROWS)
def test_numbers_of_shingles_are_equal_where_the_shingles_are(rows: list[list[int]]) -> None:
    found, expected = shingles(encoded(rows)), [grams(row) for row in rows]
    for one, numbers in zip(expected, found, strict=True):
        assert len(numbers) == len(one) and (np.diff(numbers) > 0).all()
        for other, others in zip(expected, found, strict=True):
            assert len(np.intersect1d(numbers, others)) == len(one & other)
    # From the rarest on.
    number, count = np.unique(np.concatenate(found), return_counts=True)
    assert (np.diff(number) == 1).all() and (np.diff(count) >= 0).all()


@given(ROWS, st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0]))
def test_kept_are_those_of_comparing_all_pairs(rows: list[list[int]], threshold: float) -> None:
    sets, expected = [grams(row) for row in rows], []
    for i, one in enumerate(sets):
        if all(jaccard(one, sets[j]) < threshold for j in expected):
            expected.append(i)
    np.testing.assert_array_equal(np.flatnonzero(first_of_each(shingles(encoded(rows)), threshold)), expected)


def test_examples_are_compared_only_where_rare_shingles_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand examples with one long beginning in common: it is frequent, so no two are compared for it."""
    rng = np.random.default_rng(0)
    rows = [[*range(20), *rng.integers(20, 500, 60)] for _ in range(1000)]
    rows[700] = [*rows[3][:-1], 501]
    compared = 0
    real = np.intersect1d

    def counting(*args, **options):  # type: ignore[no-untyped-def]
        nonlocal compared
        compared += 1
        return real(*args, **options)

    monkeypatch.setattr(np, "intersect1d", counting)
    np.testing.assert_array_equal(np.flatnonzero(~first_of_each(shingles(encoded(rows)), 0.8)), [700])
    assert compared < 20


def test_planted_duplicates_of_all_domains_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, 500, (30, 60)).tolist() for _ in range(2))
    # One token of 60 changed in the middle changes 5 of 56 shingles: 51 / 61 = 0.836.
    changed = [*first[4][:30], 500, *first[4][31:]]
    shorter = first[5][:50]  # 46 of 56 = 0.821
    half = first[6][:30]  # 26 of 56
    first += [changed, half]
    second += [first[7], shorter, [1, 2], [1, 2], [1, 3]]
    said: list[str] = []
    base = llama.init(MODEL, key=jax.random.key(0))
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, base), TrainingConfig(learning_rate=0.1), (64,), 0)
    nothing = encoded([])
    pool = Pool(
        ("a", "b"), (encoded(first, "a"), encoded(second, "b")), (nothing,) * 2, (), trainer, "f", 0, said.append
    )
    selector = SelectorConfig(kind="near_duplicates", rule="top_k")
    found = score(pool, selector, tmp_path)
    assert set(np.concatenate(found)) == {1.0, -np.inf}
    assert np.flatnonzero(found[0] == -np.inf).tolist() == [30]
    assert np.flatnonzero(found[1] == -np.inf).tolist() == [30, 31, 33]
    assert said == [
        "near_duplicates, a: 1 of 32 examples repeat an earlier one",
        "near_duplicates, b: 3 of 35 examples repeat an earlier one",
    ]
    strict = score(pool, dataclasses.replace(selector, threshold=0.83), tmp_path)
    assert np.flatnonzero(np.concatenate(strict) == -np.inf).tolist() == [30, 62, 65]
