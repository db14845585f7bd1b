"""Scores from stores equal few-line oracles in NumPy, and the accuracy meter measures what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.errors import DataError
from duet_jax.influence import accuracy, scores, topk
from duet_jax.influence.header import Header
from duet_jax.influence.scores import LESS_CODE, LESS_PAPER, TRACIN, Checkpoint, Scoring
from duet_jax.influence.store import Store

K, ROWS = 64, 50


def fill(folder: Path, rows: np.ndarray, **fields: object) -> Store:
    values = dict(scheme="s", seed=1, k=rows.shape[1], feature="adam", loss="mean", model="m", adapter="a", data="d")
    values |= dict(template="t", format="float32", shard_size=16, rows=len(rows)) | fields
    store = Store.create(folder, Header(**values))
    for shard in store.missing():
        start, stop = store.bounds(shard)
        ids = [f"example {i}" for i in range(start, stop)]
        store.write(shard, rows[start:stop], ids=ids, lengths=np.arange(start, stop))
    store.finish()
    return store


def sketches(seed: int, n: int) -> np.ndarray:
    """Rows of very different norms that share a direction."""
    rng = np.random.default_rng(seed)
    return (np.exp(rng.normal(size=(n, 1))) * (rng.normal(size=(n, K)) + 0.3)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def less_paper(trains: list, targets: list, weights: list, subtasks: np.ndarray) -> np.ndarray:
    total = 0
    for train, target, weight in zip(trains, targets, weights, strict=True):
        means = np.stack([target[subtasks == j].mean(0) for j in range(subtasks.max() + 1)])
        total = total + weight * unit(train) @ unit(means).T
    return total.max(1)


def less_code(trains: list, targets: list, weights: list, number: int) -> np.ndarray:
    total = 0
    for train, target, weight in zip(trains, targets, weights, strict=True):
        total = total + weight * unit(train) @ unit(target).T
    # Subtasks of one size, in order, as the published code needs them.
    return total.reshape(len(trains[0]), number, -1).mean(-1).max(-1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list, list, list[Checkpoint]]:
    folder = tmp_path_factory.mktemp("stores")
    trains = [sketches(seed, ROWS) for seed in (0, 1, 2)]
    targets = [sketches(seed, 12) for seed in (10, 11, 12)]
    weights = [0.5, 0.3, 0.2]
    stores = [fill(folder / str(i), rows, adapter=f"a{i}") for i, rows in enumerate(trains)]
    checkpoints = [Checkpoint(*parts) for parts in zip(stores, targets, weights, strict=True)]
    return trains, targets, weights, checkpoints


def test_less_is_its_paper_or_its_code(case: tuple) -> None:
    trains, targets, weights, checkpoints = case
    subtasks = np.repeat([0, 1, 2], 4)
    paper, code = (scores.utilities(checkpoints, scoring, subtasks) for scoring in (LESS_PAPER, LESS_CODE))
    np.testing.assert_allclose(paper, less_paper(trains, targets, weights, subtasks), atol=2e-6)
    np.testing.assert_allclose(code, less_code(trains, targets, weights, 3), atol=2e-6)
    assert np.abs(paper - code).max() > 0.01


def test_subtasks_may_be_ragged_and_in_any_order(case: tuple) -> None:
    trains, targets, weights, checkpoints = case
    subtasks = np.array([2, 0, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1])
    paper = scores.utilities(checkpoints, LESS_PAPER, subtasks)
    np.testing.assert_allclose(paper, less_paper(trains, targets, weights, subtasks), atol=2e-6)
    cosines = sum(w * unit(t) @ unit(v).T for t, v, w in zip(trains, targets, weights, strict=True))
    means = np.stack([cosines[:, subtasks == j].mean(1) for j in range(3)], 1)
    for aggregate, wanted in {
        "max": means.max(1),
        "mean": means.mean(1),
        "softmax": np.sum(scipy.special.softmax(means / 0.05, 1) * means, 1),
    }.items():
        scoring = Scoring("mean_of_cosines", aggregate, temperature=0.05)
        np.testing.assert_allclose(scores.utilities(checkpoints, scoring, subtasks), wanted, atol=2e-6)


def test_tracin_is_a_weighted_sum_of_products(case: tuple) -> None:
    trains, targets, weights, checkpoints = case
    wanted = sum(w * t @ v.mean(0) for t, v, w in zip(trains, targets, weights, strict=True))
    np.testing.assert_allclose(scores.utilities(checkpoints, TRACIN), wanted, rtol=1e-4, atol=1e-4)


def test_the_best_are_those_of_the_whole_matrix(case: tuple) -> None:
    trains, targets, weights, checkpoints = case
    matrix = sum(w * unit(t) @ unit(v).T for t, v, w in zip(trains, targets, weights, strict=True))
    found = scores.best(checkpoints, 7, LESS_CODE, np.arange(12))
    np.testing.assert_array_equal(found.subtasks.rows, np.argsort(-matrix, axis=0)[:7].T)
    np.testing.assert_allclose(found.subtasks.scores, -np.sort(-matrix, axis=0)[:7].T, atol=2e-6)
    np.testing.assert_array_equal(found.aggregate.rows[0], np.argsort(-matrix.max(1))[:7])
    more = scores.best(checkpoints, ROWS + 5, LESS_CODE)
    assert (np.asarray(more.aggregate.rows)[0, ROWS:] == -1).all()
    assert sorted(np.asarray(more.aggregate.rows)[0, :ROWS].tolist()) == list(range(ROWS))


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    count=st.sampled_from([1, 5]),
    cut=st.sampled_from([1, 3]),
)
def test_a_stream_in_blocks_keeps_the_highest_and_of_equals_the_first(values: list, count: int, cut: int) -> None:
    column = np.array(values, np.float32)[:, None]
    top = topk.empty(1, count)
    for start in range(0, len(values), cut):
        top = topk.merge(top, column[start : start + cut], start)
    wanted = np.argsort(-column[:, 0], kind="stable")[:count]
    np.testing.assert_array_equal(np.asarray(top.rows)[0, : len(wanted)], wanted)
    assert (np.asarray(top.rows)[0, len(wanted) :] == -1).all()


@pytest.mark.parametrize(("format", "error"), [("bfloat16", 5e-4), ("int8", 1e-3), ("int4", 0.02), ("1bit", 0.1)])
@pytest.mark.parametrize("query_format", ["float32", "int8"])
def test_scores_from_codes_are_near_those_of_float32(
    tmp_path: Path, format: str, error: float, query_format: str
) -> None:
    train, target = sketches(0, 300), sketches(1, 5)
    exact = unit(train) @ unit(unit(target).mean(0))
    store = fill(tmp_path, train, format=format, shard_size=128)
    scoring = dataclasses.replace(LESS_PAPER, query_format=query_format)
    found = scores.utilities([Checkpoint(store, unit(target))], scoring)
    # A coordinate's error (test_quantise.py) over the square root of k; then that of the query.
    assert np.sqrt(np.mean((found - exact) ** 2)) < error + 0.015 / np.sqrt(K) * (query_format == "int8")


def test_targets_may_be_a_store_of_plain_gradients(tmp_path: Path) -> None:
    train, target = sketches(0, 20), sketches(1, 9)
    trained = fill(tmp_path / "train", train)
    targets = fill(tmp_path / "target", target, feature="sgd", data="other", template="other", shard_size=4)
    np.testing.assert_array_equal(
        scores.utilities([Checkpoint(trained, targets)], LESS_CODE),
        scores.utilities([Checkpoint(trained, target)], LESS_CODE),
    )
    other = fill(tmp_path / "other", target, feature="sgd", seed=2)
    with pytest.raises(DataError, match="seed is 1 for the training rows and 2 for the target rows"):
        scores.utilities([Checkpoint(trained, other)], LESS_CODE)


def test_checkpoints_must_hold_the_same_examples(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "1", sketches(0, 20)), fill(tmp_path / "2", sketches(0, 20), data="e")
    targets = sketches(1, 3)
    with pytest.raises(DataError, match="different training examples: data is 'd' in one and 'e' in the other"):
        scores.utilities([Checkpoint(first, targets), Checkpoint(second, targets)], LESS_CODE)


def test_wrong_arguments_are_named(case: tuple) -> None:
    checkpoints = case[3]
    for subtasks, message in (
        (np.zeros(3, int), "one for each of the 12 targets"),
        (np.repeat([0, 2], 6), "numbered 0, 1, 2 and on"),
        (np.linspace(0, 1, 12), "an array of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            scores.utilities(checkpoints, LESS_CODE, subtasks)
    with pytest.raises(ValueError, match="rows of k = 64"):
        scores.utilities([Checkpoint(checkpoints[0].train, np.ones((2, 32), np.float32))], LESS_CODE)
    with pytest.raises(DataError, match="a target sketch has a coordinate that is not finite"):
        scores.utilities([Checkpoint(checkpoints[0].train, np.full((2, 64), np.nan))], LESS_CODE)
    with pytest.raises(ValueError, match="similarity is 'cosine'; it must be one of dot, mean_of_cosines"):
        Scoring("cosine")


def test_weights_are_mean_rates_between_checkpoints() -> None:
    rates = np.array([1, 2, 3, 4, 5, 6.0])
    np.testing.assert_allclose(scores.checkpoint_weights(rates, [2, 5], normalise=False), [1.5, 4])
    np.testing.assert_allclose(scores.checkpoint_weights(rates, [2, 5]), [1.5 / 5.5, 4 / 5.5])
    for ends in ([], [0, 3], [3, 3], [2, 7]):
        with pytest.raises(ValueError, match="they must ascend, from at least 1 to at most the 6 steps"):
            scores.checkpoint_weights(rates, ends)


def test_weights_of_less_follow_from_its_schedule() -> None:
    steps = 420
    number, warmup = np.arange(steps), 13
    rates = 2e-5 * np.where(number < warmup, number / warmup, (steps - number) / (steps - warmup))
    printed = [1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]
    weights = scores.checkpoint_weights(rates, [105, 211, 317, 420], normalise=False)
    np.testing.assert_allclose(weights, printed, rtol=0.015)


def projected(k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact cosines of 200 low-rank gradients and 6 targets, and those of random projections."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(20, 3000))
    train, target = rng.normal(size=(200, 20)) @ basis, rng.normal(size=(6, 20)) @ basis
    signs = rng.choice([-1.0, 1.0], (3000, k))
    return unit(train) @ unit(target).T, unit(train @ signs) @ unit(target @ signs).T


def test_the_measured_error_is_that_of_theory_and_its_interval_covers_it() -> None:
    found = [accuracy.sketch_error(*projected(256, seed), 256) for seed in range(8)]
    ratios = [error.rmse / error.expected for error in found]
    assert abs(np.mean(ratios) - 1) < 0.1
    assert all(error.low < error.rmse < error.high < 1.3 * error.low for error in found)
    assert found[0].pairs == 1200 and abs(found[0].bias) < 0.02
    assert accuracy.sketch_error(*projected(1024, 0), 1024).spearman > found[0].spearman > 0.9


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs).T
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert np.isnan(accuracy.spearman(first, second))
    else:
        assert accuracy.spearman(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)


def test_cosines_of_zero_norms_are_zero() -> None:
    found = accuracy.cosines(np.array([[6.0, 1.0], [0.0, 0.0]]), np.array([2.0, 0.0]), np.array([3.0, 1.0]))
    np.testing.assert_array_equal(found, [[1, 0.5], [0, 0]])


def test_stability_foretells_the_overlap_with_another_seed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    first, second = (truth + 0.1 * rng.normal(size=4000) for _ in range(2))
    assert accuracy.overlap(truth, truth, 200) == 1
    found = accuracy.stability(first, 0.1, 200)
    # Two seeds differ by two errors, the truth and one seed by one.
    assert found.low - 0.03 < accuracy.overlap(first, truth, 200) < found.high + 0.03
    twice = accuracy.stability(first, 0.1 * np.sqrt(2), 200)
    assert twice.low - 0.03 < accuracy.overlap(first, second, 200) < twice.high + 0.03
    with pytest.raises(ValueError, match="at most the 4000 utilities"):
        accuracy.overlap(truth, truth, 5000)
