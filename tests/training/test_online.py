"""Online batch selection: the best candidates of every step, by the papers' formulas, in one compiled program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.config import LoraSettings, OnlineConfig, TrainingConfig
from duet_jax.data import Encoded, gather_batch
from duet_jax.errors import ModelError
from duet_jax.models import llama
from duet_jax.training import online
from duet_jax.training.optimiser import program_of
from duet_jax.training.sft import StepReport, Trained, Trainer
from tests.training.online_choices import DAVIR, RHO, dense_losses, watched

MODEL = llama.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
# D1 of the specs: losses under the current model and under the reference.
LOSSES, REFERENCE = jnp.array([2, 4, 1, 3], jnp.float32), jnp.array([1, 2.5, 0.2, 3.3], jnp.float32)


@pytest.fixture(scope="module")
def data() -> Encoded:
    rng = np.random.default_rng(0)
    lengths = rng.choice([4, 7, 8, 11, 15], 30)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in lengths)
    return Encoded(tokens, np.full(30, 2, np.int32), tuple(map(str, range(30))))


def trainer(**changes: Any) -> Trainer:
    values: dict[str, Any] = dict(
        method="lora",
        batch_size=4,
        learning_rate=1e-2,
        lora=LoraSettings(rank=2, alpha=4.0, dropout=0.2, targets=("q", "v")),
        checkpoint_every=2,
        online=RHO,
    )
    chosen = TrainingConfig(**{**values, **changes})
    return Trainer(MODEL, lambda: llama.init(MODEL, key=jax.random.key(0)), chosen, (8, 16), 0, remat="none")


@pytest.fixture(scope="module")
def shared() -> Trainer:
    """One for most tests here, for the sake of its compiled programs."""
    return trainer()


def run(subject: Trainer, data: Encoded, reference: np.ndarray | None, rows: Any = range(30), **kwargs: Any) -> Trained:
    return subject.fit(data, np.array(rows), seed=1, start_seed=0, fingerprint="f", reference=reference, **kwargs)


@pytest.fixture(scope="module")
def base_losses(data: Encoded) -> np.ndarray:
    return dense_losses(MODEL, llama.init(MODEL, key=jax.random.key(0)), data)


def assert_same_bits(one: object, other: object) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_scores_are_those_of_the_specs() -> None:
    """D1 and D2: davir and rho differ in their order, and sums change rho's alone."""
    counts = jnp.array([200, 10, 5, 50])
    rho = online.scores(RHO, LOSSES * counts, REFERENCE * counts, counts)
    np.testing.assert_allclose(rho, [1, 1.5, 0.8, -0.3], rtol=1e-5)
    davir = online.scores(DAVIR, LOSSES * counts, REFERENCE * counts, counts)
    np.testing.assert_allclose(davir, [0.5, 0.375, 0.8, -0.1], rtol=1e-5)
    sums = dataclasses.replace(RHO, token_mean=False)
    np.testing.assert_array_equal(online.best(RHO, LOSSES * counts, REFERENCE * counts, counts, 4).rows, [1, 0, 2, 3])
    np.testing.assert_array_equal(online.best(sums, LOSSES * counts, REFERENCE * counts, counts, 4).rows, [0, 1, 2, 3])
    np.testing.assert_array_equal(online.best(DAVIR, LOSSES * counts, REFERENCE * counts, counts, 4).rows, [2, 0, 1, 3])


@pytest.mark.parametrize("config", [RHO, DAVIR], ids=["rho", "davir"])
def test_equal_ones_come_in_order_and_those_without_a_score_last(config: OnlineConfig) -> None:
    losses = jnp.array([3, jnp.nan, 3, 2, jnp.inf, 0], jnp.float32)
    reference = jnp.array([1, 1, 1, 3, 1, jnp.nan], jnp.float32)
    choice = online.best(config, losses, reference, jnp.ones(6, jnp.int32), 6)
    np.testing.assert_array_equal(choice.rows, [0, 2, 3, 1, 4, 5])
    assert np.all(choice.kept) and np.isnan(choice.score)
    first = online.best(config, losses, reference, jnp.ones(6, jnp.int32), 2)
    assert first.score == pytest.approx(2 if config is RHO else 2 / 3)


