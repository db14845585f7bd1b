"""Texts that begin alike, read in one pass: what they share goes through the network once.

Texts come as the trunks and chunks of `trees`. A token of a chunk sees the trunk and the tokens on its own way there,
and its position goes on from theirs, so that each text is read as if it stood alone (the tree attention of Miao et al.
2024, SpecInfer, arXiv 2305.09781, section 4.2). All products take trunks and chunks as one row of tokens. Attention
alone tells them apart: that of a token in a chunk is over its trunk and its chunk, whatever else is in the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duet_jax.curation.trees import plan
from duet_jax.kernels.linear_cross_entropy import token_log_probs
from duet_jax.models import llama
from duet_jax.models.attention import HIDDEN, causal_attention
from duet_jax.models.lora import Lora

# Places that meet the vocabulary at a time: a pass has few with a label.
CHUNK = 64


def read_ends(
    config: llama.LlamaConfig,
    params: llama.Params,
    lora: Lora | None,
    readout: Array,
    texts: Sequence[np.ndarray],
    groups: Sequence[int],
    labels: Sequence[int],
    *,
    pad_id: int,
    batch_tokens: int,
    compute_dtype: Any,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What is read off the hidden state at the last token of each text: linear functions, and a log-probability.

    Args:
      config: shape of the network.
      params: its parameters.
      lora: adapters, or None.
      readout: float32 `[K, hidden]`, multiplied with the final-norm hidden states.
      texts: n of them, int32 `[length]` each, at least one token.
      groups: n numbers; texts of a group are best those that begin alike.
      labels: n ids of tokens, whose log-probability after the text is wanted; -1 for none, which costs nothing.
      pad_id: fills rows.
      batch_tokens: of a pass, about; a longer text makes a pass by itself.
      compute_dtype: dtype of matrix products.
      mesh: where the parameters lie, or None for one device. A pass is not split over its devices: each of them reads
        the whole.

    Returns:
      float32 `[n, K]`, and float32 `[n]` in nats, 0 where there is no label.
    """
    read = compiled(config, compute_dtype, mesh)
    ids = np.asarray(labels, np.int32)
    found, log_probs = np.zeros((len(texts), len(readout)), np.float32), np.zeros(len(texts), np.float32)

    def take(numbers: np.ndarray, values: Array, of_labels: Array) -> None:
        found[numbers] = np.asarray(values)[: len(numbers)]
        log_probs[numbers] = np.asarray(of_labels)[: len(numbers)]

    # One pass is under way while the next is laid out: devices begin all that they are given, each with its memory.
    waiting: tuple[np.ndarray, Array, Array] | None = None
    for one in plan(texts, groups, batch_tokens, pad_id):
        own = np.full(len(one.places), -1, np.int32)
        own[: len(one.texts)] = ids[one.texts]
        values = read(params, lora, readout, *one[:-1], own)
        if waiting is not None:
            take(*waiting)
        waiting = one.texts, *values
    if waiting is not None:
        take(*waiting)
    return found, log_probs


@lru_cache(maxsize=8)
def compiled(
    config: llama.LlamaConfig, compute_dtype: Any, mesh: Mesh | None = None
) -> Callable[..., tuple[Array, Array]]:
    """Compiled reading of passes, for all models of a shape: `[E, K]` and `[E]`, whole on every device of a mesh."""
    whole: dict[str, Any] = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}

    @partial(jax.jit, **whole)
    def read(
        params: llama.Params,
        lora: Lora | None,
        readout: Array,
        trunks: Array,
        chunks: Array,
        positions: Array,
        last: Array,
        owners: Array,
        shared: Array,
        places: Array,
        labels: Array,
    ) -> tuple[Array, Array]:
        rows, length = trunks.shape
        beginning = trunks.size
        seen = visible(positions, last, shared, length, config.sliding_window)

        def attend(q: Array, k: Array, v: Array) -> Array:
            q_trunk, k_trunk, v_trunk = (x[0, :beginning].reshape(rows, length, *x.shape[2:]) for x in (q, k, v))
            mixed = causal_attention(q_trunk, k_trunk, v_trunk, config.sliding_window).reshape(1, -1, *q.shape[2:])
            if not chunks.size:
                return mixed
            q_own, k_own, v_own = (x[0, beginning:].reshape(*chunks.shape, *x.shape[2:]) for x in (q, k, v))
            keys = jnp.concatenate([k_trunk[owners], k_own], axis=1)
            values = jnp.concatenate([v_trunk[owners], v_own], axis=1)
            rest = _attention(q_own, keys, values, seen).reshape(1, -1, *q.shape[2:])
            return jnp.concatenate([mixed, rest], axis=1)

        place = jnp.broadcast_to(jnp.arange(length), trunks.shape)
        hidden = llama.hidden_states(
            config,
            params,
            jnp.concatenate([trunks.reshape(1, -1), chunks.reshape(1, -1)], axis=1),
            lora=lora,
            compute_dtype=compute_dtype,
            positions=jnp.concatenate([place.reshape(1, -1), positions.reshape(1, -1)], axis=1),
            attend=attend,
        )
        read = hidden[0, places]
        head = llama.output_head(params)
        log_probs = token_log_probs(read, head, labels, labels >= 0, chunk=CHUNK, compute_dtype=compute_dtype)
        return jnp.matmul(read, readout.T, precision=jax.lax.Precision.HIGHEST), log_probs

    return read


def visible(positions: Array, last: Array, shared: Array, length: int, window: int | None) -> Array:
    """What tokens of chunks see, bool `[C, Q, T + Q]`: of the trunk, and of their chunk, themselves included.

    Args:
      positions: int32 `[C, Q]`.
      last: int32 `[C, Q]`, see `Pass`.
      shared: int32 `[C]`, tokens of the trunk.
      length: T.
      window: positions that each one sees, itself included; None for all before it.
    """
    trunk, place = jnp.arange(length), jnp.arange(positions.shape[1])
    above = jnp.broadcast_to(trunk < shared[:, None, None], (*positions.shape, length))
    inside = (place <= place[:, None]) & (place[:, None] <= last[:, None, :])
    if window is not None:
        above &= positions[:, :, None] - trunk < window
        inside &= positions[:, :, None] - positions[:, None, :] < window
    # Padding sees itself at least, so that no softmax is empty.
    return jnp.concatenate([above, inside], axis=2)


def _attention(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Softmax attention, `[C, Q, N, H]` in the dtype of q; scores and softmax are float32.

    Args:
      q: `[C, Q, N, H]`; query head n reads key head `n // (N // K)`.
      k, v: `[C, S, K, H]`.
      seen: bool `[C, Q, S]`.
    """
    count, length, _, size = q.shape
    heads = k.shape[2]

    def dot(x: Array, y: Array, axis: int) -> Array:
        return jax.lax.dot_general(x, y, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)

    # The queries of a key head as one matrix.
    queries = q.reshape(count, length, heads, -1, size).transpose(0, 2, 3, 1, 4).reshape(count, heads, -1, size)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scores = dot(queries, keys, 3).reshape(count, heads, -1, *seen.shape[1:]) * size**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, HIDDEN), axis=-1)
    mixed = dot(weights.astype(v.dtype).reshape(*queries.shape[:3], -1), values, 2)
    mixed = mixed.reshape(count, heads, -1, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q.shape).astype(q.dtype)
