"""DavIR and RHO-loss: formulas of the papers, planted noise, references trained and given, and any crash."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import yaml
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from duet_jax import cli, models
from duet_jax.config import DomainConfig, LoraSettings, SelectorConfig, TrainingConfig
from duet_jax.data import Encoded, Example, join
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback import Engine
from duet_jax.feedback import likelihood as likelihoods
from duet_jax.models import llama
from duet_jax.selection import Pool, choose, sample, score
from duet_jax.selection import losses as loss_files
from duet_jax.selection.davir import davir_scores, rho_scores, spearman
from duet_jax.selection.losses import Losses, base_losses, losses
from duet_jax.training.sft import Trainer

LETTERS, LENGTH, COUNT = 8, 12, 64
TOKENIZER = CharacterTokenizer.from_examples([Example("0", "", "abcdefgh")])
FIRST = TOKENIZER.encode("a")[-1]
MODEL = llama.LlamaConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_length=LENGTH,
)
BASE = llama.init(MODEL, key=jax.random.key(0))
RULES = [np.random.default_rng(seed).permutation(LETTERS) for seed in (0, 1)]
DAVIR = SelectorConfig(kind="davir", rule="top_k", warmup_epochs=3)
RHO = SelectorConfig(kind="rho", rule="top_k", warmup_epochs=6)
NOTHING = Encoded((), np.zeros(0, np.int32), ())
# The four examples of the specification: losses of the base and of the reference, a token.
FOUR = np.array([2.0, 4.0, 1.0, 3.0]), np.array([1.0, 2.5, 0.2, 3.3])


def both(base: np.ndarray, reference: np.ndarray, tokens: Any = 1) -> tuple[Losses, Losses]:
    """Losses of examples with those means a token."""
    counts = np.broadcast_to(np.array(tokens, np.int64), base.shape)
    return Losses(base * counts, counts), Losses(reference * counts, counts)


def walks(count: int, rule: np.ndarray | None, seed: int, name: str) -> Encoded:
    """Short and long sequences in which each letter has one successor, or none in particular."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, LETTERS, (count, LENGTH))
    for t in range(1, LENGTH if rule is not None else 0):
        rows[:, t] = rule[rows[:, t - 1]]  # type: ignore[index]
    tokens = tuple(
        (FIRST + row[:length]).astype(np.int32)
        for row, length in zip(rows, rng.choice([6, LENGTH], count), strict=True)
    )
    return Encoded(tokens, np.ones(count, np.int32), tuple(f"{name}{i}" for i in range(count)))


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Two domains with rules of their own, a quarter of each is noise; the target follows the first one's."""
    settings = TrainingConfig(method="full", learning_rate=1e-2, batch_size=8, lora=LoraSettings(rank=4))
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, BASE), settings, (LENGTH,), TOKENIZER.pad_id, remat="none")
    train = tuple(
        join([walks(COUNT * 3 // 4, rule, 2 + i, f"{i}good"), walks(COUNT // 4, None, 4 + i, f"{i}bad")])
        for i, rule in enumerate(RULES)
    )
    held_out = tuple(walks(8, rule, 6 + i, "v") for i, rule in enumerate(RULES))
    target = ("target", walks(32, RULES[0], 8, "t"))
    engine = Engine(models.Model(MODEL, BASE, TOKENIZER, "base", "f"), False, (LENGTH,))
    return Pool(("first", "second"), train, held_out, (target,), trainer, "f", 0, engine=engine)


def plain_losses(params: llama.Params, examples: Encoded) -> np.ndarray:
    """Summed losses from the logits of all positions, the whole vocabulary of each."""
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in examples.tokens])
    logits = llama.hidden_states(MODEL, params, jnp.asarray(tokens))[:, :-1] @ llama.output_head(params).T
    found = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
    return np.sum(np.asarray(found, np.float64), axis=1, where=np.arange(1, LENGTH) < examples.lengths[:, None])


def test_d1_four_examples_and_both_denominators() -> None:
    pair = both(*FOUR)
    np.testing.assert_allclose(rho_scores(*pair), [1, 1.5, 0.8, -0.3])
    np.testing.assert_allclose(davir_scores(*pair), [0.5, 0.375, 0.8, -0.1])
    np.testing.assert_allclose(davir_scores(*pair, "reference"), [1, 0.6, 4, -0.3 / 3.3])
    assert [list(np.argsort(-davir_scores(*pair, kind))) for kind in ("base", "reference")] == [[2, 0, 1, 3]] * 2


def test_d2_lengths_change_sums_but_no_shares() -> None:
    pair = both(*FOUR, tokens=[200, 10, 5, 50])
    np.testing.assert_allclose(davir_scores(*pair), davir_scores(*both(*FOUR)), rtol=1e-12)
    assert list(np.argsort(-rho_scores(*pair))) == [1, 0, 2, 3]
    assert list(np.argsort(-rho_scores(*pair, token_mean=False))) == [0, 1, 2, 3]


def test_d3_the_base_as_its_own_reference_scores_nothing() -> None:
    base, _ = both(*FOUR)
    assert not davir_scores(base, base).any() and not rho_scores(base, base).any()


def test_d4_tokens_of_equal_losses_have_a_score_without_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 50)
    pair = both(np.full(50, 3.0), np.full(50, 1.2), tokens=lengths)
    np.testing.assert_allclose(davir_scores(*pair), 1 - 1.2 / 3.0)
    assert spearman(rho_scores(*pair, token_mean=False), lengths) == pytest.approx(1)