def test_what_is_known_by_heart_has_no_share_to_lose() -> None:
    """A loss of nearly nothing is no reason to train, whatever the reference says."""
    losses, reference = jnp.array([1e-8, 2], jnp.float32), jnp.array([-1, 2.5], jnp.float32)
    np.testing.assert_array_equal(online.best(DAVIR, losses, reference, jnp.ones(2, jnp.int32), 2).rows, [1, 0])


@settings(max_examples=40, deadline=None)
@given(
    real=st.integers(1, 24),
    batch=st.sampled_from([1, 4, 8, 12]),
    config=st.sampled_from([RHO, DAVIR, dataclasses.replace(RHO, token_mean=False)]),
    seed=st.integers(0, 2**16),
)
def test_the_choice_is_the_top_of_a_stable_sort(real: int, batch: int, config: OnlineConfig, seed: int) -> None:
    """Padding is never chosen, and of a part of the candidates no larger share than of all of them."""
    rng = np.random.default_rng(seed)
    losses, reference = (jnp.asarray(rng.choice([0.5, 1, 2, 4], 24), jnp.float32) for _ in range(2))
    counts = jnp.asarray(np.where(np.arange(24) < real, rng.integers(1, 4, 24), 0))
    choice = online.best(config, losses, reference, counts, batch)
    chosen = np.asarray(choice.rows)[np.asarray(choice.kept)]
    assert len(chosen) == -(-real * batch // 24)
    found = np.asarray(online.scores(config, losses, reference, counts))[:real]
    np.testing.assert_array_equal(chosen, np.argsort(-found, kind="stable")[: len(chosen)])
    assert choice.score == pytest.approx(found[chosen].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "micro_batch_size", "compute_dtype"),
    [("lora", 2, jnp.float32), pytest.param("full", None, jnp.bfloat16, marks=pytest.mark.slow)],
)
def test_a_step_is_the_plain_step_on_the_best_candidates(
    method: str, micro_batch_size: int | None, compute_dtype: Any, data: Encoded
) -> None:
    """The reference puts half of the candidates far behind; the other half is trained on as if it came alone."""
    rows = np.flatnonzero(data.lengths <= 8)[:8]
    better = rows[[1, 2, 5, 7]]
    reference = np.where(np.isin(np.arange(30), better), 0, 1e6).astype(np.float32)
    changes = dict(method=method, micro_batch_size=micro_batch_size, lora=LoraSettings(rank=2, alpha=4.0))
    states = []
    for subject, given_rows, extra in (
        (trainer(**changes), rows, (reference[rows],)),
        (trainer(**changes, online=None), better, ()),
    ):
        subject = dataclasses.replace(subject, compute_dtype=compute_dtype)
        batch = gather_batch(data, given_rows, 8, subject.settings.drawn, 0)
        base = subject.load_base() if method == "lora" else None
        state, metrics = subject.step(
            subject.start(jax.random.key(0)),
            base,
            subject.dials,
            batch.tokens,
            batch.loss_mask,
            np.float32(1e-2),
            jax.random.key(1),
            np.int32(0),
            *extra,
        )
        states.append((metrics.loss, metrics.gradient_norm, metrics.response_tokens))
        if extra:
            assert {int(rows[i]) for i in metrics.choice.rows} == set(better.tolist())
        # Adam divides by the root of tiny second moments, which magnifies rounding: its first moment does not.
        states[-1] += tuple(jax.tree.leaves(state.optimiser[1].mu))
    for x, y in zip(*states, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5 if compute_dtype == jnp.float32 else 3e-2, atol=1e-6)


