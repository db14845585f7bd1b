"""What scores are made of, by hand and by invariants: NICE's tests N6, N7, N8 and N11."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.influence import Adam, CountSketch, Rademacher, scores
from duet_jax.influence.header import Header
from duet_jax.influence.scores import LESS_CODE, LESS_PAPER, Checkpoint, Scoring
from duet_jax.influence.store import Store


@pytest.mark.parametrize("make", [lambda seed: CountSketch(32, seed), lambda seed: Rademacher(32, seed)])
def test_n11_inner_products_are_kept_on_average_by_equal_seeds_alone(make: Callable) -> None:
    x, y = jax.random.normal(jax.random.key(3), (2, 8, 6))
    y = y + 0.5 * x

    def products(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_x, of_y = make(seed).project_dense("q", 0, jnp.stack([x, y]))
        other = make(seed + 10_000).project_dense("q", 0, y[None])[0]
        return of_x @ of_y, of_x @ other

    same, different = (
        np.asarray(v, np.float64) for v in jax.jit(lambda s: jax.lax.map(products, s, batch_size=100))(jnp.arange(1000))
    )
    truth = float(jnp.sum(x * y))

    def error(values: np.ndarray) -> float:
        return abs(values.mean() - truth) / (values.std() / np.sqrt(len(values)))

    assert error(same) < 3 < 20 < error(different)
    assert abs(different.mean()) < 3 * different.std() / np.sqrt(1000)


def test_n6_adams_forms() -> None:
    g = jnp.array([[[3.0, -4.0]]])
    zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))

    def mapped(form: str, gradient: jax.Array, m: jax.Array, v: jax.Array) -> np.ndarray:
        feature = Adam(form)  # type: ignore[arg-type]
        return np.asarray(feature.dense(gradient, feature.prepare(m, v, jnp.asarray(0))), np.float64).reshape(-1)

    np.testing.assert_allclose(mapped("less_code", g, zero, zero), [3.1622759, -3.1622767], rtol=2e-7)
    np.testing.assert_allclose(mapped("paper", g, zero, zero), [1, -1], rtol=1e-5)
    h = jnp.array([[[1.0, -1.0]]])
    plus, minus, none = (mapped("less_code", s * h, one, one) for s in (1, -1, 0))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    # Not -1 in full: the example's square is in the second moment as well.
    np.testing.assert_allclose([cosine(plus, minus), cosine(plus - none, minus - none)], [0.97561, -1], atol=5e-5)


def scored(folder: Path, train: list, targets: list, scoring: Scoring, subtasks: object = None) -> np.ndarray:
    rows = np.zeros((1, 32), np.float32)
    rows[0, :2] = train
    wanted = np.zeros((len(targets), 32), np.float32)
    wanted[:, :2] = targets
    about = dict(scheme="s", seed=0, k=32, feature="sgd", loss="mean", model="m", adapter="", data="d", template="")
    if Store.exists(folder):
        store = Store.open(folder)
    else:
        store = Store.create(folder, Header(**about, rows=1, format="float32"))  # type: ignore[arg-type]
        store.write(0, rows, ids=["z"], lengths=np.ones(1))
    return scores.utilities([Checkpoint(store, wanted)], scoring, subtasks)


def test_n7_aggregation_over_targets_and_subtasks(tmp_path: Path) -> None:
    influences = np.array([0.2, 0.4, -0.1, 0.9])
    targets = [[i, np.sqrt(1 - i**2)] for i in influences]
    for subtasks, wanted in (([0, 0, 1, 1], 0.4), ([0, 0, 0, 0], 0.35), ([1, 0, 1, 0], 0.65)):
        found = scored(tmp_path / "a", [7, 0], targets, LESS_CODE, np.array(subtasks))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="one for each of the 4 targets"):
        scored(tmp_path / "a", [7, 0], targets, LESS_CODE, np.repeat(np.arange(3), 4 // 3))
    for scoring, wanted in ((LESS_CODE, 0.5), (LESS_PAPER, 0.099504)):
        np.testing.assert_allclose(scored(tmp_path / "b", [0, 1], [[10, 0], [0, 1]], scoring), wanted, atol=1e-6)


ROW = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@settings(max_examples=25)
@given(
    targets=st.lists(ROW, min_size=4, max_size=4), train=st.lists(ROW, min_size=3, max_size=3), seed=st.integers(0, 9)
)
def test_n8_order_scale_and_empty_rows_of_targets(targets: list, train: list, seed: int) -> None:
    targets, train = np.array(targets, np.float32), np.array(train, np.float32)
    subtasks, rng = np.array([0, 0, 1, 1]), np.random.default_rng(seed)

    def of(targets: np.ndarray, subtasks: np.ndarray) -> np.ndarray:
        return (scores.queries(targets, subtasks, "mean_of_cosines") @ train.T).max(axis=0)

    base = of(targets, subtasks)
    inside = np.concatenate([rng.permutation(2), 2 + rng.permutation(2)])
    np.testing.assert_allclose(of(targets[inside], subtasks), base, atol=1e-6)
    np.testing.assert_allclose(of(targets * 2.0 ** rng.integers(-3, 4, (4, 1)), subtasks), base, atol=1e-6)
    one = np.zeros(4, np.int64)
    padded = of(np.concatenate([targets, np.zeros_like(targets)]), np.zeros(8, np.int64))
    np.testing.assert_allclose(padded, of(targets, one), atol=1e-6)
