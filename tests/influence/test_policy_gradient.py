"""Target rows are the gradient of the expected reward: a decoder so small that all its replies can be written down.

Names after NICE's tests N2, N6, N7 and N10 to N12; N1, N3 to N5 and N8 are in test_estimator.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.data import Encoded
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import DataError
from duet_jax.influence import Adam, CountSketch, ExampleGradients, Rademacher, Sketch, features, of_any_loss, scores
from duet_jax.influence import policy_gradient as pg
from duet_jax.influence.build import Batching, Point, sketch
from duet_jax.influence.estimator import PAPER_CODE, Estimator, Weights, weights
from duet_jax.influence.header import Header
from duet_jax.influence.scores import LESS_CODE, LESS_PAPER, TRACIN, Checkpoint, Scoring
from duet_jax.influence.store import Store
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.generate import Samples, generate
from duet_jax.models.sampling import Sampling

# Ids of a CharacterTokenizer of two letters: EOS ends a reply, the five others may stand in it.
EOS, NEW = 2, 3
MODEL = llama.LlamaConfig(
    vocab_size=6, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
FEW = ("q", "down")
WIDE = CountSketch(4096, seed=3)
BATCHING = Batching((4, 8), 16, 0)
PROMPTS = Encoded(
    (np.array([1, 4], np.int32), np.array([1, 5, 4, 4], np.int32)), np.array([2, 4], np.int32), ("first", "second")
)
VOCABULARY = CharacterTokenizer("ab")


def all_replies() -> list[tuple[int, ...]]:
    """Every reply of at most three ids, with EOS where it ends before."""
    open_ = [i for i in range(6) if i != EOS]
    ended = [(*start, EOS) for length in range(NEW) for start in itertools.product(open_, repeat=length)]
    return ended + list(itertools.product(open_, repeat=NEW))


REPLIES = all_replies()
COUNT = len(REPLIES)


def samples_of(chosen: list[list[tuple[int, ...]]]) -> Samples:
    """Samples of given ids, with garbage behind their ends."""
    shape = (len(chosen), len(chosen[0]))
    ids, lengths = np.full((*shape, NEW), 5, np.int32), np.zeros(shape, np.int32)
    for place in np.ndindex(shape):
        reply = chosen[place[0]][place[1]]
        ids[place][: len(reply)], lengths[place] = reply, len(reply)
    zeros, texts = np.zeros(ids.shape, np.float32), tuple(("",) * shape[1] for _ in chosen)
    return Samples(ids, lengths, np.zeros(shape, bool), zeros, zeros, texts)


EVERY = samples_of([REPLIES, REPLIES])


@pytest.fixture(scope="module")
def point() -> Point:
    return tiny()


def tiny() -> Point:
    """A decoder whose adapters do something."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), llama.shapes(MODEL))
    chosen = adapters.LoraConfig(rank=2, alpha=4.0, targets=FEW)
    factors = jax.eval_shape(lambda: adapters.init(MODEL, chosen, key=jax.random.key(1)).factors)
    factors = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), factors)
    lora = dataclasses.replace(adapters.without_factors(MODEL, chosen), factors=factors)
    return Point(ExampleGradients(MODEL, remat="none"), params, lora, None, "model")


def log_policy(point: Point, factors: object, rows: Encoded) -> jax.Array:
    """Log-probabilities of replies, `[rows]`: a plain forward pass, one sequence at a time."""
    longest = int(rows.lengths.max())
    tokens = np.stack([np.pad(row, (0, longest - len(row))) for row in rows.tokens])
    place = np.arange(1, longest)
    mask = (place >= rows.prompt_lengths[:, None]) & (place < rows.lengths[:, None])
    lora = dataclasses.replace(point.lora, factors=factors)
    hidden = llama.hidden_states(MODEL, point.params, tokens, lora=lora)
    log_probs = jax.nn.log_softmax(hidden[:, :-1] @ llama.output_head(point.params).T)
    return jnp.sum(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2)[..., 0] * mask, axis=1)


ROWS = pg.replies(PROMPTS, EVERY)


