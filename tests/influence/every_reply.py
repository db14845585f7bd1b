"""A decoder so small that all its replies to two prompts can be written down, and target rows of them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax.data import Encoded
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.influence import CountSketch, ExampleGradients
from duet_jax.influence import policy_gradient as pg
from duet_jax.influence.build import Batching, Point
from duet_jax.influence.estimator import Weights
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.generate import Samples

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


def tiny() -> Point:
    """A decoder whose adapters do something."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), llama.shapes(MODEL))
    chosen = adapters.LoraConfig(rank=2, alpha=4.0, targets=FEW)
    factors = jax.eval_shape(lambda: adapters.init(MODEL, chosen, key=jax.random.key(1)).factors)
    factors = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), factors)
    lora = dataclasses.replace(adapters.without_factors(MODEL, chosen), factors=factors)
    return Point(ExampleGradients(MODEL, remat="none"), params, lora, None, "model")


ROWS = pg.replies(PROMPTS, EVERY)


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


def some(seed: int, each: int = 7) -> tuple[Samples, Weights]:
    """A few replies to both prompts, a third of them without weight."""
    rng = np.random.default_rng(seed)
    picked = [[REPLIES[i] for i in rng.integers(0, COUNT, each)] for _ in range(2)]
    values = np.where(rng.random((2, each)) < 0.3, 0, rng.normal(size=(2, each)))
    values[:, 0] = 1
    return samples_of(picked), plain_weights(values)
