"""A few numbers read off the last token of each text, in batches of few shapes: what models that judge need."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import count, takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax import models
from duet_jax.data import Encoded, gather_batch, plan_batches
from duet_jax.errors import FeedbackError
from duet_jax.models import llama

# Shorter batches save little.
_SHORTEST = 64


def resident_dtype(dtype: str) -> Any:
    """What to keep parameters in that are only multiplied with, in `dtype`."""
    # XLA's CPU compiler widens whole stacks of bfloat16 before it slices a layer, so there float32 is smaller.
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Readout:
    """Linear functions of a model's hidden state at one token of each text.

    Attributes:
      model: the model.
      rows: float32 `[K, hidden]`, multiplied with the final-norm hidden state.
      batch_size: texts in a forward pass.
      compute_dtype: dtype of the model's matrix products.
    """

    model: models.Model
    rows: Array
    batch_size: int
    compute_dtype: Any

    def __call__(self, encoded: Encoded, places: Sequence[int]) -> np.ndarray:
        """Float32 `[n, K]`, at the token that `places` numbers, from 0, in each of n texts.

        Raises:
          FeedbackError: a text is longer than the model takes. None is cut: what is judged is the whole.
        """
        longest = self.model.config.max_length
        for identifier, length in zip(encoded.ids, encoded.lengths, strict=True):
            if length > longest:
                raise FeedbackError(
                    f"Example {identifier} and its reply are {length} tokens for {self.model.source}, which takes at "
                    f"most {longest}; allow shorter replies, leave the example out, or use another model."
                )
        read, pending = compiled(self.model.config, self.compute_dtype), []
        for length, rows in plan_batches(encoded.lengths, self._buckets, self.batch_size):
            batch = gather_batch(encoded, rows, length, self.batch_size, self.model.tokenizer.pad_id)
            place = np.zeros(self.batch_size, np.int32)
            place[: len(rows)] = np.asarray(places)[rows]
            pending.append((rows, read(self.model.params, self.rows, batch.tokens, place)))
        found = np.zeros((len(encoded), len(self.rows)), np.float32)
        for rows, values in pending:
            found[rows] = np.asarray(values)[: len(rows)]
        return found

    @cached_property
    def identity(self) -> str:
        """All that decides what is read of a text: parameters, tokenizer, chat template and precision."""
        tokenizer = self.model.tokenizer
        text = f"{tokenizer.backend.to_str()} {tokenizer.chat_template} {tokenizer.add_bos}"
        return f"{self.model.fingerprint} {hashlib.sha256(text.encode()).hexdigest()} {self.compute_dtype}"

    @cached_property
    def _buckets(self) -> list[int]:
        longest = self.model.config.max_length
        return [*takewhile(lambda length: length < longest, (_SHORTEST << i for i in count())), longest]


@lru_cache(maxsize=8)
def compiled(config: llama.LlamaConfig, compute_dtype: Any) -> Any:
    """Compiled `(params, rows [K, hidden], tokens [B, T], place [B]) -> float32 [B, K]` for all models of a shape."""

    @jax.jit
    def read(params: llama.Params, rows: Array, tokens: Array, place: Array) -> Array:
        hidden = llama.hidden_states(config, params, tokens, compute_dtype=compute_dtype)
        return jnp.matmul(hidden[jnp.arange(len(place)), place], rows.T, precision=jax.lax.Precision.HIGHEST)

    return read
