"""Fine-tuning: the step equals optax on the textbook loss, and a run that was stopped ends the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duet_jax.config import LoraSettings, TrainingConfig
from duet_jax.data import Encoded, gather_batch
from duet_jax.errors import ModelError
from duet_jax.models import llama
from duet_jax.training.optimiser import learning_rates, program_of
from duet_jax.training.sft import Trainer

MODEL = llama.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.fixture(scope="module")
def data() -> Encoded:
    rng = np.random.default_rng(0)
    lengths = rng.choice([4, 7, 8, 11, 15], 30)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in lengths)
    return Encoded(tokens, np.full(30, 2, np.int32), tuple(map(str, range(30))))


def settings(**changes) -> TrainingConfig:
    values = dict(
        method="lora",
        batch_size=4,
        learning_rate=1e-2,
        schedule="cosine",
        lora=LoraSettings(rank=2, alpha=4.0),
        checkpoint_every=3,
    )
    return TrainingConfig(**{**values, **changes})


def trainer(**changes) -> Trainer:
    def load_base():
        return llama.init(MODEL, key=jax.random.key(0))

    return Trainer(MODEL, load_base, settings(**changes), (8, 16), pad_id=0)


def run(subject: Trainer, data: Encoded, **kwargs):
    return subject.fit(data, np.arange(30), seed=1, start_seed=0, fingerprint="f", **kwargs)


def assert_same_bits(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_steps_equal_optax_adamw_on_the_dense_loss(method, data):
    subject = trainer(method=method, weight_decay=0.1, clip_norm=0.5, schedule="constant")
    found = run(subject, data)

    state = subject.start(jax.random.key(0))
    batches = subject.plan(data, np.arange(30), 1)
    rates = learning_rates(subject.settings, len(batches))

    @jax.jit
    @jax.value_and_grad
    def one(trainable, ids, length):
        """Summed loss of the response, from the third of `length` tokens on."""
        params, lora = subject.deployable(trainable)
        hidden = llama.hidden_states(MODEL, params, ids[None], lora=lora)
        log_probs = jax.nn.log_softmax(hidden @ llama.output_head(params).T)[0, :-1]
        place = jnp.arange(1, len(ids))
        return -jnp.sum(log_probs[place - 1, ids[1:]], where=(place >= 2) & (place < length))

    def gradient_of(trainable, rows):
        lengths = [len(data.tokens[row]) for row in rows]
        each = [
            one(trainable, jnp.asarray(np.pad(data.tokens[row], (0, 16 - length))), length)[1]
            for row, length in zip(rows, lengths, strict=True)
        ]
        return jax.tree.map(lambda *parts: sum(parts) / sum(length - 2 for length in lengths), *each)

    def decays(tree):
        keep = {"kernel", "embedding", "head", "a", "b"}
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in keep, tree)

    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda count: jnp.asarray(rates)[count], weight_decay=0.1, mask=decays),
    )
    trainable = state.trainable
    moments = reference.init(trainable)
    for _, rows in batches[:3]:
        gradient = gradient_of(trainable, rows)
        update, moments = reference.update(gradient, moments, trainable)
        trainable = optax.apply_updates(trainable, update)
    state = subject.start(jax.random.key(0))
    key = jax.random.key(1)
    for number, (length, rows) in enumerate(batches[:3]):
        batch = gather_batch(data, rows, length, 4, 0)
        base = subject.load_base() if method == "lora" else None
        state, _ = subject.step(
            state, base, subject.dials, batch.tokens, batch.loss_mask, rates[number], key, np.int32(number)
        )
    # Adam divides by the root of tiny second moments, which magnifies rounding.
    for x, y in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert found.steps == len(batches)


def test_accumulated_micro_batches_equal_the_whole_batch(data):
    whole = run(trainer(method="full"), data)
    parts = run(trainer(method="full", micro_batch_size=1), data)
    assert whole.loss == pytest.approx(parts.loss, abs=1e-5)
    assert whole.tokens == parts.tokens == int(sum(len(t) for t in data.tokens))


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_a_stopped_training_ends_with_the_same_bits(tmp_path, data, dropout):
    lora = LoraSettings(rank=2, alpha=4.0, dropout=dropout)
    straight = run(trainer(lora=lora), data)

    class Killed(Exception):
        pass

    def kill(report):
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(trainer(lora=lora), data, folder=tmp_path / "c", on_step=kill)
    seen = []
    resumed = run(trainer(lora=lora), data, folder=tmp_path / "c", on_step=seen.append)
    assert seen[0].step == 4, "it goes on from the checkpoint after step 3"
    assert_same_bits(straight.trainable, resumed.trainable)
    assert (straight.loss, straight.tokens) == (resumed.loss, resumed.tokens)

    finished = run(trainer(lora=lora), data, folder=tmp_path / "c", on_step=seen.append)
    assert seen[-1].step == resumed.steps, "nothing is trained twice"
    assert_same_bits(straight.trainable, finished.trainable)
    assert (straight.loss, straight.tokens) == (finished.loss, finished.tokens)


def test_checkpoint_of_another_model_or_other_data_is_refused(tmp_path, data):
    run(trainer(), data, folder=tmp_path / "c")
    with pytest.raises(ModelError, match="another model"):
        trainer().fit(data, np.arange(30), seed=1, start_seed=0, fingerprint="other", folder=tmp_path / "c")
    with pytest.raises(ModelError, match="another data"):
        trainer().fit(data, np.arange(29), seed=1, start_seed=0, fingerprint="f", folder=tmp_path / "c")


def test_each_bucket_compiles_once_for_all_rounds(data):
    subject = trainer()
    run(subject, data)
    compiled = subject.step._cache_size()
    assert compiled == 2
    for seed, count in ((2, 30), (3, 17), (4, 9)):
        subject.fit(data, np.arange(count), seed=seed, start_seed=0)
    assert subject.step._cache_size() == compiled


def test_settings_that_are_numbers_are_no_programs_of_their_own(data):
    subject = trainer(lora=LoraSettings(rank=2, alpha=4.0, dropout=0.2))
    before = run(subject, data).trainable
    compiled = subject.step._cache_size()
    lora = LoraSettings(rank=2, alpha=9.0, dropout=0.1, layers=(1,))
    other = dict(lora=lora, weight_decay=0.3, clip_norm=0.2, learning_rate=3e-3, schedule="linear")
    assert program_of(settings(**other)) == program_of(subject.settings)
    found = run(subject.retuned(settings(**other)), data).trainable
    assert subject.step._cache_size() == compiled
    assert_same_bits(found, run(trainer(**other), data).trainable)
    assert_same_bits(run(subject, data).trainable, before)
    assert not any(np.any(factors["b"][0]) for factors in found.values()), "a layer without adapters was trained"
    for changes in (dict(lora=LoraSettings(rank=2)), dict(lora=LoraSettings(rank=4, dropout=0.2)), dict(batch_size=2)):
        assert program_of(settings(**changes)) != program_of(subject.settings)


def test_training_lowers_the_loss(data):
    first, last = [], []
    for epochs in (1, 30):
        reports = []
        run(trainer(method="full", epochs=epochs, learning_rate=1e-2), data, on_step=reports.append)
        first.append(reports[0].loss)
        last.append(reports[-1].loss)
    assert last[1] < 0.3 * first[1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_equal_optax_schedules(schedule):
    steps, warmup = 40, 10
    fall = {
        "cosine": optax.cosine_decay_schedule(3e-4, steps - warmup),
        "linear": optax.linear_schedule(3e-4, 0.0, steps - warmup),
        "constant": optax.constant_schedule(3e-4),
    }[schedule]
    rise = optax.linear_schedule(3e-4 / warmup, 3e-4 + 3e-4 / warmup, warmup)
    joined = optax.join_schedules([rise, fall], [warmup])
    found = learning_rates(settings(schedule=schedule, warmup_fraction=0.25, learning_rate=3e-4), steps)
    expected = [float(joined(step)) for step in range(steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
