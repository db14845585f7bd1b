"""Log-probabilities of responses: forward passes alone, in batches of about as many tokens each.

Counted for a token of SmolLM2-135M, a prediction takes 212 million operations in the layers and 57 million in the
output head. Prompts need no head and padding needs nothing: the head meets tokens of responses alone, and batches are
padded in finer steps than those of training (`plan_forward`). Nothing of the size `[tokens, vocab]` is made. In the
last layer, positions of the prompt need only keys and values; that is less than a thirtieth of the work, and left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from duet_jax.data import Encoded, gather_batch
from duet_jax.distributed.place import held_rows, map_rows, own_rows, readable
from duet_jax.distributed.processes import stop_if_told
from duet_jax.kernels import linear_cross_entropy
from duet_jax.models import llama
from duet_jax.models import lora as adapters

# (params, lora, tokens int32 [B, T], mask bool [B, T]) to summed log-probabilities float32 [B], nats.
Score = Callable[[llama.Params, adapters.Lora | None, Any, Any], Array]


@lru_cache(maxsize=16)
def scorer(config: llama.LlamaConfig, compute_dtype: Any, mesh: Mesh | None = None) -> Score:
    """A compiled `Score` of a shape of network, one for all who ask for it; rows are spread over a mesh."""

    @jax.jit
    def score(params: llama.Params, lora: adapters.Lora | None, tokens: Array, mask: Array) -> Array:
        hidden = llama.hidden_states(config, params, tokens, lora=lora, compute_dtype=compute_dtype, mesh=mesh)

        def of_rows(hidden: Array, tokens: Array, mask: Array, head: Array) -> Array:
            return linear_cross_entropy.response_log_probs(hidden, head, tokens, mask, compute_dtype)

        return map_rows(mesh, of_rows, (hidden, tokens, mask), (llama.output_head(params),))

    return score


def response_log_probs(
    score: Score,
    params: llama.Params,
    lora: adapters.Lora | None,
    encoded: Encoded,
    plan: Sequence[tuple[int, int, np.ndarray]],
    pad_id: int,
    mesh: Mesh | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Summed log-probability of each response with its end of text, float64, nats, in the order of the plan.

    Args:
      score: see `scorer`.
      params, lora: of the model.
      encoded: prompts and responses.
      plan: batches of some of them, see `plan_forward`.
      pad_id: id of padding.
      mesh: the scorer's.
      on_batch: is given the number of examples of each finished batch; the device is then at the next one.
    """
    found: list[np.ndarray] = []
    waiting: tuple[int, Array] | None = None

    def take(count: int, values: Array) -> None:
        found.append(np.asarray(values)[:count].astype(np.float64))
        on_batch(count)

    for length, size, rows in plan:
        batch = gather_batch(encoded, rows, length, size, pad_id, held_rows(mesh, size))
        values = readable(score(params, lora, *own_rows((batch.tokens, batch.loss_mask), mesh)))
        stop_if_told()
        if waiting is not None:
            take(*waiting)
        waiting = len(rows), values
    if waiting is not None:
        take(*waiting)
    return np.concatenate([np.zeros(0), *found])


def response_tokens(encoded: Encoded) -> np.ndarray:
    """Number of scored tokens of each example: the response and its end of text, int64 `[n]`."""
    return encoded.lengths.astype(np.int64) - np.maximum(encoded.prompt_lengths, 1)
