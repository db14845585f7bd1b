"""Selectors that need no search: loss bands, EL2N, and baselines of length, each through `score`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sklearn.metrics import roc_auc_score

from duet_jax.config import SelectorConfig, TrainingConfig
from duet_jax.data import Encoded, join
from duet_jax.errors import ConfigError, DataError
from duet_jax.models import llama
from duet_jax.selection import Pool, choose, el2n, passes, score, score_with_details
from duet_jax.selection.losses import Losses, base_losses
from duet_jax.training.sft import Trainer

LETTERS, LONGEST = 8, 12
MODEL = llama.LlamaConfig(
    vocab_size=LETTERS, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
)
RULE = np.random.default_rng(0).permutation(LETTERS)


def walks(count: int, seed: int, tag: str, *, noise: bool = False) -> Encoded:
    """Responses of 1 to 11 letters of which each has one successor, or none in particular."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, LETTERS, (count, LONGEST)).astype(np.int32)
    for t in range(1, 1 if noise else LONGEST):
        rows[:, t] = RULE[rows[:, t - 1]]
    lengths = rng.integers(2, LONGEST + 1, count)
    tokens = tuple(row[:length] for row, length in zip(rows, lengths, strict=True))
    return Encoded(tokens, np.ones(count, np.int32), tuple(f"{tag}{i}" for i in range(count)))


def make_pool(*train: Encoded, **more: Any) -> Pool:
    base = llama.init(MODEL, key=jax.random.key(0))
    settings = TrainingConfig(method="full", learning_rate=1e-2, batch_size=8)
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, base), settings, (LONGEST,), 0, remat="none")
    nothing = Encoded((), np.zeros(0, np.int32), ())
    return Pool(("a", "b")[: len(train)], train, (nothing,) * len(train), (), trainer, "f", 0, **more)


@jax.jit
def probabilities_of(params: llama.Params, tokens: jax.Array) -> jax.Array:
    return jax.nn.softmax(llama.hidden_states(MODEL, params, tokens) @ llama.output_head(params).T)


def dense(params: llama.Params, data: Encoded) -> list[np.ndarray]:
    """Predicted distributions `[length - 1, vocab]` of each example, from whole logits."""
    padded = np.stack([np.resize(tokens, LONGEST) for tokens in data.tokens])
    found = np.asarray(probabilities_of(params, padded))
    return [each[: len(tokens) - 1].copy() for each, tokens in zip(found, data.tokens, strict=True)]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(walks(60, 1, "a"), walks(40, 2, "b", noise=True))


def test_a_band_keeps_what_lies_between_the_quantiles_of_its_domain(pool: Pool, tmp_path: Path) -> None:
    said: list[str] = []
    found = score(dataclasses.replace(pool, say=said.append), SelectorConfig(kind="loss_band"), tmp_path)
    params = pool.trainer.load_base()
    for data, values in zip(pool.train, found, strict=True):
        means = np.zeros(len(data))
        for row, (tokens, probabilities) in enumerate(zip(data.tokens, dense(params, data), strict=True)):
            means[row] = -np.mean(np.log(probabilities[np.arange(len(tokens) - 1), tokens[1:]]))
        low, high = np.quantile(means, [0.25, 0.75])
        inside = (low <= means) & (means <= high)
        # Of those at an end, rounding decides.
        clear = np.minimum(np.abs(means - low), np.abs(means - high)) > 1e-5
        np.testing.assert_array_equal(values[clear], inside[clear])
        assert clear.sum() >= len(data) - 4 and len(data) // 2 <= values.sum() <= len(data) // 2 + 2
    for line, name, values in zip(said, pool.names, found, strict=True):
        assert line.startswith(f"loss_band, {name}: {values.sum():.0f} of {len(values)} examples have a mean loss")


