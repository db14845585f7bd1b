"""Log-likelihoods of continuations, and whether greedy decoding would write them, batched by length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from duet_jax.data import Encoded, gather_batch, plan_batches
from duet_jax.distributed.place import map_rows, readable, row_parts
from duet_jax.feedback.deployed import Deployed
from duet_jax.kernels.linear_cross_entropy import dot, token_predictions
from duet_jax.models import llama
from duet_jax.models.lora import Lora

Score = Callable[[llama.Params, Lora | None, ArrayLike, ArrayLike, ArrayLike, ArrayLike], tuple[Array, Array]]


@lru_cache(maxsize=8)
def make_score(config: llama.LlamaConfig, compute_dtype: Any, mesh: Mesh | None) -> Score:
    """A compiled scorer of continuations that may share everything but their last token.

    Args:
      config: static shape of the network.
      compute_dtype: dtype of matrix products.
      mesh: rows are spread over its devices; None for one device.

    Returns:
      A function of parameters, adapters (or None), tokens int32 `[B, T]` padded on the right, which of them belong to
      the continuation bool `[B, T]`, lengths int32 `[B]`, and candidates for the next token int32 `[B, C]`. It gives
      the log-likelihood float32 `[B, C]`, nats, of the continuation with each candidate after it, and whether every
      one of its tokens, the candidate included, is the likeliest there, bool `[B, C]`.
    """

    @jax.jit
    def score(
        params: llama.Params, lora: Lora | None, tokens: Array, mask: Array, lengths: Array, candidates: Array
    ) -> tuple[Array, Array]:
        hidden = llama.hidden_states(config, params, tokens, lora=lora, compute_dtype=compute_dtype, mesh=mesh)

        def of_rows(
            hidden: Array, tokens: Array, mask: Array, lengths: Array, candidates: Array, head: Array
        ) -> tuple[Array, Array]:
            log_probs, best = token_predictions(
                hidden[:, :-1].reshape(-1, hidden.shape[-1]),
                head,
                tokens[:, 1:].reshape(-1),
                mask[:, 1:].reshape(-1),
                compute_dtype=compute_dtype,
            )
            before, shape = jnp.sum(log_probs.reshape(mask[:, 1:].shape), axis=1), mask[:, 1:].shape
            last = hidden[jnp.arange(len(lengths)), lengths - 1]
            logits = jax.nn.log_softmax(dot(last, head, (1, 1), compute_dtype), axis=-1)
            after = jnp.take_along_axis(logits, candidates, axis=1)
            greedy = jnp.all(best.reshape(shape), axis=1)[:, None] & (jnp.argmax(logits, axis=1)[:, None] == candidates)
            return before[:, None] + after, greedy

        return map_rows(mesh, of_rows, (hidden, tokens, mask, lengths, candidates), (llama.output_head(params),))

    return score


def score_continuations(
    model: Deployed, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """Scores continuations as the harness wants them.

    Pairs that differ in nothing but the last token, as the answers A to D of a question do, take one row together.
    A pair longer than the engine's longest bucket allows loses tokens at the beginning of its context.

    Args:
      model: what is scored.
      pairs: token ids of a context, at least one, and of its continuation, at least one.
      batch_size: rows in a forward pass; rounded up so that all devices have as many.

    Returns:
      Of each pair its log-likelihood in nats, and whether the continuation is what greedy decoding would write.
    """
    engine = model.engine
    longest = engine.buckets[-1]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        groups[tuple(context), tuple(continuation[:-1])].append(i)
    rows = [np.array([*context, *before][-longest:], np.int32) for context, before in groups]
    starts = [len(row) - len(before) for row, (_, before) in zip(rows, groups, strict=True)]
    members = list(groups.values())
    width = 1
    while width < max(map(len, members), default=1):
        width *= 4  # few widths, so few programs
    candidates = np.zeros((len(rows), width), np.int32)
    for row, group in enumerate(members):
        candidates[row, : len(group)] = [pairs[i][1][-1] for i in group]
    encoded = Encoded(tuple(rows), np.array(starts, np.int32), tuple(map(str, range(len(rows)))))
    batch_size = -(-batch_size // row_parts(engine.mesh)) * row_parts(engine.mesh)
    score = make_score(engine.model.config, engine.compute_dtype, engine.mesh)
    pending = []
    for length, chosen in plan_batches(encoded.lengths, engine.buckets, batch_size):
        batch = gather_batch(encoded, chosen, length, batch_size, engine.model.tokenizer.pad_id)
        lengths, last = np.ones(batch_size, np.int32), np.zeros((batch_size, candidates.shape[1]), np.int32)
        lengths[: len(chosen)], last[: len(chosen)] = encoded.lengths[chosen], candidates[chosen]
        pending.append((chosen, score(model.params, model.lora, batch.tokens, batch.loss_mask, lengths, last)))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for chosen, results in pending:
        values, greedy = jax.device_get(readable(results))
        for i, row in enumerate(chosen):
            for j, pair in enumerate(members[row]):
                found[pair] = float(values[i, j]), bool(greedy[i, j])
    return found