def test_ranks_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, 40), rng.normal(size=40).round(1)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(3), np.arange(3))) and np.isnan(spearman(np.zeros(0), np.zeros(0)))


def test_d7_ties_and_counts_at_their_limits() -> None:
    utilities = davir_scores(*both(np.ones(6), np.ones(6)))
    picked = [choose(DAVIR, utilities, 3, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert len(set(picked[0])) == 3 and np.array_equal(picked[0], picked[1])
    assert len(choose(DAVIR, utilities, 0, np.random.default_rng(0))) == 0
    # More than there are: all of them, and some again.
    assert set(choose(DAVIR, utilities, 8, np.random.default_rng(0))) == set(range(6))
    nothing = davir_scores(*both(np.full(3, np.nan), np.ones(3)))
    assert (nothing == -np.inf).all() and len(choose(DAVIR, nothing, 0, np.random.default_rng(0))) == 0
    with pytest.raises(ValueError, match="cannot choose 1 of 0"):
        sample(nothing, 1, rule="top_k", rng=np.random.default_rng(0))


def test_losses_that_say_nothing_are_never_chosen() -> None:
    base = np.array([1e-7, np.nan, np.inf, 2.0, 2.0, 1.0, 2.0])
    reference = np.array([0.0, 1.0, 1.0, np.inf, np.nan, 3.0, 0.0])
    np.testing.assert_array_equal(davir_scores(*both(base, reference))[:5], [-np.inf] * 5)
    np.testing.assert_allclose(davir_scores(*both(base, reference))[5:], [-2, 1])
    np.testing.assert_array_equal(rho_scores(*both(base, reference))[1:5], [-np.inf] * 4)
    # What the reference knows by heart is first under both denominators.
    by_reference = davir_scores(*both(base, reference), "reference")
    assert np.isfinite(by_reference[6]) and by_reference.argmax() == 6


def noisy(pool: Pool) -> np.ndarray:
    return np.array(["bad" in identifier for part in pool.train for identifier in part.ids])


def test_davir_of_planted_noise(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D8: before the reference knows noise by heart, clean examples score higher; the losses are those of plain JAX."""
    said: list[str] = []
    found = np.concatenate(score(dataclasses.replace(pool, say=said.append), DAVIR, tmp_path))
    assert roc_auc_score(~noisy(pool), found) > 0.9
    (place,) = tmp_path.glob("davir-*")
    details = np.load(place / "details.npz")
    trainer = pool.warm_up_trainer(DAVIR.warmup_epochs)
    data = join(pool.train)
    trained = trainer.fit(data, np.arange(len(data)), seed=0, start_seed=0)
    for name, params in (("base", BASE), ("reference", trained.trainable)):
        np.testing.assert_allclose(details[f"{name}_loss"], plain_losses(params, data), rtol=1e-4)
    np.testing.assert_array_equal(details["response_tokens"], data.lengths - 1)
    np.testing.assert_allclose(found, 1 - details["reference_loss"] / details["base_loss"])
    assert [line.split(":")[0] for line in said[:4]] == [
        "base model",
        *(f"reference after epoch {epoch} of 3" for epoch in (1, 2, 3)),
    ]
    on_pool = [float(line.split("token ")[1].split(" on the pool")[0]) for line in said[:4]]
    assert on_pool == sorted(on_pool, reverse=True)
    sums = details["reference_loss"].sum() / details["response_tokens"].sum()
    assert on_pool[-1] == pytest.approx(sums, abs=6e-4)
    lines = [line for line in said if "length" in line]
    assert [line.split("Spearman")[0] for line in lines] == ["first, ", "second, ", ""]
    summed = spearmanr(details["base_loss"] - details["reference_loss"], details["response_tokens"]).statistic
    assert lines[-1].endswith(f"RHO summed {summed:+.2f}")
    # Another denominator needs no other model.
    monkeypatch.setattr(Trainer, "fit", None)
    other = np.concatenate(score(pool, dataclasses.replace(DAVIR, denominator="reference"), tmp_path))
    assert list(np.argsort(-other)) == list(np.argsort(-found))


@pytest.mark.slow
def test_d8_a_reference_that_knows_everything_by_heart_tells_noise_apart_no_more(pool: Pool, tmp_path: Path) -> None:
    small = dataclasses.replace(pool, train=tuple(part.take(range(32, 64)) for part in pool.train))
    areas = {}
    for epochs in (6, 120):
        found = np.concatenate(score(small, dataclasses.replace(DAVIR, warmup_epochs=epochs), tmp_path))
        areas[epochs] = roc_auc_score(~noisy(small), found)
    assert areas[6] > 0.9 and areas[120] < areas[6] - 0.05, areas


def test_rho_prefers_what_serves_the_target(pool: Pool, tmp_path: Path) -> None:
    targets = (DomainConfig(name="target", source="not read here"),)
    selector = dataclasses.replace(RHO, targets=targets)
    first, second = score(pool, selector, tmp_path)
    clean = COUNT * 3 // 4
    assert roc_auc_score(~noisy(pool)[:COUNT], first) > 0.9
    assert roc_auc_score(np.repeat([1, 0], clean), np.concatenate([first[:clean], second[:clean]])) > 0.9
    summed = np.concatenate(score(pool, dataclasses.replace(selector, token_mean=False), tmp_path))
    tokens = join(pool.train).lengths - 1
    np.testing.assert_allclose(summed, np.concatenate([first, second]) * tokens)


def test_rho_without_targets_learns_from_held_out_examples(pool: Pool, tmp_path: Path) -> None:
    taught = dataclasses.replace(pool, targets=(), validation=tuple(walks(16, rule, 6, "v") for rule in RULES))
    found = np.concatenate(score(taught, RHO, tmp_path))
    assert roc_auc_score(~noisy(pool), found) > 0.9
    with pytest.raises(DataError, match="no example of it is held out"):
        score(dataclasses.replace(taught, validation=(NOTHING, NOTHING)), RHO, tmp_path)


def given(folder: Path, params: llama.Params, **changes: Any) -> str:
    config = dataclasses.replace(MODEL, **changes)
    models.save(models.Model(config, params, TOKENIZER, "x", "x"), folder)
    return str(folder)


def referring(kind: Literal["davir", "rho"], source: str) -> SelectorConfig:
    return SelectorConfig(kind=kind, rule="top_k", reference=source)


def test_a_given_reference(pool: Pool, tmp_path: Path) -> None:
    other = llama.init(MODEL, key=jax.random.key(1))
    for params, expected in ((BASE, 0 * noisy(pool)), (other, None)):
        source = given(tmp_path / "model", params)
        found = score(pool, referring("davir", source), tmp_path / "work")
        if expected is None:
            data = join(pool.train)
            expected = 1 - plain_losses(other, data) / plain_losses(BASE, data)
        # The same name with another model behind it is another reference.
        np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)
    # "rho" with a given reference needs nobody to learn from.
    alone = dataclasses.replace(pool, targets=(), validation=(NOTHING, NOTHING))
    score(alone, referring("rho", source), tmp_path / "work")


def test_a_reference_that_does_not_fit_is_refused(pool: Pool, tmp_path: Path) -> None:
    source = given(tmp_path / "short", BASE, max_length=LENGTH - 1)
    with pytest.raises(ModelError, match=rf"selector.reference: .*short has a context of {LENGTH - 1} tokens"):
        score(pool, referring("davir", source), tmp_path)
    words = CharacterTokenizer.from_examples([Example("0", "", "hijklmno")])
    assert words.vocab_size == TOKENIZER.vocab_size and pool.engine is not None
    engine = dataclasses.replace(pool.engine, model=dataclasses.replace(pool.engine.model, tokenizer=words))
    source = given(tmp_path / "other", BASE)
    with pytest.raises(ModelError, match="has other tokens than the base model; give one with the same vocabulary"):
        score(dataclasses.replace(pool, engine=engine), referring("davir", source), tmp_path)
    with pytest.raises(ModelError, match="There is no model at"):
        score(pool, referring("davir", str(tmp_path / "nowhere")), tmp_path)


def test_examples_without_a_loss_are_named(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, said = likelihoods.response_log_probs, []

    def broken(*args: Any) -> np.ndarray:
        values, rows = real(*args), np.concatenate([batch[2] for batch in args[4]])
        return np.where(rows == 3, np.nan, values)

    source = given(tmp_path / "model", llama.init(MODEL, key=jax.random.key(1)))
    selector = referring("davir", source)
    with monkeypatch.context() as patch:
        patch.setattr(loss_files, "response_log_probs", broken)
        first, _ = score(dataclasses.replace(pool, say=said.append), selector, tmp_path / "one")
    assert first[3] == -np.inf and np.isfinite(np.delete(first, 3)).all()
    assert "davir, first: 1 of 64 examples are never chosen" in said[0] and said[0].endswith(": 0good3")
    monkeypatch.setattr(loss_files, "response_log_probs", lambda *args: real(*args) * np.nan)
    with pytest.raises(DataError, match="domain 'first': no example has a score"):
        score(pool, selector, tmp_path / "none")


def test_a_killed_run_goes_on_to_the_same_scores(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_files, "PART", 2)
    whole = score(pool, DAVIR, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def dying(real: Any, after: int) -> Any:
        calls = iter(range(after))

        def call(*args: Any, **options: Any) -> Any:
            if next(calls, None) is None:
                raise Killed
            return real(*args, **options)

        return call

    real = likelihoods.response_log_probs
    # Within the base losses, the training, the losses of an epoch (whose end then comes again), the reference's.
    for place, after in (("losses", 2), ("step", 20), ("losses", 1), ("losses", 15)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if place == "losses":
                patch.setattr(loss_files, "response_log_probs", dying(real, after))
            else:
                patch.setitem(pool.trainer.__dict__, "step", dying(pool.trainer.step, after))
            score(pool, DAVIR, tmp_path / "part")
    again = score(pool, DAVIR, tmp_path / "part")
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(loss_files, "base_losses", None)
    score(pool, DAVIR, tmp_path / "part")


def test_losses_are_kept_by_model_and_examples(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int, int]] = []
    watched = dataclasses.replace(pool, on_progress=lambda *step: steps.append(step))
    found = base_losses(watched, pool.train[0], tmp_path)
    np.testing.assert_allclose(found.sums, plain_losses(BASE, pool.train[0]), rtol=1e-5)
    np.testing.assert_allclose(found.means, found.sums / (pool.train[0].lengths - 1))
    assert steps[-1] == ("base model, losses", COUNT, COUNT) and [path.suffix for path in tmp_path.iterdir()] == [
        ".npz"
    ]
    monkeypatch.setattr(loss_files, "response_log_probs", None)
    again = losses(pool, pool.train[0], {}, None, "f", tmp_path, "base")
    np.testing.assert_array_equal(again.sums, found.sums)
    for identity, examples in (("g", pool.train[0]), ("f", pool.train[1])):
        with pytest.raises(TypeError):
            losses(pool, examples, BASE, None, identity, tmp_path, "base")


def test_no_logits_of_all_tokens_are_made(arrays: Any) -> None:
    rows, length, vocabulary = 16, 128, 1000
    config = dataclasses.replace(MODEL, vocab_size=vocabulary, max_length=length)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    program = likelihoods.scorer(config, jnp.float32)
    made = list(arrays(jax.make_jaxpr(program)(llama.shapes(config), None, tokens, mask).jaxpr))
    logits = [aval.shape for aval in made if vocabulary in aval.shape]
    # A chunk of them is, so the search does see them.
    assert (256, vocabulary) in logits and max(np.prod(shape) for shape in logits) <= 256 * vocabulary


def test_duet_select_by_davir(tmp_path: Path) -> None:
    options = {"letters": 5, "length": 6, "examples": 40}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**options, "tags": tag}} for tag in "AB"]
    tree = {
        "name": "walks",
        "count": 16,
        "pooled": True,
        "data": {"max_length": 10, "buckets": [10], "validation_fraction": 0, "domains": domains},
        "model": {"scratch": shape},
        "training": {"learning_rate": 0.01, "batch_size": 8, "lora": {"rank": 2}},
        "selector": {"kind": "davir", "rule": "top_k", "warmup_epochs": 2},
    }
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(tree))
    words = ["select", str(tmp_path / "select.yaml"), "--output", str(tmp_path / "out"), "--quiet"]
    assert cli.main(words) == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    best = np.argsort(-np.array(table["utility"]))[:16]
    assert set(np.flatnonzero(table["selected"])) == set(best)
    # What the utilities are made of stands beside them, and is there of a finished selection, too.
    base, reference = np.array(table["base_loss"]), np.array(table["reference_loss"])
    np.testing.assert_allclose((base - reference) / base, table["utility"], rtol=1e-12)
    # So many tokens are left after the prompt.
    assert set(table["response_tokens"]) == {4} and cli.main(words) == 0
    again = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert again == table
    log = json.loads((tmp_path / "out" / "selection.json").read_text())["log"]
    assert any(line.startswith("reference after epoch 2 of 2: mean loss a token") for line in log)
