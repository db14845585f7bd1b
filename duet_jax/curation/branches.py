"""Texts that begin alike, read in one pass: what they share goes through the network once.

A row holds what the texts of a group have in common, and after it the rest of each as a branch. A branch sees the
beginning and itself, and its positions go on where the beginning ends, so that each text is read as if it stood alone
(the tree attention of Miao et al. 2024, SpecInfer, arXiv 2305.09781, section 4.2, with one level of branches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.data import plan_forward
from duet_jax.models import llama
from duet_jax.models.lora import Lora

# Tokens of the shortest rows; longer ones are by factors of 2, between which `plan_forward` sets finer steps.
SHORTEST = 256
# Tokens of a row at most, where neither a text alone is longer nor more than half of it is shared: attention costs the
# square of them. A longer beginning is followed by as many tokens as it has itself, up to this number, so that a row
# has at most twice the tokens of its longest text, and at most this many more.
LONGEST = 1024
# Branches of a row: what is read off a row has a fixed size.
MOST_BRANCHES = 16
BEGINNING, PADDING = 0, -1


class Row(NamedTuple):
    """One row of a pass; T tokens, M branches.

    Attributes:
      tokens: int32 `[T]`.
      positions: int32 `[T]`, of each token in its text.
      branches: int32 `[T]`, `BEGINNING`, or from 1 the branch that a token belongs to.
      ends: int32 `[M]`, places of the branches' last tokens.
      texts: int64 `[M]`, numbers of their texts.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    ends: np.ndarray
    texts: np.ndarray


def rows_of(texts: Sequence[np.ndarray], groups: Sequence[int]) -> list[Row]:
    """Lays texts out in rows, those of a group together.

    Args:
      texts: int32 `[length]` each, at least one token.
      groups: which group each belongs to. Texts of a group share the tokens with which all of them begin, but for the
        last of the shortest: each branch has one token at least.
    """
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    return [row for numbers in members.values() for row in _of_group(texts, numbers)]


def _of_group(texts: Sequence[np.ndarray], numbers: list[int]) -> Iterator[Row]:
    shared = _shared([texts[number] for number in numbers])
    most = max(LONGEST, shared + min(shared, LONGEST))
    taken: list[int] = []
    size = shared
    for number in numbers:
        branch = len(texts[number]) - shared
        if taken and (size + branch > most or len(taken) == MOST_BRANCHES):
            yield _row(texts, taken, shared)
            taken, size = [], shared
        taken.append(number)
        size += branch
    yield _row(texts, taken, shared)


def _shared(texts: Sequence[np.ndarray]) -> int:
    most = min(map(len, texts)) - 1
    same = np.all([text[:most] == texts[0][:most] for text in texts], axis=0)
    return most if same.all() else int(same.argmin())


def _row(texts: Sequence[np.ndarray], numbers: list[int], shared: int) -> Row:
    rests = [texts[number][shared:] for number in numbers]
    sizes = np.array([shared, *map(len, rests)])
    return Row(
        tokens=np.concatenate([texts[numbers[0]][:shared], *rests]).astype(np.int32),
        positions=np.concatenate([np.arange(shared), *(shared + np.arange(len(rest)) for rest in rests)]),
        branches=np.repeat(np.arange(len(sizes)), sizes),
        ends=np.cumsum(sizes)[1:] - 1,
        texts=np.array(numbers),
    )


def read_ends(
    config: llama.LlamaConfig,
    params: llama.Params,
    lora: Lora | None,
    readout: Array,
    texts: Sequence[np.ndarray],
    groups: Sequence[int],
    *,
    pad_id: int,
    batch_tokens: int,
    compute_dtype: Any,
) -> np.ndarray:
    """Linear functions of the hidden state at the last token of each text.

    Args:
      config: shape of the network.
      params: its parameters.
      lora: adapters, or None.
      readout: float32 `[K, hidden]`, multiplied with the final-norm hidden states.
      texts: n of them, int32 `[length]` each, at least one token.
      groups: n numbers; texts of a group are best those that begin alike.
      pad_id: fills rows.
      batch_tokens: of a pass, about; a longer row makes a pass by itself.
      compute_dtype: dtype of matrix products.

    Returns:
      float32 `[n, K]`.
    """
    rows = rows_of(texts, groups)
    read = compiled(config, compute_dtype)
    lengths = [len(row.tokens) for row in rows]
    buckets = [SHORTEST]
    while buckets[-1] < max(lengths, default=0):
        buckets.append(2 * buckets[-1])
    pending = []
    for length, size, numbers in plan_forward(lengths, buckets, max(batch_tokens // buckets[-1], 1)):
        chosen = [rows[number] for number in numbers]
        tokens, positions, branches = (
            _padded([getattr(row, name) for row in chosen], (size, length), value)
            for name, value in (("tokens", pad_id), ("positions", 0), ("branches", PADDING))
        )
        ends = _padded([row.ends for row in chosen], (size, MOST_BRANCHES), 0)
        pending.append((chosen, read(params, lora, readout, tokens, positions, branches, ends)))
    found = np.zeros((len(texts), len(readout)), np.float32)
    for chosen, values in pending:
        for row, own in zip(chosen, np.asarray(values), strict=False):
            found[row.texts] = own[: len(row.texts)]
    return found


def _padded(arrays: Sequence[np.ndarray], shape: tuple[int, int], value: int) -> np.ndarray:
    whole = np.full(shape, value, np.int32)
    for row, array in zip(whole, arrays, strict=False):
        row[: len(array)] = array
    return whole


@lru_cache(maxsize=8)
def compiled(config: llama.LlamaConfig, compute_dtype: Any) -> Callable[..., Array]:
    """Compiled reading of rows, for all models of a shape: `[rows, MOST_BRANCHES, K]`."""

    @jax.jit
    def read(
        params: llama.Params,
        lora: Lora | None,
        readout: Array,
        tokens: Array,
        positions: Array,
        branches: Array,
        ends: Array,
    ) -> Array:
        seen = visible(positions, branches, config.sliding_window)[:, None]
        hidden = llama.hidden_states(
            config,
            params,
            tokens,
            lora=lora,
            compute_dtype=compute_dtype,
            positions=positions,
            attend=lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen),
        )
        last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
        return jnp.matmul(last, readout.T, precision=jax.lax.Precision.HIGHEST)

    return read


def visible(positions: Array, branches: Array, window: int | None) -> Array:
    """Which tokens each token sees, bool `[B, T, T]`: those before it in its text, and itself.

    Args:
      positions: int32 `[B, T]`.
      branches: int32 `[B, T]`, see `Row`.
      window: positions that each one sees, itself included; None for all before it.
    """
    place = jnp.arange(positions.shape[1])
    mine, other = branches[:, :, None], branches[:, None, :]
    seen = (place[:, None] >= place) & ((other == BEGINNING) | (other == mine))
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    # Padding sees itself at least, so that no softmax is empty.
    return seen | (place[:, None] == place)
