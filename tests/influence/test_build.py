"""Sketches of whole data sets: the rows of single examples, whatever the batches, shards and interruptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.data import Encoded
from duet_jax.errors import DataError
from duet_jax.influence import Adam, CountSketch, ExampleGradients, Moments
from duet_jax.influence.build import Batching, Point, measured_error, sketch
from duet_jax.influence.store import Store
from duet_jax.models import llama

MODEL = llama.LlamaConfig(
    vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
BATCHING = Batching((6, 12), 4, 0)
WIDTH = CountSketch(256)


def examples(count: int, seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 13, count)
    tokens = tuple(rng.integers(0, 17, length).astype(np.int32) for length in lengths)
    return Encoded(tokens, rng.integers(0, lengths - 1).astype(np.int32), tuple(f"e{i}" for i in range(count)))


@pytest.fixture(scope="module")
def point() -> Point:
    params = llama.init(MODEL, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = jax.tree.map(lambda x: 1e-3 * jax.random.normal(next(keys), x.shape), params)
    moments = Moments(noise, jax.tree.map(lambda x: 1e4 * x**2, noise), jnp.asarray(7))
    return Point(ExampleGradients(MODEL, target="full", remat="none"), params, None, moments, "model")


def test_rows_are_those_of_single_examples(point: Point, tmp_path: Path) -> None:
    data = examples(11, 0)
    store = sketch(point, data, tmp_path, BATCHING, projection=WIDTH, row_format="float32", shard_size=4)
    alone = Batching((12,), 1, 0)
    program = point.gradients.sketch(WIDTH)
    expected = [program(point.params, None, tokens, weights).values[0] for _, tokens, weights in rows_of(alone, data)]
    np.testing.assert_allclose(store.take(), np.stack(expected), rtol=2e-5, atol=1e-6)
    assert [record.ids for record in store.records()] == [data.ids[i : i + 4] for i in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate([record.lengths for record in store.records()]), data.lengths)


def rows_of(batching: Batching, data: Encoded):  # type: ignore[no-untyped-def]
    for row in range(len(data)):
        yield from batching.batches(data, np.array([row]))


def test_an_interrupted_build_goes_on_to_the_same_bits(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, told = examples(20, 1), []
    whole = sketch(point, data, tmp_path / "whole", BATCHING, projection=WIDTH, shard_size=5)
    real = Store.write

    def failing(self: Store, shard: int, *args: object, **options: object) -> None:
        if shard == 2:
            raise OSError("the disk is full")
        real(self, shard, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with pytest.raises(OSError, match="the disk is full"):
            sketch(point, data, tmp_path / "part", BATCHING, projection=WIDTH, shard_size=5)
    assert Store.open(tmp_path / "part").missing() == [2, 3]
    again = sketch(
        point,
        data,
        tmp_path / "part",
        BATCHING,
        projection=WIDTH,
        shard_size=5,
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert again.finish() == whole.finish()
    assert told[0] == (10, 20) and told[-1] == (20, 20)


def test_a_store_of_anything_else_is_refused(point: Point, tmp_path: Path) -> None:
    sketch(point, examples(3, 0), tmp_path, BATCHING, projection=WIDTH)
    for changed, name in (
        ((point, examples(3, 1), WIDTH), "data"),
        ((dataclasses.replace(point, model="other"), examples(3, 0), WIDTH), "model"),
        ((point, examples(3, 0), CountSketch(256, seed=1)), "scheme"),
    ):
        with pytest.raises(DataError, match=f"begun with another {name} "):
            sketch(*changed[:2], tmp_path, BATCHING, projection=changed[2])


@pytest.mark.slow
def test_the_measured_error_is_that_of_the_sketches(point: Point, tmp_path: Path) -> None:
    data, targets = examples(30, 2), examples(9, 3)
    feature, wide = Adam(), CountSketch(8192)
    stores = [
        sketch(point, data, tmp_path / "a", BATCHING, projection=wide, feature=feature),
        sketch(point, targets, tmp_path / "b", BATCHING, projection=wide),
    ]
    error = measured_error(point, (data, stores[0]), (targets, stores[1]), BATCHING, feature=feature)
    assert error.pairs == 24 * 8
    # A wrong pairing of rows, features or targets would have the error of unrelated vectors.
    assert 0.2 < error.rmse / error.expected < 1.6 and error.spearman > 0.9
    with pytest.raises(DataError, match="is not there"):
        measured_error(point, (data, Store.create(tmp_path / "c", stores[0].header)), (targets, stores[1]), BATCHING)


def test_the_total_is_the_mean_of_single_gradients(point: Point) -> None:
    data = examples(7, 4)
    found = point.total(data, BATCHING)
    single = [
        point.total(dataclasses.replace(data, tokens=(t,), prompt_lengths=data.prompt_lengths[i : i + 1]), BATCHING)
        for i, t in enumerate(data.tokens)
    ]
    for name, array in found.items():
        np.testing.assert_allclose(array, np.mean([each[name] for each in single], axis=0), rtol=1e-4, atol=1e-7)