class Reference(NamedTuple):
    """Plain autodiff over all replies to both prompts, compiled once.

    Attributes:
      policy: `factors -> [2, COUNT]`, the probability of every reply.
      gradient: `(factors, values [2, COUNT], exact)`: the gradient of -sum_y values(y) pi(y) where `exact`, else of
        -sum_y values(y) log pi(y).
    """

    policy: Callable
    gradient: Callable


@pytest.fixture(scope="module")
def plain(point: Point) -> Reference:
    def logs(factors: object) -> jax.Array:
        return log_policy(point, factors, ROWS).reshape(2, COUNT)

    def loss(factors: object, values: jax.Array, exact: jax.Array) -> jax.Array:
        found = logs(factors)
        return -jnp.sum(values * jnp.where(exact, jnp.exp(found), found))

    return Reference(jax.jit(lambda factors: jnp.exp(logs(factors))), jax.jit(jax.grad(loss)))


@lru_cache(maxsize=1)
def projector(gradients: ExampleGradients) -> Callable:
    """Sketches of whole gradients: those of linear functions."""

    def loss(factors: object, gradient: object) -> jax.Array:
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(factors), jax.tree.leaves(gradient), strict=True))

    return of_any_loss(loss, Sketch(WIDE), named=gradients.named)


def wanted_rows(point: Point, plain: Reference, values: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """Sketches `[2, k]` of each prompt's gradient, see `Reference.gradient`."""
    values = np.asarray(values, np.float32)
    alone = [plain.gradient(point.lora.factors, values * (np.arange(2) == p)[:, None], exact) for p in range(2)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *alone)
    return np.asarray(projector(point.gradients)(point.lora.factors, stacked).values)


def squared_length(tree: object) -> float:
    return sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree))


def plain_weights(values: np.ndarray, **more: object) -> Weights:
    values = np.asarray(values, np.float32)
    made = Weights(values, np.zeros(len(values), np.float32), ~values.any(axis=1), False)
    return made._replace(**more)


def rows_of(point: Point, folder: Path, weights: Weights, samples: Samples = EVERY, **options: object) -> np.ndarray:
    options = {"projection": WIDE} | options
    prompts = options.pop("prompts", PROMPTS)
    batching = options.pop("batching", BATCHING)
    return pg.target_sketches(point, prompts, samples, weights, folder, batching, **options).take()


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    lengths = np.linalg.norm(wanted, axis=1)
    assert (lengths > 0).all()
    assert (np.linalg.norm(found - wanted, axis=1) / lengths).max() < tolerance


REWARDS = np.random.default_rng(5).normal(size=(2, COUNT))


def test_the_policy_is_whole(point: Point, plain: Reference) -> None:
    np.testing.assert_allclose(np.asarray(plain.policy(point.lora.factors)).sum(axis=1), 1, rtol=1e-5)


def mean_weights(
    estimator: Estimator, rewards: np.ndarray, q: np.ndarray, pi: np.ndarray, norms: np.ndarray
) -> Weights:
    """What each reply is weighed with on average, over all pairs of replies drawn from q."""
    pairs = np.array(list(itertools.product(range(COUNT), repeat=2)))
    values = np.zeros((2, COUNT))
    for prompt in range(2):
        found = weights(
            estimator,
            rewards[prompt][pairs],
            log_probs=np.log(pi[prompt])[pairs],
            sampled_log_probs=np.log(q[prompt])[pairs],
            gold_rewards=np.full(len(pairs), 0.3),
            square_norms=norms[prompt][pairs],
        )
        chance = q[prompt][pairs].prod(axis=1)
        for column in range(2):
            np.add.at(values[prompt], pairs[:, column], chance * found.values[:, column])
    return plain_weights(values)


