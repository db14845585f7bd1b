"""Greedy generation: one prefill, then one compiled loop over a static key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from duet_jax.models.llama import LlamaConfig, Params, decode, frozen, output_head, prefill
from duet_jax.models.lora import Lora

Generate = Callable[[Params, Lora | None, ArrayLike, ArrayLike], tuple[Array, Array]]


def make_generate(
    config: LlamaConfig,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    compute_dtype: Any = jnp.float32,
) -> Generate:
    """A compiled greedy decoder; it compiles once for each shape of prompts.

    Args:
      config: static shape of the network.
      max_new_tokens: most tokens a reply can have; the loop ends earlier when every row has stopped.
      stop_ids: ids that end a reply.
      pad_id: id that fills a row after its end.
      compute_dtype: dtype of matrix products.

    Returns:
      A function of parameters, adapters (or None), prompts int32 `[B, T]` padded on the right, and their
      lengths int32 `[B]` (each at least 1). It gives new ids int32 `[B, max_new_tokens]` and how many of them
      are the reply, int32 `[B]`, the stop token not counted.
    """
    stops = jnp.asarray(tuple(stop_ids), jnp.int32)

    @jax.jit
    def generate(params: Params, lora: Lora | None, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        rows, width = tokens.shape
        params, head = frozen(params, compute_dtype), output_head(params)

        def best_token(hidden: Array) -> Array:
            logits = jax.lax.dot_general(
                hidden.astype(compute_dtype),
                head.astype(compute_dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def unfinished(state: tuple) -> Array:
            step, stopped = state[0], state[1]
            return (step < max_new_tokens) & ~jnp.all(stopped)

        def extend(state: tuple) -> tuple:
            step, stopped, token, ids, count, cache = state
            stopped |= jnp.any(token[:, None] == stops[None, :], axis=1)
            ids = ids.at[:, step].set(jnp.where(stopped, pad_id, token))
            count = count + ~stopped
            hidden, cache = decode(config, params, token, lengths + step, cache, lora=lora, compute_dtype=compute_dtype)
            return step + 1, stopped, best_token(hidden), ids, count, cache

        hidden, cache = prefill(
            config,
            params,
            tokens,
            cache_length=width + max_new_tokens,
            lora=lora,
            compute_dtype=compute_dtype,
        )
        first = best_token(hidden[jnp.arange(rows), lengths - 1])
        ids = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
        nothing = jnp.zeros(rows, jnp.int32)
        start = (jnp.zeros((), jnp.int32), nothing > 0, first, ids, nothing, cache)
        _, _, _, ids, count, _ = jax.lax.while_loop(unfinished, extend, start)
        return ids, count

    return generate