def test_both_ends_of_a_band_are_in_it(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.arange(100.0)
    sums[[3, 70]] = np.nan, np.inf
    monkeypatch.setattr("duet_jax.selection.loss_band.base_losses", lambda *_: Losses(sums, np.ones(100, np.int64)))
    everything = score(pool, SelectorConfig(kind="loss_band", low=0.0, high=1.0), tmp_path)
    assert np.flatnonzero(np.concatenate(everything) != 1).tolist() == [3, 70]
    assert np.concatenate(everything)[[3, 70]].tolist() == [-np.inf, -np.inf]
    # Of the 39 finite ones of the second domain, quantiles 0 and 0.5 are the first and the twentieth.
    lower = score(pool, SelectorConfig(kind="loss_band", low=0.0, high=0.5), tmp_path)[1]
    assert np.flatnonzero(lower == 1).tolist() == [*range(10), *range(11, 21)]


def test_bands_read_the_losses_that_other_selectors_keep(pool: Pool, tmp_path: Path) -> None:
    means = base_losses(pool, join(pool.train), tmp_path).means
    without_model = dataclasses.replace(pool, trainer=dataclasses.replace(pool.trainer, load_base=None))
    found, details = score_with_details(without_model, SelectorConfig(kind="loss_band", low=0.0, high=0.1), tmp_path)
    np.testing.assert_array_equal(found[0], means[:60] <= np.quantile(means[:60], 0.1))
    np.testing.assert_array_equal(details["base_loss"] / details["response_tokens"], means)


EL2N = SelectorConfig(kind="el2n", warmup_epochs=4, warmup_examples=80)


def test_el2n_is_the_mean_norm_of_dense_errors(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model after the warm-up, token by token from whole logits; noise is harder than what has a rule."""
    trained = []
    real = Trainer.fit

    def fit(self: Trainer, *args: Any, **options: Any) -> Any:
        trained.append(real(self, *args, **options))
        return trained[-1]

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(passes, "PART", 32)
    found = score(pool, EL2N, tmp_path)
    params = trained[0].trainable
    assert trained[0].steps == 4 * 10
    for data, values in zip(pool.train, found, strict=True):
        for tokens, value, error in zip(data.tokens, values, dense(params, data), strict=True):
            error[np.arange(len(tokens) - 1), tokens[1:]] -= 1
            np.testing.assert_allclose(value, np.linalg.norm(error, axis=1).mean(), rtol=1e-4)
    assert roc_auc_score(np.repeat([0, 1], [60, 40]), np.concatenate(found)) > 0.9


@pytest.mark.slow
def test_el2n_goes_on_after_a_crash_without_training_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PART", 32)
    whole = score(pool, EL2N, tmp_path / "whole")
    real, calls = passes.save_array, 0

    class Killed(BaseException):
        pass

    def dying(path: Path, array: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        real(path, array)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(passes, "save_array", dying)
        score(pool, EL2N, tmp_path / "part")
    steps, step = 0, pool.trainer.step

    def counting(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args)

    monkeypatch.setitem(pool.trainer.__dict__, "step", counting)
    again = score(pool, EL2N, tmp_path / "part")
    assert steps == 0 and len(list((tmp_path / "part").glob("el2n-*/norms/part-*.npy"))) == 4
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(whole))


def test_el2n_compiles_once_a_length(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, real = 0, el2n.token_error_norms

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal traced
        traced += 1
        return real(*args, **options)

    monkeypatch.setattr(el2n, "token_error_norms", counting)
    monkeypatch.setattr(passes, "PART", 16)
    score(pool, EL2N, tmp_path)
    assert len(list(tmp_path.glob("el2n-*/norms/part-*.npy"))) == 7 and traced == 4


def test_the_longest_responses(pool: Pool, tmp_path: Path) -> None:
    for data, values in zip(pool.train, score(pool, SelectorConfig(kind="length"), tmp_path), strict=True):
        np.testing.assert_array_equal(values, [len(tokens) - 1 for tokens in data.tokens])


@pytest.fixture(scope="module")
def long_pool() -> Pool:
    return make_pool(walks(2000, 3, "a"), walks(300, 4, "b"))


def selection(path: Path, pool: Pool, chosen: list[np.ndarray]) -> SelectorConfig:
    """A selector that matches what is written to `path`, as scores.parquet or as selected.jsonl."""
    parts = list(zip(pool.names, pool.train, chosen, strict=True))
    if path.suffix == ".parquet":
        names = [name for name, data, _ in parts for _ in data.ids]
        ids = [identifier for _, data, _ in parts for identifier in data.ids]
        table = pyarrow.table({"domain": names, "id": ids, "selected": np.concatenate(chosen)})
        pyarrow.parquet.write_table(table, path)
    else:
        rows = [{"id": data.ids[i], "domain": name} for name, data, mask in parts for i in np.flatnonzero(mask)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SelectorConfig(kind="length_matched", path=str(path))


def test_random_examples_are_as_long_as_the_chosen_ones(long_pool: Pool, tmp_path: Path) -> None:
    """A sixth, strongly for length: each length's expected number among the drawn is what was chosen."""
    rng, chosen = np.random.default_rng(0), []
    for data in long_pool.train:
        keys = rng.random(len(data)) ** (1 / np.maximum(data.lengths - 1.0, 0.1) ** 3)
        chosen.append(keys >= np.sort(keys)[-(len(data) // 6)])
    selector = selection(tmp_path / "scores.parquet", long_pool, chosen)
    found = score(long_pool, selector, tmp_path)
    lengths, values, mask = long_pool.train[0].lengths, found[0], chosen[0]
    count = int(mask.sum())
    edges = np.unique(np.quantile(lengths - 1, np.arange(1, 10) / 10))
    place = np.searchsorted(edges, lengths - 1)
    expected = np.bincount(place[mask], minlength=len(edges) + 1)

    def drawn(weights: np.ndarray) -> tuple[np.ndarray, float]:
        """Mean number of each bin and mean length over many draws."""
        rows = [choose(selector, weights, count, np.random.default_rng([5, i])) for i in range(600)]
        return np.mean([np.bincount(place[x], minlength=len(expected)) for x in rows], axis=0), lengths[rows].mean()

    average, mean = drawn(values)
    np.testing.assert_allclose(average, expected, atol=1.5)
    assert lengths[mask].mean() > lengths.mean() + 2
    assert abs(mean - lengths[mask].mean()) < 0.1
    # Shares of bins as weights, which are right for small shares alone, miss by more.
    plain = (expected / np.maximum(np.bincount(place), 1))[place]
    assert np.abs(drawn(plain)[0] - expected).max() > 5
    # The same file in another form says the same, and domains are matched apart from each other.
    again = score(long_pool, selection(tmp_path / "selected.jsonl", long_pool, chosen), tmp_path)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(found))


def test_utilities_of_matching_are_the_shares_of_bins(tmp_path: Path) -> None:
    """Half of one length, all of another, none of a third, and nothing of another domain."""
    rows = tuple(np.zeros(length, np.int32) for length in (4, 8, 12) for _ in range(10))
    data = Encoded(rows, np.ones(30, np.int32), tuple(f"a{i}" for i in range(30)))
    pool = make_pool(data, dataclasses.replace(data, ids=tuple(f"b{i}" for i in range(30))))
    mask = np.isin(np.arange(30), [*range(5), *range(10, 20)])
    found = score(pool, selection(tmp_path / "x.jsonl", pool, [mask, np.zeros(30, bool)]), tmp_path)
    np.testing.assert_allclose(found[0], np.repeat([np.log(2), np.log(20), 0], 10))
    assert not found[1].any()


def test_scores_follow_the_content_of_the_file(long_pool: Pool, tmp_path: Path) -> None:
    masks = [np.arange(len(data)) < 20 for data in long_pool.train]
    path = tmp_path / "selected.jsonl"
    before = score(long_pool, selection(path, long_pool, masks), tmp_path)
    masks[1] = ~masks[1]
    after = score(long_pool, selection(path, long_pool, masks), tmp_path)
    np.testing.assert_array_equal(before[0], after[0])
    assert (before[1] != after[1]).any()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "selector.path: '.*x.jsonl' cannot be read .No such file or directory.; give scores.parquet"),
        ('{"id": "a0"}\n', "x.jsonl, line 1 has no column 'id' or no column 'domain'"),
        ('{"id": "a0", "domain": "c"}\n', "line 1 chooses the example 'a0' of the domain 'c', which is not among"),
        ('{"id": "b0", "domain": "a"}\n', "chooses the example 'b0' of the domain 'a', which is not among"),
        ('{"id": "a0", "domain": "a", "selected": false}\n', "chooses no example; give a selection that chose some"),
    ],
)
def test_wrong_selections_are_told(content: str | None, sentence: str, pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        score(pool, SelectorConfig(kind="length_matched", path=str(path)), tmp_path)


def test_lengths_are_matched_by_drawing() -> None:
    with pytest.raises(ConfigError, match="rule is 'top_k'; it must be 'weighted' for a selector of kind 'length_"):
        SelectorConfig(kind="length_matched", path="x", rule="top_k")
