"""How target rows are built: any order, batches and devices give the same, and what is done is not done again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from duet_jax.data import Encoded
from duet_jax.errors import DataError
from duet_jax.influence import features, scores
from duet_jax.influence import policy_gradient as pg
from duet_jax.influence.build import Batching, Point, sketch
from duet_jax.influence.estimator import PAPER_CODE, Weights
from duet_jax.influence.scores import LESS_CODE, Checkpoint
from duet_jax.influence.store import Store
from tests.influence import every_reply
from tests.influence.every_reply import BATCHING, NEW, PROMPTS, ROWS, WIDE, close, plain_weights, rows_of, some


@pytest.mark.slow
def test_replies_spread_over_devices(tmp_path: Path) -> None:
    """Four devices of the host give the rows of one."""
    code = f"""
import dataclasses, importlib.util, jax, numpy as np, pathlib
assert len(jax.devices()) == 4
spec = importlib.util.spec_from_file_location("shared", {every_reply.__file__!r})
t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
point, (samples, chosen), folder = t.tiny(), t.some(0), pathlib.Path({str(tmp_path)!r})
one = t.rows_of(point, folder / "one", chosen, samples)
spread = dataclasses.replace(point.gradients, mesh=jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,)))
t.close(t.rows_of(dataclasses.replace(point, gradients=spread), folder / "four", chosen, samples), one)
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)


def test_prompts_keep_their_rows_in_any_order(point: Point, tmp_path: Path) -> None:
    samples, chosen = some(1)
    straight = rows_of(point, tmp_path / "a", chosen, samples)
    turned = Encoded(PROMPTS.tokens[::-1], PROMPTS.lengths[::-1], PROMPTS.ids[::-1])
    order = np.array([3, 0, 6, 1, 2, 5, 4])
    samples = dataclasses.replace(samples, ids=samples.ids[::-1][:, order], lengths=samples.lengths[::-1][:, order])
    found = rows_of(point, tmp_path / "b", plain_weights(chosen.values[::-1][:, order]), samples, prompts=turned)
    close(found[::-1], straight)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of all rows that go through the network."""
    seen: list[int] = []
    real = Batching.batches

    def batches(self: Batching, data: Encoded, rows: np.ndarray):  # type: ignore[no-untyped-def]
        for chosen, tokens, mask in real(self, data, rows):
            seen.extend(chosen.tolist())
            yield chosen, tokens, mask

    monkeypatch.setattr(Batching, "batches", batches)
    return seen


def test_replies_without_weight_are_not_computed(point: Point, tmp_path: Path, computed: list[int]) -> None:
    samples, chosen = some(3)
    told: list[tuple[int, int]] = []
    chosen.values[1] = 0
    rows = rows_of(point, tmp_path, chosen, samples, shard_size=1, on_progress=lambda done, of: told.append((done, of)))
    assert sorted(computed) == np.flatnonzero(chosen.values).tolist()
    assert (rows[1] == 0).all() and rows[0].any()
    assert told[0][0] == 0 and told[-1] == (len(computed), len(computed))


def test_a_killed_build_goes_on_to_the_same_bits(
    point: Point, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, chosen = some(4)

    def build(folder: Path, chosen: Weights = chosen) -> Store:
        return pg.target_sketches(
            point, PROMPTS, samples, chosen, folder, BATCHING, projection=WIDE, row_format="int8", shard_size=1
        )

    whole = build(tmp_path / "whole").finish()
    real = Store.write

    def failing(self: Store, shard: int, *args: object, **options: object) -> None:
        if shard == 1:
            raise OSError("the disk is full")
        real(self, shard, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with pytest.raises(OSError, match="the disk is full"):
            build(tmp_path / "part")
    computed.clear()
    assert build(tmp_path / "part").finish() == whole
    assert sorted(computed) == (7 + np.flatnonzero(chosen.values[1])).tolist()
    with pytest.raises(DataError, match="begun with another data "):
        build(tmp_path / "part", chosen._replace(values=2 * chosen.values))


def test_checkpoints_and_numbers_of_prompts_compile_nothing(point: Point, tmp_path: Path) -> None:
    samples, chosen = some(5)
    program = dataclasses.replace(point.gradients, reduction="sum").sketch(WIDE)
    rows_of(point, tmp_path / "a", chosen, samples, shard_size=2)
    sizes = program._cache_size(), pg._add_rows._cache_size()
    again = rows_of(doubled(point), tmp_path / "b", some(6)[1], some(6)[0], shard_size=2)
    assert (program._cache_size(), pg._add_rows._cache_size()) == sizes and again.any()


def test_replies_are_the_sampled_ids_and_none_is_cut(point: Point, tmp_path: Path) -> None:
    samples, chosen = some(6)
    rows = pg.replies(PROMPTS, samples)
    assert rows.ids[6:9] == ("first#6", "second#0", "second#1") and len(rows) == 14
    np.testing.assert_array_equal(rows.tokens[8], [*PROMPTS.tokens[1], *samples.ids[1, 1, : samples.lengths[1, 1]]])
    np.testing.assert_array_equal(rows.prompt_lengths, [2] * 7 + [4] * 7)
    short = Batching((2, 4), 16, 0)
    assert pg.covering(short, PROMPTS, NEW).buckets == (2, 4, 64) and pg.covering(BATCHING, PROMPTS, NEW) == BATCHING
    close(
        rows_of(point, tmp_path / "a", chosen, samples, batching=short),
        rows_of(point, tmp_path / "b", chosen, samples),
    )
    nothing = dataclasses.replace(samples, lengths=np.where(np.arange(7) == 3, 0, samples.lengths))
    with pytest.raises(DataError, match="a reply to the prompt 'first' has no tokens"):
        pg.replies(PROMPTS, nothing)
    empty = dataclasses.replace(PROMPTS, tokens=(PROMPTS.tokens[0], np.zeros(0, np.int32)))
    with pytest.raises(DataError, match="the prompt 'second' has no tokens"):
        pg.replies(empty, samples)
    with pytest.raises(ValueError, match="samples of 2 prompts, and 1 prompts"):
        pg.replies(Encoded(PROMPTS.tokens[:1], PROMPTS.lengths[:1], ("first",)), samples)
    for wrong, message in (
        (plain_weights(np.ones((2, 3))), "weights have shapes"),
        (chosen._replace(gold=np.ones(2, np.float32)), "pass gold"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_of(point, tmp_path / "c", wrong, samples)


def doubled(point: Point) -> Point:
    """Another checkpoint."""
    factors = jax.tree.map(lambda x: 2 * x, point.lora.factors)
    return dataclasses.replace(point, lora=dataclasses.replace(point.lora, factors=factors))


def test_training_rows_of_any_loss_meet_policy_gradients(point: Point, tmp_path: Path) -> None:
    samples, chosen = some(7)
    store = pg.target_sketches(point, PROMPTS, samples, chosen, tmp_path / "t", BATCHING, projection=WIDE)
    for loss in ("sum", "mean"):
        here = dataclasses.replace(point, gradients=dataclasses.replace(point.gradients, reduction=loss))
        train = sketch(here, ROWS, tmp_path / loss, BATCHING, projection=WIDE)
        assert np.isfinite(scores.utilities([Checkpoint(train, store)], LESS_CODE)).all()
        with pytest.raises(DataError, match="cannot be compared: loss"):
            scores.utilities([Checkpoint(store, train)], LESS_CODE)
    assert PAPER_CODE.importance_cap is None and features.Gradient().name == store.header.feature
