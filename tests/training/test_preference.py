"""Preference losses in closed form, and a step that equals autodiff of a dense implementation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from duet_jax.kernels.linear_log_probs import linear_log_probs
from hypothesis import given

from duet_jax.config import LoraSettings, PreferenceLoss, TrainingConfig
from duet_jax.data import Encoded
from duet_jax.data.preferences import Pairs, gather_pairs
from duet_jax.errors import ModelError
from duet_jax.models import llama
from duet_jax.training.preference import correlation, effective_beta, losses, measure, rewards
from duet_jax.training.preference_trainer import PairReport, PreferenceTrainer
from duet_jax.training.sft import Trainer
from duet_jax.training.steps import update

MODEL = llama.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
DROPPING = LoraSettings(rank=2, alpha=4.0, dropout=0.2)
NATS = st.floats(-200.0, -1.0, allow_nan=False)


def loss_of(
    config: PreferenceLoss, ratios: tuple[float, float], reference: tuple[float, float] = (-7.0, -9.0)
) -> float:
    known = jnp.array([reference])
    return float(losses(config, known + jnp.array([ratios]), known)[0])


def test_d5_dpo_and_davir_dpo_in_numbers() -> None:
    assert loss_of(PreferenceLoss(beta=0.1), (2.0, -1.0)) == pytest.approx(0.5543552, abs=1e-6)
    davir = PreferenceLoss(kind="davir_dpo", beta=1.0)
    # The spec's margin of .2 is 2/20 - (-1)/10.
    assert loss_of(davir, (2.0, -1.0), (-20.0, -10.0)) == pytest.approx(0.5981389, abs=1e-6)


@given(NATS, st.floats(-20, 20), st.floats(-20, 20), st.floats(0.5, 30))
def test_d5_equal_normalisers_are_dpo_with_another_beta(reference: float, up: float, down: float, beta: float) -> None:
    davir = loss_of(PreferenceLoss(kind="davir_dpo", beta=beta), (up, down), (reference, reference))
    dpo = loss_of(PreferenceLoss(beta=beta / abs(reference)), (up, down), (reference, reference))
    assert davir == pytest.approx(dpo, rel=1e-4, abs=1e-5)
    config = PreferenceLoss(kind="davir_dpo", beta=beta)
    assert effective_beta(config, np.full((3, 2), reference)) == pytest.approx(beta / abs(reference))


def test_d6_gradient_for_the_chosen_log_probability() -> None:
    for config, size in ((PreferenceLoss(kind="davir_dpo", beta=3.0), 20.0), (PreferenceLoss(beta=3.0), 1.0)):
        reference, log_probs = jnp.array([[-20.0, -10.0]]), jnp.array([[-18.0, -11.0]])
        margin = float(jnp.diff(rewards(config, log_probs, reference), axis=1)[0, 0]) * -1
        found = jax.grad(lambda x, config=config, reference=reference: losses(config, x, reference).sum())(log_probs)
        assert float(found[0, 0]) == pytest.approx(-3.0 / (1 + math.exp(margin)) / size, rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "davir_dpo"])
def test_identical_responses_and_the_fixed_point_of_self_play_lose_log_2(kind: str) -> None:
    config = PreferenceLoss(kind=kind, beta=5.0)
    assert loss_of(config, (1.5, 1.5), (-8.0, -8.0)) == pytest.approx(math.log(2))
    # Where p_t = p_{t-1} both ratios are 0, whatever the replies are.
    assert loss_of(config, (0.0, 0.0), (-8.0, -30.0)) == pytest.approx(math.log(2))


def test_ipo_in_closed_form() -> None:
    config = PreferenceLoss(kind="ipo", beta=0.25)
    assert loss_of(config, (2.0, -1.0)) == pytest.approx((3.0 - 2.0) ** 2)
    assert loss_of(config, (1.2, -0.8)) == pytest.approx(0.0, abs=1e-6)


def test_a_memorised_response_does_not_divide_by_zero() -> None:
    config = PreferenceLoss(kind="davir_dpo", beta=1.0, eps=0.5)
    assert loss_of(config, (-1.0, 0.0), (0.0, -10.0)) == pytest.approx(math.log1p(math.exp(2.0)), rel=1e-5)


def test_what_is_measured_of_pairs() -> None:
    reference = np.array([[-10.0, -20.0], [-30.0, -5.0], [-8.0, -8.0]])
    log_probs = reference + np.array([[2.0, -1.0], [0.5, 1.0], [1.0, 0.0]])
    tokens = np.array([[4, 9], [12, 2], [3, 5]])
    found = measure(PreferenceLoss(beta=0.5), log_probs, reference, tokens)
    reward, margins = 0.5 * (log_probs - reference), np.array([1.5, -0.25, 0.5])
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert found["margin"] == pytest.approx(margins.mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["chosen_reward"], found["rejected_reward"]) == pytest.approx(tuple(reward.mean(axis=0)), rel=1e-5)
    assert found["reward_length"] == pytest.approx(np.corrcoef(reward.ravel(), tokens.ravel())[0, 1], rel=1e-4)
    assert found["margin_length"] == pytest.approx(np.corrcoef(margins, [-5, 10, -2])[0, 1], rel=1e-4)
    assert correlation(np.ones(3), np.arange(3)) is None


@pytest.mark.parametrize("of_head", [True, False])
def test_log_probabilities_and_their_gradients_equal_a_dense_softmax(of_head: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (23, 8)), jax.random.normal(keys[1], (31, 8))
    labels, mask = jax.random.randint(keys[2], (23,), 0, 31), jax.random.bernoulli(keys[3], 0.6, (23,))

    def ours(hidden: jax.Array, head: jax.Array) -> jax.Array:
        found = linear_log_probs(hidden, head, labels, mask, 8)
        return jnp.sum(jnp.sin(found))

    def dense(hidden: jax.Array, head: jax.Array) -> jax.Array:
        found = jax.nn.log_softmax(hidden @ head.T)[jnp.arange(23), labels]
        return jnp.sum(jnp.sin(jnp.where(mask, found, 0.0)))

    arguments = (0, 1) if of_head else 0
    np.testing.assert_allclose(ours(hidden, head), dense(hidden, head), rtol=1e-5)
    one, other = (jax.jit(jax.grad(f, arguments))(hidden, head) for f in (ours, dense))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rng = np.random.default_rng(0)

    def side() -> Encoded:
        tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in rng.choice([4, 7, 8, 11, 15], 14))
        return Encoded(tokens, np.full(14, 2, np.int32), tuple(map(str, range(14))), (False,) * 14)

    return Pairs(side(), side())


@pytest.fixture(scope="module")
def reference(pairs: Pairs) -> np.ndarray:
    return -3.0 * pairs.response_tokens - np.random.default_rng(1).random((14, 2))


def trainer(kind: str = "davir_dpo", **changes: object) -> PreferenceTrainer:
    values: dict = dict(
        batch_size=4, learning_rate=1e-2, lora=LoraSettings(rank=2, alpha=4.0), checkpoint_every=2, epochs=2
    )
    settings = TrainingConfig(**{**values, **changes})
    sequences = Trainer(MODEL, lambda: llama.init(MODEL, key=jax.random.key(0)), settings, (8, 16), pad_id=0)
    return PreferenceTrainer(sequences, PreferenceLoss(kind=kind, beta=2.0))


def fit(subject: PreferenceTrainer, pairs: Pairs, reference: np.ndarray, folder: Path, **more: object):
    start = subject.sequences.start(jax.random.key(0))
    return subject.fit(pairs, reference, start, seed=1, identity={"model": "f"}, folder=folder, **more)


@pytest.mark.parametrize(("method", "kind", "micro"), [("lora", "davir_dpo", 2), ("full", "ipo", None)])
def test_a_step_is_that_of_the_dense_implementation(
    method: str, kind: str, micro: int | None, pairs: Pairs, reference: np.ndarray
) -> None:
    subject = trainer(kind, method=method, micro_batch_size=micro)
    sequences = subject.sequences
    start = sequences.start(jax.random.key(0))
    if method == "lora":
        # With b = 0 the factors a have no gradient; a step that forgot them would not show.
        grown = jax.tree.map(lambda x: x + 0.05, start.trainable)
        start = sequences.restart(grown)
    rows = np.array([3, 8, 11])
    batch = gather_pairs(pairs, rows, 16, 4, 0)

    def dense(trainable: object) -> jax.Array:
        params, lora = sequences.deployable(trainable)
        ids, scored = (jnp.asarray(x[:3].reshape(6, 16)) for x in (batch.tokens, batch.mask))
        logits = llama.hidden_states(MODEL, params, ids, lora=lora)[:, :-1] @ llama.output_head(params).T
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0]
        log_probs = jnp.sum(jnp.where(scored[:, 1:], each, 0.0), axis=1)
        ratios = log_probs.reshape(-1, 2) - reference[rows]
        if kind == "davir_dpo":
            ratios = ratios / np.abs(reference[rows])
        margins = ratios[:, 0] - ratios[:, 1]
        return jnp.mean((margins - 0.25) ** 2 if kind == "ipo" else -jax.nn.log_sigmoid(2.0 * margins))

    value, gradient = jax.jit(jax.value_and_grad(dense))(start.trainable)
    base = sequences.load_base() if method == "lora" else None
    expected, _ = update(start, gradient, sequences.dials, jnp.float32(1e-2))
    found, metrics = subject.step(
        start,
        base,
        sequences.dials,
        batch.tokens,
        batch.mask,
        np.asarray(reference, np.float32)[batch.index],
        np.float32(1e-2),
        jax.random.key(1),
        np.int32(0),
    )
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-4)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradient), rtol=1e-4)
    # The first moments are a tenth of the clipped gradient: compared where nothing is divided by small numbers.
    for x, y in zip(
        jax.tree.leaves(optax.tree.get(found.optimiser, "mu")),
        jax.tree.leaves(optax.tree.get(expected.optimiser, "mu")),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_bits_and_compiles_nothing_new(
    pairs: Pairs, reference: np.ndarray, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(report: PairReport) -> None:
        if report.step == 5:
            raise Killed

    subject = trainer(lora=DROPPING)
    seen: list[PairReport] = []
    straight = fit(subject, pairs, reference, tmp_path / "a", on_step=seen.append)
    compiled = subject.step._cache_size()
    assert [report.step for report in seen] == list(range(1, 9)) and compiled <= 2
    assert seen[0].measured["loss"] > 0 and set(seen[0].measured) >= {"margin", "accuracy", "reward_length"}
    with pytest.raises(Killed):
        fit(subject, pairs, reference, tmp_path / "b", on_step=kill)
    resumed = fit(subject, pairs, reference, tmp_path / "b", on_step=seen.append)
    assert seen[8].step == 5, "it goes on from the checkpoint after step 4"
    # Arrays from a checkpoint are committed to their device, which is a signature of its own.
    restored = subject.step._cache_size() - compiled
    again = fit(subject, pairs, reference, tmp_path / "b")
    elsewhere = fit(subject, pairs, 2 * reference, tmp_path / "c")
    assert subject.step._cache_size() == compiled + restored, "another training of the same shapes compiles nothing"
    assert np.any(straight.trainable["q"]["b"] != elsewhere.trainable["q"]["b"])
    for other in (resumed, again):
        for x, y in zip(jax.tree.leaves(straight.trainable), jax.tree.leaves(other.trainable), strict=True):
            np.testing.assert_array_equal(x, y)
        assert (straight.loss, straight.steps) == (other.loss, other.steps)
    with pytest.raises(ModelError, match="another data"):
        fit(subject, pairs, reference - 1.0, tmp_path / "b")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_makes_no_logits_of_all_tokens(method: str, arrays: Any) -> None:
    rows, length, vocabulary = 8, 64, 1000
    model = dataclasses.replace(MODEL, vocab_size=vocabulary, max_length=length)
    settings = TrainingConfig(method=method, learning_rate=1.0, batch_size=rows)
    sequences = Trainer(model, lambda: llama.init(model, key=jax.random.key(0)), settings, (length,), pad_id=0)
    state = jax.eval_shape(sequences.start, jax.random.key(0))
    shape = (rows, 2, length)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    reference = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    base = llama.shapes(model) if method == "lora" else None
    step = PreferenceTrainer(sequences, PreferenceLoss()).step
    rest = np.float32(1e-2), jax.random.key(1), np.int32(0)
    program = jax.make_jaxpr(step)(state, base, sequences.dials, tokens, mask, reference, *rest)
    logits = [aval.shape for aval in arrays(program.jaxpr) if vocabulary in aval.shape]
    # A chunk of them is made, so the search does see them.
    assert (256, vocabulary) in logits and max(np.prod(shape) for shape in logits) <= 256 * vocabulary


def test_a_loss_that_is_no_number_is_told(pairs: Pairs, reference: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The loss of step 1 is nan; lower training.learning_rate or loss.beta"):
        fit(trainer(lora=DROPPING), pairs, np.full_like(reference, np.nan), tmp_path)


@pytest.mark.slow
def test_training_prefers_the_chosen(pairs: Pairs, tmp_path: Path) -> None:
    subject, seen = trainer("dpo", method="full", epochs=6, schedule="constant"), []
    sequences, batch = subject.sequences, gather_pairs(pairs, np.arange(14), 16, 14, 0)
    arrays = (batch.tokens, batch.mask, np.zeros((14, 2), np.float32), np.ones(14, np.float32))
    _, reference = subject.objective(sequences.load_base(), None, sequences.dials, *arrays, jax.random.key(0))
    fit(subject, pairs, np.asarray(reference), tmp_path, on_step=seen.append)
    assert seen[0].measured["loss"] == pytest.approx(math.log(2), abs=1e-4), "policy and reference are the same"
    last = [report.measured for report in seen[-4:]]
    assert all(row["accuracy"] == 1.0 and row["loss"] < 0.3 for row in last)
