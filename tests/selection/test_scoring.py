"""Selectors that look at gradients: they find planted noise and what serves a target, and go on after any crash."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from duet_jax import influence as gradients_of
from duet_jax.config import DomainConfig, LoraSettings, SelectorConfig, TrainingConfig
from duet_jax.data import Encoded, join
from duet_jax.errors import DataError
from duet_jax.influence.features import moments
from duet_jax.influence.store import Store
from duet_jax.models import llama
from duet_jax.selection import Pool, score
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.optimiser import learning_rates
from duet_jax.training.sft import Trainer

LETTERS, LENGTH, COUNT = 8, 12, 120
MODEL = llama.LlamaConfig(
    vocab_size=LETTERS, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
)
TARGET = DomainConfig(name="target", source="not read here")
SELECTORS = {
    "influence": SelectorConfig(kind="influence", targets=(TARGET,), warmup_epochs=6, warmup_examples=120),
    "less": SelectorConfig(kind="less", targets=(TARGET,), warmup_epochs=3, warmup_examples=120, k=2048),
}


def walks(count: int, rule: np.ndarray | None, seed: int, name: str) -> Encoded:
    """Sequences in which each letter has one successor, or none in particular."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, LETTERS, (count, LENGTH)).astype(np.int32)
    for t in range(1, LENGTH if rule is not None else 0):
        rows[:, t] = rule[rows[:, t - 1]]  # type: ignore[index]
    return Encoded(tuple(rows), np.ones(count, np.int32), tuple(f"{name}{i}" for i in range(count)))


RULES = [np.random.default_rng(seed).permutation(LETTERS) for seed in (0, 1)]


def pool(method: str, *, targets: bool = True) -> Pool:
    """Two domains with rules of their own, a quarter of each is noise; the target follows the first one's."""
    settings = TrainingConfig(method=method, learning_rate=1e-2, batch_size=8, lora=LoraSettings(rank=4))
    base = llama.init(MODEL, key=jax.random.key(0))
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, base), settings, (LENGTH,), 0, remat="none")
    train = tuple(
        join([walks(COUNT * 3 // 4, rule, 2 + i, f"{i}good"), walks(COUNT // 4, None, 4 + i, f"{i}bad")])
        for i, rule in enumerate(RULES)
    )
    held_out = tuple(walks(16, rule, 6 + i, "v") for i, rule in enumerate(RULES))
    named = (("target", walks(16, RULES[0], 8, "t")),) if targets else ()
    return Pool(("first", "second"), train, held_out, named, trainer, "f", 0)


def noisy(examples: Encoded) -> np.ndarray:
    return np.array(["bad" in identifier for identifier in examples.ids])


@pytest.mark.parametrize("kind", [pytest.param("influence", marks=pytest.mark.slow), "less"])
def test_what_serves_the_target_scores_high(kind: str, tmp_path: Path) -> None:
    subject = pool("full")
    first, second = score(subject, SELECTORS[kind], tmp_path)
    bad = noisy(subject.train[0])
    assert roc_auc_score(~bad, first) > 0.9
    assert roc_auc_score(np.repeat([1, 0], (~bad).sum()), np.concatenate([first[~bad], second[~bad]])) > 0.9


@pytest.mark.parametrize("kind", ["influence", "less"])
def test_each_domain_is_scored_for_its_own_examples(kind: str, tmp_path: Path) -> None:
    subject = pool("full", targets=False)
    found = score(subject, dataclasses.replace(SELECTORS[kind], targets=()), tmp_path)
    for examples, values in zip(subject.train, found, strict=True):
        assert roc_auc_score(~noisy(examples), values) > 0.8


@pytest.mark.slow
def test_less_is_the_formula_of_the_paper(tmp_path: Path) -> None:
    """Against gradients by vmap(grad) of a plain loss, Adam's step written out, and exact cosines."""
    subject, selector = pool("lora"), SELECTORS["less"]
    found = np.concatenate(score(subject, selector, tmp_path))
    (place,) = tmp_path.glob("trajectory-*")
    trainer = subject.warm_up_trainer(3)
    data, targets = join(subject.train), subject.targets[0][1]
    tokens = [jnp.asarray(np.stack(x.tokens)) for x in (data, targets)]
    steps = len(trainer.plan(data, subject.sample(len(data), 120, 0), 0))
    rates = learning_rates(trainer.settings, steps).reshape(3, -1).mean(axis=1)
    expected = np.zeros(len(data))
    for epoch, weight in enumerate(rates / rates.sum()):
        with Checkpoints(place / f"epoch-{epoch + 1}" / "state", {}) as checkpoints:
            step, state, _ = checkpoints.restore(trainer.start(jax.random.key(0)))  # type: ignore[misc]
        assert step == steps // 3 * (epoch + 1)

        def loss(factors, row, state=state):  # type: ignore[no-untyped-def]
            params, lora = trainer.deployable(factors)
            hidden = llama.hidden_states(MODEL, params, row[None], lora=lora)[0, :-1]
            log_probs = jax.nn.log_softmax(hidden @ llama.output_head(params).T)
            return -jnp.mean(jnp.take_along_axis(log_probs, row[1:, None], axis=1))

        train, wanted = (jax.vmap(jax.grad(loss), (None, 0))(state.trainable, rows) for rows in tokens)
        m, v, t = moments(state.optimiser)

        def moved(g, m, v, t=t):  # type: ignore[no-untyped-def]
            m, v = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1)), (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (t + 1))
            return m / (jnp.sqrt(v) + 1e-8)

        flat = [
            np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)
            for tree in (jax.tree.map(moved, train, m, v), wanted)
        ]
        query = flat[1].mean(axis=0)
        expected += weight * flat[0] @ query / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(query)
    # The error of a cosine of two sketches is about 1 / sqrt(k), and those of the checkpoints are independent.
    assert np.sqrt(np.mean((found - expected) ** 2)) < 1 / np.sqrt(selector.k)
    assert np.corrcoef(found, expected)[0, 1] > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["influence", "less"])
