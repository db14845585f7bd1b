"""The reference of online batch selection: trained once, or another model, it keeps noise out of the batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import models
from duet_jax.config import OnlineConfig, SelectorConfig, TrainingConfig
from duet_jax.data import Encoded, join
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback import Engine
from duet_jax.models import llama
from duet_jax.selection import Pool, score
from duet_jax.selection.online import reference_losses
from duet_jax.training.sft import Trainer
from tests.training.online_choices import RHO, dense_losses, watched

# Sequences in which each letter has one successor, or none in particular.
LETTERS, LENGTH = 8, 12
RULE = np.random.default_rng(0).permutation(LETTERS)
SMALL = llama.LlamaConfig(
    vocab_size=LETTERS, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
)


def walks(count: int, seed: int, name: str, *, noise: bool = False) -> Encoded:
    rows = np.random.default_rng(seed).integers(0, LETTERS, (count, LENGTH)).astype(np.int32)
    for t in range(1, 1 if noise else LENGTH):
        rows[:, t] = RULE[rows[:, t - 1]]
    return Encoded(tuple(rows), np.ones(count, np.int32), tuple(f"{name}{i}" for i in range(count)))


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Half of the training examples are noise; of what is held out, none."""
    base = llama.init(SMALL, key=jax.random.key(0))
    settings = TrainingConfig(method="full", learning_rate=1e-2, batch_size=8, epochs=4)
    trainer = Trainer(SMALL, lambda: jax.tree.map(jnp.copy, base), settings, (LENGTH,), 0, remat="none")
    train = join([walks(64, 2, "good"), walks(64, 3, "bad", noise=True)])
    return Pool(("only",), (train,), (walks(48, 4, "held out"),), (), trainer, "f", 0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rho", "davir"])
def test_noise_is_hardly_chosen_while_the_model_is_behind_its_reference(rule: Any, pool: Pool, tmp_path: Path) -> None:
    """Of noise the reference has no less loss than the model; by the loss alone, noise would be chosen."""
    config = OnlineConfig(rule=rule, candidates=32)
    reference = reference_losses(pool, config, tmp_path)
    settings = dataclasses.replace(pool.trainer.settings, online=config)
    subject, choices = watched(dataclasses.replace(pool.trainer, settings=settings), epochs=3)
    (data,), rows = pool.train, np.arange(128)
    subject.fit(data, rows, seed=0, start_seed=0, reference=reference)
    batches = subject.plan(data, rows, 0)
    assert len(choices) == len(batches) == 3 * 128 // 32
    names = [
        data.ids[i]
        for (_, drawn), choice in zip(batches, choices, strict=True)
        for i in drawn[choice.rows[choice.kept]]
    ]
    share = np.mean([name.startswith("bad") for name in names])
    assert share < 0.05, f"half of the pool is noise, and {share:.0%} of what was chosen"


@pytest.mark.parametrize("rule", ["rho", "davir"])
def test_the_reference_is_trained_once_and_goes_on_after_a_crash(rule: Any, pool: Pool, tmp_path: Path) -> None:
    """Its losses are those of the configured training on the held-out examples, or on the pool."""
    config = OnlineConfig(rule=rule, candidates=32)
    on = pool.validation[0] if rule == "rho" else pool.train[0]
    trained = pool.trainer.fit(on, np.arange(len(on)), seed=0, start_seed=0)
    expected = dense_losses(SMALL, trained.trainable, pool.train[0])

    class Killed(Exception):
        pass

    seen: list[tuple[str, int]] = []

    def progress(name: str, done: int, of: int) -> None:
        seen.append((name, done))
        if name == "reference" and done == 20:
            raise Killed

    with pytest.raises(Killed):
        reference_losses(dataclasses.replace(pool, on_progress=progress), config, tmp_path)
    found = reference_losses(pool, config, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    seen.clear()
    lines: list[str] = []
    again = dataclasses.replace(pool, on_progress=progress, say=lines.append)
    np.testing.assert_array_equal(reference_losses(again, config, tmp_path), found)
    assert not seen, "it was trained or scored a second time"
    mean = expected.sum() / (128 * (LENGTH - 1))
    assert lines[-1] == f"reference of online selection: mean loss {mean:.3f} nats a token over 128 training examples"

    selector = SelectorConfig(kind=rule, warmup_epochs=pool.trainer.settings.epochs)
    score(again, selector, tmp_path)
    assert not any(name == "reference" for name, _ in seen), "the selector of the same name trains its own"


def test_without_held_out_examples_there_is_no_reference(pool: Pool, tmp_path: Path) -> None:
    empty = dataclasses.replace(pool, validation=(pool.validation[0].take([]),))
    with pytest.raises(DataError, match="no example is held out to train a reference on"):
        reference_losses(empty, RHO, tmp_path)


def test_another_reference_needs_the_same_tokens(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokens:
        def __init__(self, last: bytes) -> None:
            self.token_bytes = (b"a", last)

    def model(last: bytes, max_length: int) -> models.Model:
        shape = dataclasses.replace(SMALL, num_layers=2, max_length=max_length)
        return models.Model(shape, llama.init(shape, key=jax.random.key(5)), Tokens(last), "other", "g")

    engine = Engine(model(b"b", LENGTH), False, (LENGTH,))
    asked = dataclasses.replace(pool, engine=engine)
    config = OnlineConfig(candidates=32, reference="other")
    for wrong, problem in ((model(b"c", LENGTH), "other has other tokens"), (model(b"b", 8), "a context of 8 tokens")):
        monkeypatch.setattr(models, "load", lambda source, dtype, wrong=wrong: wrong)
        with pytest.raises(ModelError, match=problem):
            reference_losses(asked, config, tmp_path)
    good = model(b"b", LENGTH)
    monkeypatch.setattr(models, "load", lambda source, dtype: good)
    expected = dense_losses(good.config, good.params, pool.train[0])
    np.testing.assert_allclose(reference_losses(asked, config, tmp_path), expected, rtol=1e-4)