def test_n2_expected_rows_are_the_gradient_of_the_expected_reward(
    point: Point, plain: Reference, tmp_path: Path
) -> None:
    """Every baseline, on the policy and off it with importance weights; without EOS it is another gradient."""
    wanted = wanted_rows(point, plain, REWARDS, exact=True)
    pi = np.asarray(plain.policy(point.lora.factors), np.float64)
    close(rows_of(point, tmp_path / "whole", plain_weights(pi * REWARDS)), wanted, 2e-5)
    norms = pg.squared_norms(point, PROMPTS, EVERY, BATCHING)
    hot = np.sqrt(pi) / np.sqrt(pi).sum(axis=1, keepdims=True)
    for name, q in (("leave_one_out", pi), ("optimal", pi), ("gold", pi), ("leave_one_out", hot), ("optimal", hot)):
        estimator = Estimator(name, importance_cap=float("inf"))  # type: ignore[arg-type]
        found = mean_weights(estimator, REWARDS, q, pi, norms)
        close(rows_of(point, tmp_path / f"{name} {q[0, 0]}", found), wanted, 1e-4)
    off = mean_weights(Estimator("none", importance_cap=None), REWARDS, hot, pi, norms)
    assert np.linalg.norm(rows_of(point, tmp_path / "off", off) - wanted) > 0.1 * np.linalg.norm(wanted)
    # Replies of EOS alone keep it, for they would have no ids.
    lengths = np.maximum(EVERY.lengths - (np.arange(COUNT) < COUNT - 5**NEW), 1)
    cut = dataclasses.replace(EVERY, lengths=lengths)
    found = rows_of(point, tmp_path / "cut", plain_weights(pi * REWARDS), cut)
    assert (np.linalg.norm(found - wanted, axis=1) > 0.05 * np.linalg.norm(wanted, axis=1)).all()


def test_n10_the_reward_of_being_the_label_gives_the_direction_of_its_loss(
    point: Point, plain: Reference, tmp_path: Path
) -> None:
    gold = [REPLIES.index((4, 5, EOS)), REPLIES.index((5, EOS))]
    pi = np.asarray(plain.policy(point.lora.factors), np.float64)
    rewards = np.zeros((2, COUNT))
    rewards[[0, 1], gold] = 1
    found = rows_of(point, tmp_path / "policy", plain_weights(pi * rewards))
    # The row of LESS: a label's mean token loss.
    data = Encoded(tuple(ROWS.tokens[p * COUNT + g] for p, g in enumerate(gold)), PROMPTS.lengths, PROMPTS.ids)
    less = sketch(point, data, tmp_path / "less", BATCHING, projection=WIDE, row_format="float32").take()
    labels = (data.lengths - data.prompt_lengths)[:, None]
    close(found, pi[[0, 1], gold][:, None] * labels * less)
    close(found, wanted_rows(point, plain, rewards, exact=True), 2e-5)


def some(seed: int, each: int = 7) -> tuple[Samples, Weights]:
    """A few replies to both prompts, a third of them without weight."""
    rng = np.random.default_rng(seed)
    picked = [[REPLIES[i] for i in rng.integers(0, COUNT, each)] for _ in range(2)]
    values = np.where(rng.random((2, each)) < 0.3, 0, rng.normal(size=(2, each)))
    values[:, 0] = 1
    return samples_of(picked), plain_weights(values)


def spread(samples: Samples, values: np.ndarray, *, token_mean: bool = False) -> np.ndarray:
    """The same weights as those of all replies, `[2, COUNT]`."""
    found = np.zeros((2, COUNT))
    for place in np.ndindex(samples.lengths.shape):
        reply = tuple(samples.ids[place][: samples.lengths[place]].tolist())
        found[place[0], REPLIES.index(reply)] += values[place] / (len(reply) if token_mean else 1)
    return found


def test_rows_are_projected_gradients_of_the_weighted_loss_whatever_the_batches(
    point: Point, plain: Reference, tmp_path: Path
) -> None:
    samples, chosen = some(0)
    wanted = wanted_rows(point, plain, spread(samples, chosen.values))
    close(rows_of(point, tmp_path / "a", chosen, samples), wanted)
    small = dataclasses.replace(point, gradients=dataclasses.replace(point.gradients, micro_batch=2))
    other = rows_of(small, tmp_path / "b", chosen, samples, batching=Batching((7,), 4, 1), shard_size=1)
    close(other, wanted)
    mean = rows_of(point, tmp_path / "d", chosen._replace(token_mean=True), samples)
    close(mean, wanted_rows(point, plain, spread(samples, chosen.values, token_mean=True)))
    # A label joins as one more reply of its prompt.
    label = (5, 5, EOS)
    gold = Encoded(tuple(np.array([*p, *label], np.int32) for p in PROMPTS.tokens), PROMPTS.prompt_lengths, PROMPTS.ids)
    protected = chosen._replace(gold=np.array([0, 2], np.float32))
    values = spread(samples, chosen.values)
    values[1, REPLIES.index(label)] += 2
    close(rows_of(point, tmp_path / "e", protected, samples, gold=gold), wanted_rows(point, plain, values))