def test_a_killed_run_goes_on_to_the_same_scores(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_jax.selection.influence.PART", 64)
    subject, selector = pool("lora"), SELECTORS[kind]
    whole = score(subject, selector, tmp_path / "whole")
    calls = 0

    class Killed(BaseException):
        pass

    def dying(real, after: int):  # type: ignore[no-untyped-def]
        def call(*args, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == after:
                raise Killed
            return real(*args, **options)

        return call

    for place, name, after in (
        (Trainer, "step", 20),  # after the end of an epoch, which then comes again
        (Store, "write", 2),
        (gradients_of.build.Point, "each", 3),
    ):
        calls = 0
        with monkeypatch.context() as patch:
            if name == "step":
                real = subject.trainer.step
                patch.setitem(subject.trainer.__dict__, "step", dying(real, after))
            else:
                patch.setattr(place, name, dying(getattr(place, name), after))
            with contextlib.suppress(Killed):
                score(subject, selector, tmp_path / "part")
    again = score(subject, selector, tmp_path / "part")
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_finished_scores_are_read_and_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = pool("lora")
    first = score(subject, SELECTORS["influence"], tmp_path)
    monkeypatch.setattr(Trainer, "fit", None)
    # The rule comes after the scores.
    same = dataclasses.replace(SELECTORS["influence"], rule="top_k")
    for one, other in zip(first, score(subject, same, tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)
    other = dataclasses.replace(SELECTORS["influence"], damping=0.2)
    with pytest.raises(TypeError):
        score(subject, other, tmp_path)


def test_targets_without_examples_are_refused(tmp_path: Path) -> None:
    nothing = Encoded((), np.zeros(0, np.int32), ())
    empty = dataclasses.replace(pool("lora", targets=False), validation=(nothing, nothing))
    with pytest.raises(DataError, match="'first': no example of it is held out"):
        score(empty, SELECTORS["less"], tmp_path)
