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
    sizes, lengths = _sizes(lengths, buckets, batch_size), np.asarray(lengths, np.int64)
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


def plan_forward(
    lengths: np.ndarray | Sequence[int], buckets: Sequence[int], batch_size: int, multiple: int = 1
) -> list[tuple[int, int, np.ndarray]]:
    """Groups examples into batches of about as many tokens each, for passes that are not differentiated.

    Examples come longest first, so that those of a batch have about the same length; the steps from bucket to bucket
    are quartered, so that less is padding; and each batch has the tokens of `batch_size` examples of the largest
    bucket. Only the last batch, of the shortest, has rows of padding; where one is enough for all, it has as many rows
    as the next power of two.

    Args:
      lengths: tokens of each example, [n].
      buckets: lengths of batches in training, in any order.
      batch_size: examples of the largest bucket that a batch holds.
      multiple: batches have a multiple of so many rows, one or more for each device: rounded down, or so many at least.

    Returns:
      A batch length, the rows that the batch has with those of padding, and the examples' indices, int32 [at most so
      many rows], for each batch.

    Raises:
      ValueError: as for `plan_batches`.
    """
    sizes, lengths = _sizes(lengths, buckets, batch_size), np.asarray(lengths, np.int64)
    below = np.concatenate([[0], sizes[:-1]])
    finer = np.unique(below + -(-(sizes - below) * np.arange(1, 5)[:, None] // 4))
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    plan: list[tuple[int, int, np.ndarray]] = []
    first = 0
    while first < len(order):
        length = int(finer[np.searchsorted(finer, lengths[order[first]])])
        size = max(batch_size * int(sizes[-1]) // length // multiple, 1) * multiple
        plan.append((length, size, order[first : first + size]))
        first += size
    if len(plan) == 1:
        length, size, rows = plan[0]
        enough = -(-(1 << (len(rows) - 1).bit_length()) // multiple) * multiple
        plan = [(length, min(size, enough), rows)]
    return plan


def _sizes(lengths: np.ndarray | Sequence[int], buckets: Sequence[int], batch_size: int) -> np.ndarray:
    """The buckets in order, int64 [n], if they hold all examples."""
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
    return sizes


def gather_batch(
    encoded: Encoded,
    indices: np.ndarray,
    bucket_length: int,
    batch_size: int,
    pad_id: int,
    held: np.ndarray | None = None,
) -> Batch:
    """Copies examples into one padded batch of shape [batch_size, bucket_length].

    Args:
      encoded: the examples.
      indices: which of them, [at most batch_size]; the remaining rows are padding and predict nothing.
      bucket_length: T; no example of the batch may be longer.
      batch_size: B.
      pad_id: fills the rows after their examples.
      held: bool [batch_size], rows that are read; the others are as padding, but have their index. None: all.

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
        if held is not None and not held[row]:
            continue
        ids = encoded.tokens[example]
        if len(ids) > bucket_length:
            raise ValueError(f"example {example} has {len(ids)} tokens and does not fit a bucket of {bucket_length}")
        tokens[row, : len(ids)] = ids
        loss_mask[row, max(int(encoded.prompt_lengths[example]), 1) : len(ids)] = True
    return Batch(tokens, loss_mask, index)