@pytest.mark.slow
def test_replies_spread_over_devices(tmp_path: Path) -> None:
    """Four devices of the host give the rows of one."""
    code = f"""
import dataclasses, importlib.util, jax, numpy as np, pathlib
assert len(jax.devices()) == 4
spec = importlib.util.spec_from_file_location("shared", {__file__!r})
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


def test_squared_norms_are_those_of_each_reply(point: Point, plain: Reference) -> None:
    samples, _ = some(2, each=2)
    wanted = np.zeros((2, 2))
    for place in np.ndindex(2, 2):
        one = spread(samples, np.arange(4).reshape(2, 2) == 2 * place[0] + place[1]).astype(np.float32)
        wanted[place] = squared_length(plain.gradient(point.lora.factors, one, False))
    found = pg.squared_norms(point, PROMPTS, samples, BATCHING)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    mean = pg.squared_norms(point, PROMPTS, samples, BATCHING, token_mean=True)
    np.testing.assert_allclose(mean, wanted / np.square(samples.lengths), rtol=1e-4)


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


def test_sampled_replies_have_the_log_probabilities_of_a_forward_pass(point: Point, plain: Reference) -> None:
    sampling = Sampling(temperature=1.3, top_k=5)
    samples = generate(
        MODEL,
        point.params,
        point.lora,
        PROMPTS.tokens,
        VOCABULARY,
        sampling=sampling,
        max_new_tokens=NEW,
        buckets=(4,),
        rows=8,
        samples=4,
    )
    logs, wanted = np.log(plain.policy(point.lora.factors)), np.zeros((2, 4))
    for place in np.ndindex(2, 4):
        wanted[place] = logs[place[0], REPLIES.index(tuple(samples.ids[place][: samples.lengths[place]].tolist()))]
    np.testing.assert_allclose(samples.log_probs.sum(axis=2), wanted, atol=1e-5)


def doubled(point: Point) -> Point:
    """Another checkpoint."""
    factors = jax.tree.map(lambda x: 2 * x, point.lora.factors)
    return dataclasses.replace(point, lora=dataclasses.replace(point.lora, factors=factors))


def test_n12_a_step_on_a_training_example_changes_the_reward_as_its_score_says(
    point: Point, plain: Reference, tmp_path: Path
) -> None:
    rows = np.random.default_rng(8).choice(2 * COUNT, 24, replace=False)
    train = sketch(point, ROWS.take(rows), tmp_path / "train", BATCHING, projection=WIDE, row_format="float32")
    pi = np.asarray(plain.policy(point.lora.factors), np.float64)
    targets = pg.target_sketches(
        point, PROMPTS, EVERY, plain_weights(pi * REWARDS), tmp_path / "targets", BATCHING, projection=WIDE
    )
    found = scores.utilities([Checkpoint(train, targets)], TRACIN)

    def reward(factors: object) -> float:
        return float(np.sum(np.asarray(plain.policy(factors), np.float64) * REWARDS) / 2)

    for place in (int(found.argmax()), int(found.argmin())):
        row = rows[place]
        mean = np.zeros(2 * COUNT, np.float32)
        mean[row] = 1 / (ROWS.lengths[row] - ROWS.prompt_lengths[row])
        gradient = plain.gradient(point.lora.factors, mean.reshape(2, COUNT), False)
        rate = 0.02 / np.sqrt(squared_length(gradient))
        up, down = (
            reward(jax.tree.map(lambda x, g, r=r: x - r * g, point.lora.factors, gradient)) for r in (rate, -rate)
        )
        # Half the difference has no part of second order.
        np.testing.assert_allclose((up - down) / 2, rate * found[place], rtol=0.05)
        assert np.sign(up - reward(point.lora.factors)) == np.sign(found[place])


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
