"""Batches of a few fixed shapes: examples grouped by length, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from duet_jax.data.tokenised import Encoded


class Batch(NamedTuple):
    """Rows of one length, ready for the device.

    Attributes:
      tokens: int32 [B, T], right-padded.
      loss_mask: bool [B, T]; True where the token is predicted, that is, where it belongs to the
        response (or the end of text) and something stands before it. Its log-probability comes from
        the logits at t - 1.
      index: int32 [B], row in the `Encoded`; -1 in rows of padding.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody calls here


def plan_batches(
    lengths: np.ndarray | Sequence[int],
    buckets: Sequence[int],
    batch_size: int,
    *,
    rng: np.random.Generator | None = None,
) -> list[tuple[int, np.ndarray]]:
    """Groups examples into batches by length, each example in exactly one.

    An example goes to the smallest bucket that holds it. What does not fill a batch of its bucket is
    promoted to the next larger one, so that at most one batch has fewer than `batch_size` examples;
    that one gets the smallest bucket that holds it.

    Args:
      lengths: tokens of each example, [n].
      buckets: allowed batch lengths, in any order.
      batch_size: examples a batch.
      rng: shuffles which examples share a batch, and the batches; None keeps both in order.

    Returns:
      Pairs of a bucket length and the examples' indices, int32 [at most batch_size].

    Raises:
      ValueError: no or non-positive buckets, `batch_size` below 1, or an example longer than the
        largest bucket.
    """
    sizes = np.unique(np.asarray(buckets, np.int64))
    lengths = np.asarray(lengths, np.int64)
    if sizes.size == 0 or sizes[0] < 1:
        raise ValueError(f"buckets must be one or more positive lengths, not {list(buckets)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if lengths.size and lengths.max() > sizes[-1]:
        raise ValueError(
            f"example {lengths.argmax()} has {lengths.max()} tokens, more than the largest bucket "
            f"{sizes[-1]} holds; max_length must not exceed the largest bucket"
        )
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    place = np.searchsorted(sizes, lengths)[order]
    grouped = order[np.argsort(place, kind="stable")].astype(np.int32)
    ends = np.searchsorted(np.sort(place), np.arange(len(sizes)), side="right")
    plan = []
    waiting = grouped[:0]
    for size, start, end in zip(sizes.tolist(), [0, *ends[:-1]], ends, strict=True):
        waiting = np.concatenate([waiting, grouped[start:end]])
        whole = len(waiting) - len(waiting) % batch_size
        plan += [(size, waiting[i : i + batch_size]) for i in range(0, whole, batch_size)]
        waiting = waiting[whole:]
    if len(waiting):
        plan.append((int(sizes[np.searchsorted(sizes, lengths[waiting].max())]), waiting))
    return plan if rng is None else [plan[i] for i in rng.permutation(len(plan))]


def gather_batch(encoded: Encoded, indices: np.ndarray, bucket_length: int, batch_size: int, pad_id: int) -> Batch:
    """Copies examples into one padded batch of shape [batch_size, bucket_length].

    Args:
      encoded: the examples.
      indices: which of them, [at most batch_size]; the remaining rows are padding and predict nothing.
      bucket_length: T; no example of the batch may be longer.
      batch_size: B.
      pad_id: fills the rows after their examples.

    Raises:
      ValueError: too many indices, or an example longer than `bucket_length`.
    """
    if len(indices) > batch_size:
        raise ValueError(f"{len(indices)} examples do not fit a batch of {batch_size}")
    tokens = np.full((batch_size, bucket_length), pad_id, np.int32)
    loss_mask = np.zeros((batch_size, bucket_length), np.bool_)
    index = np.full(batch_size, -1, np.int32)
    index[: len(indices)] = indices
    for row, example in enumerate(indices):
        ids = encoded.tokens[example]
        if len(ids) > bucket_length:
            raise ValueError(f"example {example} has {len(ids)} tokens and does not fit a bucket of {bucket_length}")
        tokens[row, : len(ids)] = ids
        loss_mask[row, max(int(encoded.prompt_lengths[example]), 1) : len(ids)] = True
    return Batch(tokens, loss_mask, index)