@pytest.mark.slow
def test_the_first_choice_is_by_the_losses_of_the_base(shared: Trainer, data: Encoded, base_losses: np.ndarray) -> None:
    reference = np.random.default_rng(1).uniform(0, 60, 30).astype(np.float32)
    subject, choices = watched(shared)
    reports: list[StepReport] = []
    trained = run(subject, data, reference, on_step=reports.append)
    rows = subject.plan(data, np.arange(30), 1)[0][1]
    found = (base_losses - reference)[rows] / (data.lengths - 2)[rows]
    best = np.argsort(-found, kind="stable")[: int(choices[0].kept.sum())]
    np.testing.assert_array_equal(choices[0].rows[choices[0].kept], best)
    assert reports[0].score == pytest.approx(found[best].mean(), rel=1e-4)
    assert reports[0].tokens == data.lengths[rows[best]].sum()
    assert trained.tokens == sum(report.tokens for report in reports)
    assert len(reports) == 4 == trained.steps, "an epoch has examples / candidates steps"
    sizes = [int(choice.kept.sum()) for choice in choices]
    assert sorted(sizes) == [3, 4, 4, 4], "of the last 6 candidates, the same share is trained on, rounded up"


def test_each_bucket_compiles_once_for_all_rounds(shared: Trainer, data: Encoded, base_losses: np.ndarray) -> None:
    run(shared, data, base_losses)
    assert shared.step._cache_size() == 2  # type: ignore[attr-defined]
    for seed, count in ((2, 30), (3, 17), (4, 9)):
        shared.fit(data, np.arange(count), seed=seed, start_seed=0, reference=base_losses + seed)
    assert shared.step._cache_size() == 2  # type: ignore[attr-defined]


def test_a_stopped_training_ends_with_the_same_bits(
    tmp_path: Path, shared: Trainer, data: Encoded, base_losses: np.ndarray
) -> None:
    reference = base_losses[::-1].copy()
    subject = shared.retuned(dataclasses.replace(shared.settings, epochs=3))
    rows = np.flatnonzero(data.lengths <= 8)[:16]
    straight = run(subject, data, reference, rows)

    class Killed(Exception):
        pass

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(subject, data, reference, rows, folder=tmp_path / "c", on_step=kill)
    seen: list[StepReport] = []
    resumed = run(subject, data, reference, rows, folder=tmp_path / "c", on_step=seen.append)
    assert seen[0].step == 5, "it goes on from the checkpoint after step 4"
    assert_same_bits(straight.trainable, resumed.trainable)
    assert (straight.loss, straight.tokens) == (resumed.loss, resumed.tokens)
    with pytest.raises(ModelError, match="another reference"):
        run(subject, data, reference + 1, rows, folder=tmp_path / "c")


def test_memory_does_not_grow_with_the_candidates(arrays: Any) -> None:
    params = llama.init(MODEL, key=jax.random.key(0))

    def program(candidates: int) -> Any:
        config = OnlineConfig(candidates=candidates)
        settings = TrainingConfig(learning_rate=1.0, batch_size=4, online=config)
        arguments = (
            np.zeros((candidates, 8), np.int32),
            np.ones((candidates, 8), bool),
            np.zeros(candidates, np.float32),
        )
        return jax.make_jaxpr(lambda *x: online.choose(settings, MODEL, params, None, *x, jnp.float32))(*arguments)

    few, many = (max(aval.size for aval in arrays(program(count).jaxpr)) for count in (8, 128))
    # The head takes 256 tokens at a time. All candidates' hidden states would be 16384 numbers.
    assert few == many == 256 * 40


def test_programs_are_shared_where_only_the_reference_differs() -> None:
    settings = trainer().settings
    other = dataclasses.replace(settings, online=dataclasses.replace(RHO, reference="package:other"))
    assert program_of(settings) == program_of(other)
    for changed in (DAVIR, None, dataclasses.replace(RHO, candidates=12), dataclasses.replace(RHO, token_mean=False)):
        assert program_of(dataclasses.replace(settings, online=changed)) != program_of(settings)


def test_a_reference_is_given_to_online_selection_alone(data: Encoded) -> None:
    with pytest.raises(ValueError, match="reference is needed"):
        run(trainer(), data, None)
    with pytest.raises(ValueError, match="for no others"):
        run(trainer(online=None), data, np.zeros(30, np.float32))
