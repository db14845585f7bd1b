"""The policy gradient as a target of influence: NICE (Wang et al., ICML 2025), for metrics without a derivative.

The objective of a prompt x is the expected reward J = E[R(x, y)] of the model's own replies y. Its gradient is
E[(R - b) grad log pi(y|x)] for any b that does not depend on y (Williams 1992), so that a sum over M sampled replies
of weights times gradients of -log pi(y_m|x) is an estimate of the gradient of -J: a loss gradient like those of
training examples, whose inner product with it is positive where training on them raises J.

Where we differ from the published code, on purpose: the ids that were sampled are scored, end of text included, never
a text that was tokenised again; the other replies' mean is the baseline, without which a prompt whose replies are all
right gives a row of noise that counts like any other; sampling from another distribution than the policy is weighed;
prompts without signal are told. `PAPER_CODE` has the published estimator.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.data import Encoded, join
from duet_jax.distributed.place import gathered
from duet_jax.distributed.processes import lead, stop_if_told
from duet_jax.errors import DataError
from duet_jax.influence.build import PROJECTION, Batching, Point, Progress, Shared, begun, header, silent
from duet_jax.influence.estimator import PAPER_CODE, Estimator, Weights, weights
from duet_jax.influence.gradients import PLAIN
from duet_jax.influence.quantise import RowFormat
from duet_jax.influence.store import Store
from duet_jax.models import fingerprint, llama
from duet_jax.models.generate import Samples

__all__ = [
    "PAPER_CODE",
    "Estimator",
    "Weights",
    "covering",
    "replies",
    "squared_norms",
    "target_sketches",
    "weights",
]

# Sequences longer than the longest bucket are padded to a multiple of this.
STEP = 64


def replies(prompts: Encoded, samples: Samples) -> Encoded:
    """Prompts followed by the very ids that were sampled: rows to score, the replies of one prompt side by side.

    Args:
      prompts: as they were given to the sampler.
      samples: of them.

    Returns:
      prompts * samples rows; row `p * samples + m` has the id of the prompt and `#m`.

    Raises:
      DataError: a prompt or reply has no ids.
      ValueError: there are samples of another number of prompts.
    """
    count, each, _ = samples.ids.shape
    if count != len(prompts):
        raise ValueError(f"there are samples of {count} prompts, and {len(prompts)} prompts")
    tokens = []
    for prompt, identifier, ids, lengths in zip(prompts.tokens, prompts.ids, samples.ids, samples.lengths, strict=True):
        if not len(prompt) or lengths.min() < 1:
            what = "a reply to the prompt" if len(prompt) else "the prompt"
            raise DataError(f"{what} '{identifier}' has no tokens; a policy gradient needs one at least of both.")
        tokens += [np.concatenate([prompt, row[:length]]) for row, length in zip(ids, lengths, strict=True)]
    names = tuple(f"{identifier}#{number}" for identifier in prompts.ids for number in range(each))
    return Encoded(tuple(tokens), np.repeat(prompts.lengths, each), names, (False,) * len(tokens))


def covering(batching: Batching, prompts: Encoded, most: int) -> Batching:
    """The same batches, with one more bucket where a prompt and a reply of `most` tokens may not fit the longest.

    Nothing is cut, for the gradient would be that of another prompt: rows that are longer get a bucket of their own, a
    multiple of 64 tokens. It does not depend on the replies, so that all checkpoints share their programs.
    """
    longest = int(prompts.lengths.max()) + most
    if longest <= max(batching.buckets):
        return batching
    return batching._replace(buckets=(*batching.buckets, -(-longest // STEP) * STEP))


def squared_norms(
    point: Point, prompts: Encoded, samples: Samples, batching: Batching, *, token_mean: bool = False
) -> np.ndarray:
    """Exact squared norms of the gradients of replies' losses, float64 `[prompts, samples]`: one backward pass each.

    Arguments as for `target_sketches`; `token_mean` as in the estimator. Errors as for `replies`.
    """
    rows = replies(prompts, samples)
    batching = covering(batching, prompts, samples.ids.shape[2])
    program = dataclasses.replace(point.gradients, reduction="sum").squared_norms()
    found = point.each(program, rows, np.arange(len(rows)), batching).astype(np.float64)
    found = found.reshape(samples.lengths.shape)
    return found / np.square(samples.lengths) if token_mean else found


def target_sketches(
    point: Point,
    prompts: Encoded,
    samples: Samples,
    weights: Weights,
    folder: Path,
    batching: Batching,
    *,
    gold: Encoded | None = None,
    projection: Shared = PROJECTION,
    template: str = "",
    row_format: RowFormat = "float32",
    shard_size: int = 64,
    on_progress: Progress = silent,
) -> Store:
    """Sketches the estimated gradient of -J of each prompt into a store, or goes on with the one in `folder`.

    Every reply with a weight goes through one batched backward pass of its weighted loss; the rows of a prompt are
    added up on the device, in float32 and in the order of the batches. Replies without weight are not computed. A
    prompt without signal has a row of zeros, so that row p is prompt p. Rows can be compared with training rows of
    the same projection, whatever the loss of those is.

    Args:
      point: the policy, and which of its gradients.
      prompts: as they were given to the sampler.
      samples: of them.
      weights: of the replies, see `weights`.
      folder: of the store.
      batching: shapes of batches; see `covering` for longer rows.
      gold: prompts followed by their labels, one for each prompt (see `given.labelled`), where weights of labels are
        not all 0.
      projection: of the gradients.
      template: hash of the prompt template, for the header.
      row_format: of the stored rows.
      shard_size: prompts a shard; what a killed run loses at most.
      on_progress: is told replies done and of how many.

    Raises:
      DataError: the store in `folder` is of other replies, weights, another model or other settings; a gradient is not
        finite; or as for `replies`.
      ValueError: shapes differ, or labels have weights and are not there.
    """
    rows, owners, factors = _weighted_rows(prompts, samples, weights, gold)
    about = header(point, prompts, projection, PLAIN, template, row_format, shard_size)
    content = fingerprint((prompts.digest, rows.digest), factors)
    store = begun(folder, dataclasses.replace(about, loss="policy_gradient", data=content))
    program = dataclasses.replace(point.gradients, reduction="sum").sketch(projection)
    missing = lead(store.missing)
    shards = [store.bounds(shard) for shard in missing]
    of = int(np.count_nonzero(factors))
    done = of - sum(np.count_nonzero(factors[(owners >= start) & (owners < stop)]) for start, stop in shards)
    on_progress(int(done), of)
    most = max([samples.ids.shape[2], *(() if gold is None else gold.lengths - gold.prompt_lengths)])
    batching, params = covering(batching, prompts, most), llama.frozen(point.params, point.gradients.compute_dtype)
    for shard, (start, stop) in zip(missing, shards, strict=True):
        chosen = np.flatnonzero((factors != 0) & (owners >= start) & (owners < stop))
        # One height for all shards: one program.
        total = jnp.zeros((min(shard_size, len(prompts)), projection.k), jnp.float32)
        for here, tokens, mask in batching.batches(rows, chosen):
            factor, owner = np.zeros((len(mask), 1), np.float32), np.zeros(len(mask), np.int32)
            factor[: len(here), 0], owner[: len(here)] = factors[here], owners[here] - start
            found = program(params, point.lora, tokens, mask * factor)
            # Rows of a mesh come together on the device that adds them up.
            total = _add_rows(total, gathered(found.values, total.sharding), owner)
            stop_if_told()
            done += len(here)
            on_progress(int(done), of)
        ids, lengths = prompts.ids[start:stop], prompts.lengths[start:stop]
        lead(store.write, shard, total[: stop - start], ids=ids, lengths=lengths)
    return store


@partial(jax.jit, donate_argnums=0)
def _add_rows(total: Array, rows: Array, owners: Array) -> Array:
    """Adds `rows` `[B, k]` to their owners' rows of `total` `[n, k]`, one after the other: always the same bits."""
    return jax.lax.fori_loop(0, len(rows), lambda i, total: total.at[owners[i]].add(rows[i]), total)


def _weighted_rows(
    prompts: Encoded, samples: Samples, weights: Weights, gold: Encoded | None
) -> tuple[Encoded, np.ndarray, np.ndarray]:
    """Rows to compute, the prompts they belong to int `[rows]`, and what their summed losses count float32 `[rows]`."""
    rows, shape = replies(prompts, samples), samples.lengths.shape
    if weights.values.shape != shape or weights.gold.shape != shape[:1]:
        raise ValueError(f"weights have shapes {weights.values.shape} and {weights.gold.shape}; samples have {shape}")
    owners, factors = np.repeat(np.arange(shape[0]), shape[1]), weights.values.reshape(-1)
    if weights.gold.any():
        if gold is None or gold.ids != prompts.ids:
            raise ValueError("labels have weights; pass gold, the labels of the same prompts in the same order")
        rows, factors = join([rows, gold]), np.concatenate([factors, weights.gold])
        owners = np.concatenate([owners, np.arange(shape[0])])
    if weights.token_mean:
        factors = factors / (rows.lengths - rows.prompt_lengths).astype(np.float32)
    return rows, owners, factors
