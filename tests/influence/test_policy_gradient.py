"""Target rows are the gradient of the expected reward: a decoder so small that all its replies can be written down.

Names after NICE's tests N2, N10 and N12; N6 to N8 and N11 are in test_nice_scores.py, and N1, N3 to N5 and N8 in
test_estimator.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.data import Encoded
from duet_jax.influence import ExampleGradients, Sketch, of_any_loss, scores
from duet_jax.influence import policy_gradient as pg
from duet_jax.influence.build import Batching, Point, sketch
from duet_jax.influence.estimator import Estimator, Weights, weights
from duet_jax.influence.scores import TRACIN, Checkpoint
from duet_jax.models import llama
from duet_jax.models.generate import Samples, generate
from duet_jax.models.sampling import Sampling
from tests.influence.every_reply import (
    BATCHING,
    COUNT,
    EOS,
    EVERY,
    MODEL,
    NEW,
    PROMPTS,
    REPLIES,
    ROWS,
    VOCABULARY,
    WIDE,
    close,
    plain_weights,
    rows_of,
    some,
)


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
