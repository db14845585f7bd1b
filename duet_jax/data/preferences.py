"""Pairs of responses to one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from duet_jax.data.batches import gather_batch
from duet_jax.data.domains import Domain, load_domains, load_examples
from duet_jax.data.tokenised import Encoded, join
from duet_jax.errors import DataError

if TYPE_CHECKING:
    from duet_jax.config import PairsConfig


@dataclass(frozen=True)
class Pairs:
    """Prompts with two responses each, in one order; `chosen` is the preferred one."""

    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def both(self) -> Encoded:
        """All chosen responses, then all rejected ones."""
        return join([self.chosen, self.rejected])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer one of each pair, int32 `[n]`."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def response_tokens(self) -> np.ndarray:
        """Scored tokens of both responses, int64 `[n, 2]`."""
        parts = (self.chosen, self.rejected)
        return np.stack([p.lengths.astype(np.int64) - np.maximum(p.prompt_lengths, 1) for p in parts], axis=1)

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, hexadecimal."""
        return self.both.digest


class PairBatch(NamedTuple):
    """Pairs of one length, ready for the device: the chosen response at 0 of the second axis, the rejected at 1.

    Attributes:
      tokens: int32 `[B, 2, T]`, right-padded.
      mask: bool `[B, 2, T]`, the tokens that are scored, see `Batch.loss_mask`.
      index: int32 `[B]`, number of the pair; -1 in rows of padding.
    """

    tokens: np.ndarray
    mask: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody calls here


def gather_pairs(pairs: Pairs, indices: np.ndarray, bucket_length: int, batch_size: int, pad_id: int) -> PairBatch:
    """Copies pairs into one padded batch; arguments and errors as of `gather_batch`."""
    parts = [gather_batch(part, indices, bucket_length, batch_size, pad_id) for part in (pairs.chosen, pairs.rejected)]
    return PairBatch(
        np.stack([part.tokens for part in parts], axis=1),
        np.stack([part.loss_mask for part in parts], axis=1),
        parts[0].index,
    )


def pair(chosen: Encoded, rejected: Encoded) -> Pairs:
    """Pairs of the examples that are in both, by id, in the order of `chosen`."""
    place = {identifier: row for row, identifier in enumerate(rejected.ids)}
    rows = [row for row, identifier in enumerate(chosen.ids) if identifier in place]
    return Pairs(chosen.take(rows), rejected.take([place[chosen.ids[row]] for row in rows]))


def differing(pairs: Pairs) -> Pairs:
    """The pairs whose responses are not the same, as cutting may have left them: no loss tells those two apart."""
    both = zip(pairs.chosen.tokens, pairs.rejected.tokens, strict=True)
    rows = [row for row, (one, other) in enumerate(both) if not np.array_equal(one, other)]
    return Pairs(pairs.chosen.take(rows), pairs.rejected.take(rows))


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, one after the other."""
    return Pairs(join([part.chosen for part in parts]), join([part.rejected for part in parts]))


def load_pairs(config: PairsConfig, seed: int) -> list[Domain]:
    """Reads the pairs and splits them into training and held-out ones.

    Args:
      config: where they are.
      seed: of subsamples, and of what is held out.

    Returns:
      The examples with the chosen responses and, where there is a column for them, those with the rejected ones: the
      same prompts and ids in the same order, named "chosen" and "rejected".

    Raises:
      DataError: as `load_examples`; or the two conversations of a row differ before their last reply.
    """
    chosen = replace(_split(config, config.chosen, seed), name="chosen")
    if config.rejected is None:
        return [chosen]
    rejected = replace(_split(config, config.rejected, seed), name="rejected")
    for one, other in zip((*chosen.train, *chosen.validation), (*rejected.train, *rejected.validation), strict=True):
        if one.prompt != other.prompt:
            raise DataError(
                f"domain 'pairs': the conversations '{config.chosen}' and '{config.rejected}' of '{one.id}' differ "
                f"before their last reply; both must answer the same prompt"
            )
    return [chosen, rejected]


def _split(config: PairsConfig, column: str, seed: int) -> Domain:
    most = config.validation_examples
    fraction = config.validation_fraction if config.validation is None else 0.0
    (found,) = load_domains([config.rows(column)], validation_fraction=fraction, seed=seed, validation_most=most)
    if config.validation is None or not most:
        return found
    rows = replace(config.rows(column), source=config.validation, split=config.validation_split, max_examples=most)
    return replace(found, validation=tuple(load_examples(rows, seed=seed)))
