"""Influence scores of stored training sketches on targets, over checkpoints, in one pass over the stores.

A target is a sketched gradient of an example that the model should do well on; a subtask is a set of targets. A
checkpoint's score of a training example for a subtask is a similarity to the subtask's targets; checkpoints add up
with weights; then subtasks are aggregated. Every similarity here is linear in something made of the targets alone,
so a subtask of any size is one query vector, and no training-by-target matrix is ever made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.errors import DataError
from duet_jax.influence import quantise, topk
from duet_jax.influence.header import require_comparable
from duet_jax.influence.store import Store

Similarity = Literal["dot", "mean_of_cosines", "cosine_of_mean"]
Aggregate = Literal["max", "mean", "softmax"]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How similarities become one score.

    Attributes:
      similarity: of a training example z and a subtask's targets v_1..v_J. 'dot': mean_j <z, v_j>, which is
        <z, mean_j v_j>. 'mean_of_cosines': mean_j cos(z, v_j), over the targets that are not 0, for which there is no
        cosine. 'cosine_of_mean': cos(z, mean_j v_j).
      aggregate: of a training example's scores s over subtasks, checkpoints added up. 'max', 'mean', or 'softmax':
        their mean with weights softmax(s / temperature), between the two.
      temperature: in units of the scores.
      query_format: format that subtasks' query vectors are rounded to. 'int8' makes the products with int8 or int4
        rows sums of integers, the same on every device (1.7 times faster for 64 queries on a CPU with VNNI); it adds
        an error of about 0.01 / sqrt(k) to a cosine.

    Raises:
      ValueError: an unknown name, or a temperature that is not positive.
    """

    similarity: Similarity = "cosine_of_mean"
    aggregate: Aggregate = "max"
    temperature: float = 0.1
    query_format: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        known = {
            "similarity": ("dot", "mean_of_cosines", "cosine_of_mean"),
            "aggregate": ("max", "mean", "softmax"),
            "query_format": ("float32", "int8"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be one of {', '.join(values)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")


LESS_PAPER = Scoring("cosine_of_mean", "max")
"""LESS (Xia et al. 2024, section 4): max_j sum_i weight_i cos(mean gradient of subtask j, Adam's step for z)."""

LESS_CODE = Scoring("mean_of_cosines", "max")
"""What LESS's published code computes: the cosine of every target, then their mean over the subtask, then the maximum.

Equals `LESS_PAPER` for one target a subtask, or where all targets of a subtask have one direction and norm."""

TRACIN = Scoring("dot", "mean")
"""TracInCP (Pruthi et al. 2020, equation 6): sum_i rate_i <gradient of z, gradient of the target>."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Training and target sketches at one checkpoint of the model.

    Attributes:
      train: a complete store.
      targets: a store, or sketches float32 `[m, k]`; the same targets in the same order at every checkpoint.
      weight: see `checkpoint_weights`.
    """

    train: Store
    targets: Store | np.ndarray | Array
    weight: float = 1.0


def checkpoint_weights(rates: np.ndarray, ends: Sequence[int], *, normalise: bool = True) -> np.ndarray:
    """Weights of checkpoints: the mean learning rate of the steps since the checkpoint before.

    With checkpoints at the ends of epochs it is each epoch's mean rate, as LESS has it.

    Args:
      rates: learning rate of every optimiser step, `[steps]`.
      ends: for each checkpoint, the number of steps done when it was written, ascending.
      normalise: to sum 1, as LESS's code does.

    Returns:
      float64 `[checkpoints]`.

    Raises:
      ValueError: `ends` does not ascend from above 0 to at most the number of steps, or all rates are 0.
    """
    rates = np.asarray(rates, np.float64)
    bounds = [0, *ends]
    if len(bounds) < 2 or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)) or bounds[-1] > len(rates):
        raise ValueError(
            f"the checkpoints' steps are {list(ends)}; they must ascend, from at least 1 to at most the "
            f"{len(rates)} steps that have a learning rate"
        )
    weights = np.array([rates[a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False)])
    if not normalise:
        return weights
    if not weights.sum() > 0:
        raise ValueError("all learning rates before the checkpoints are 0; weights need a positive one")
    return weights / weights.sum()


def queries(targets: np.ndarray, subtasks: np.ndarray, similarity: Similarity) -> np.ndarray:
    """One vector a subtask, whose dot product with a training example is the subtask's similarity to it.

    Args:
      targets: sketches float32 `[m, k]`.
      subtasks: int `[m]`, the number of each target's subtask, 0 and on, each with one target or more.
      similarity: see `Scoring`.

    Returns:
      float32 `[subtasks, k]`; for the two cosines, products are to be divided by the training example's norm.
    """
    counted = counts = np.bincount(subtasks)
    if similarity == "mean_of_cosines":
        targets = _unit(targets)
        counted = np.maximum(np.bincount(subtasks[targets.any(axis=1)], minlength=len(counts)), 1)
    # On the host and in order: sums of segments on an accelerator may differ between runs.
    ordered = targets[np.argsort(subtasks, kind="stable")]
    means = np.add.reduceat(ordered, np.cumsum(counts) - counts, axis=0) / counted[:, None].astype(np.float32)
    return _unit(means) if similarity == "cosine_of_mean" else means


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def blocks(checkpoints: Sequence[Checkpoint], scoring: Scoring, subtasks: Any = None) -> Iterator[tuple[int, Array]]:
    """Scores of training examples for each subtask, before they are aggregated, a shard at a time.

    Args:
      checkpoints: stores of the same training examples; at least one.
      scoring: how to score.
      subtasks: int `[m]`, the number of each target's subtask, 0 and on, of any sizes; None: all targets are one
        subtask. `np.arange(m)` scores every target by itself.

    Yields:
      The number of the first row, and scores float32 `[rows, subtasks]`.

    Raises:
      DataError: stores are incomplete, damaged, or cannot be compared.
      ValueError: no checkpoint, or subtasks that do not fit the targets.
    """
    _require_same_examples(checkpoints)
    prepared = [_queries(checkpoint, scoring, subtasks) for checkpoint in checkpoints]
    similarity = quantise.dot if scoring.similarity == "dot" else quantise.unit_dot
    streams = [checkpoint.train.stream() for checkpoint in checkpoints]
    for shards in zip(*streams, strict=True):
        total: Any = 0
        for checkpoint, query, (_, rows) in zip(checkpoints, prepared, shards, strict=True):
            total += float(checkpoint.weight) * similarity(rows, query)
        yield shards[0][0], total


def _queries(checkpoint: Checkpoint, scoring: Scoring, subtasks: Any) -> Any:
    targets = checkpoint.targets
    if isinstance(targets, Store):
        require_comparable(checkpoint.train.header, targets.header)
        targets = targets.take()
    targets = np.asarray(targets, np.float32)
    if targets.ndim != 2 or targets.shape[1] != checkpoint.train.header.k or not len(targets):
        raise ValueError(
            f"target sketches have shape {targets.shape}; "
            f"they must be one or more rows of k = {checkpoint.train.header.k}"
        )
    numbers = np.zeros(len(targets), np.int64) if subtasks is None else np.asarray(subtasks)
    if numbers.shape != (len(targets),) or numbers.dtype.kind not in "iu":
        raise ValueError(f"subtasks must be an array of integers, one for each of the {len(targets)} targets")
    if numbers.min() < 0 or not np.bincount(numbers).all():
        raise ValueError("subtasks must be numbered 0, 1, 2 and on, each with one target or more")
    if not np.isfinite(targets).all():
        raise DataError("a target sketch has a coordinate that is not finite; leave such targets out")
    query = queries(targets, numbers, scoring.similarity)
    return query if scoring.query_format == "float32" else quantise.encode(query, scoring.query_format)


def _require_same_examples(checkpoints: Sequence[Checkpoint]) -> None:
    if not checkpoints:
        raise ValueError("scores need at least one checkpoint")
    first = checkpoints[0].train
    for checkpoint in checkpoints[1:]:
        for name in ("rows", "shard_size", "data", "template"):
            ours, theirs = (getattr(store.header, name) for store in (first, checkpoint.train))
            if ours != theirs:
                raise DataError(
                    f"{first.folder} and {checkpoint.train.folder} hold different training examples: "
                    f"{name} is {ours!r} in one and {theirs!r} in the other; sketch the same at every checkpoint."
                )


@jax.jit
def _softmax_mean(scores: Array, temperature: float) -> Array:
    return jnp.sum(jax.nn.softmax(scores / temperature, axis=-1) * scores, axis=-1)


def aggregate(scores: Array, scoring: Scoring) -> Array:
    """Scores float32 `[n, subtasks]` as one for each example, float32 `[n]`."""
    if scoring.aggregate == "max":
        return jnp.max(scores, axis=-1)
    if scoring.aggregate == "mean":
        return jnp.mean(scores, axis=-1)
    return _softmax_mean(scores, scoring.temperature)


def utilities(checkpoints: Sequence[Checkpoint], scoring: Scoring, subtasks: Any = None) -> np.ndarray:
    """Aggregated scores of all training examples, float32 `[N]`; arguments and errors as for `blocks`."""
    return np.concatenate(
        [np.asarray(aggregate(scores, scoring)) for _, scores in blocks(checkpoints, scoring, subtasks)]
    )


class Best(NamedTuple):
    """The best training examples for each subtask (a column each), and by the aggregate (one column)."""

    subtasks: topk.Top
    aggregate: topk.Top


def best(checkpoints: Sequence[Checkpoint], count: int, scoring: Scoring, subtasks: Any = None) -> Best:
    """The `count` best training examples, in memory that does not grow with their number.

    Other arguments and errors as for `blocks`.

    Raises:
      ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    found: Best | None = None
    for start, scores in blocks(checkpoints, scoring, subtasks):
        if found is None:
            found = Best(topk.empty(scores.shape[1], count), topk.empty(1, count))
        found = Best(
            topk.merge(found.subtasks, scores, start),
            topk.merge(found.aggregate, aggregate(scores, scoring)[:, None], start),
        )
    assert found is not None
    return found
