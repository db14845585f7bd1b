"""A trained model as an unseen task meets it: it scores responses, answers prompts and can be exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from duet_jax import models
from duet_jax.data import Encoded, Example, encode, encode_prompts, plan_forward
from duet_jax.distributed.place import row_parts, to_host
from duet_jax.distributed.processes import lead
from duet_jax.errors import DataError
from duet_jax.feedback.likelihood import Score, response_log_probs, scorer
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.generate import Samples, generate
from duet_jax.models.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """Compiled scoring and generation, shared by all models of one shape, so by all rounds of a study.

    Attributes:
      model: the base model; its tokenizer and its shape count here.
      chat: whether prompts go through the chat template.
      buckets: lengths that batches are padded to, ascending; the last is the longest sequence.
      compute_dtype: dtype of matrix products.
      mesh: rows are spread over its devices, where models' parameters lie; None for one device.
    """

    model: models.Model
    chat: bool
    buckets: tuple[int, ...]
    compute_dtype: Any = jnp.float32
    mesh: Mesh | None = None

    def encode(self, examples: Sequence[Example], name: str) -> Encoded:
        """Prompts and responses as token ids, cut to the longest bucket."""
        return encode(examples, self.model.tokenizer, chat=self.chat, max_length=self.buckets[-1], name=name)

    def encode_prompts(self, examples: Sequence[Example]) -> Encoded:
        """Prompts alone as token ids, cut at their beginning to the longest bucket."""
        return encode_prompts(examples, self.model.tokenizer, chat=self.chat, max_length=self.buckets[-1])

    def require_room(self, prompts: Encoded, max_new_tokens: int, name: str) -> None:
        """Raises a DataError if prompts and replies of so many tokens do not fit the model's context."""
        longest, most = int(max(prompts.lengths, default=0)), self.model.config.max_length
        if longest + max_new_tokens > most:
            raise DataError(
                f"{name}: a prompt of {longest} tokens and an answer of up to {max_new_tokens} are more than the "
                f"{most} tokens that the model takes; lower max_new_tokens or data.max_length."
            )

    @cached_property
    def score(self) -> Score:
        """Compiled summed log-probabilities of responses."""
        return scorer(self.model.config, self.compute_dtype, self.mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class Deployed:
    """One trained model, made of what was trained and the study's engine.

    Attributes:
      engine: compiled functions and the tokenizer.
      params: parameters of the network.
      lora: adapters on them, or None.
    """

    engine: Engine
    params: llama.Params
    lora: adapters.Lora | None = None

    def log_probs(self, encoded: Encoded, batch_size: int) -> np.ndarray:
        """Summed log-probability of each response with its end of text, float64 `[n]`, nats."""
        engine = self.engine
        plan = plan_forward(encoded.lengths, engine.buckets, batch_size, row_parts(engine.mesh))
        sums, pad_id = np.zeros(len(encoded)), engine.model.tokenizer.pad_id
        rows = np.concatenate([np.zeros(0, np.int32), *(rows for _, _, rows in plan)])
        sums[rows] = response_log_probs(engine.score, self.params, self.lora, encoded, plan, pad_id, engine.mesh)
        return sums

    def sample(
        self,
        prompts: Encoded,
        sampling: Sampling,
        *,
        samples: int,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
        stop_strings: Sequence[str] = (),
        on_progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Samples:
        """Replies to encoded prompts, in the prompts' order, `batch_size` at a time; see `models.generate`."""
        return generate(
            self.engine.model.config,
            self.params,
            self.lora,
            prompts.tokens,
            self.engine.model.tokenizer,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            buckets=self.engine.buckets,
            rows=batch_size,
            samples=samples,
            stop_strings=stop_strings,
            seed=seed,
            compute_dtype=self.engine.compute_dtype,
            mesh=self.engine.mesh,
            on_progress=on_progress,
        )

    def answer(
        self, prompts: Encoded, max_new_tokens: int, batch_size: int, stop_strings: Sequence[str] = ()
    ) -> list[str]:
        """Greedy replies to encoded prompts, as text without special tokens, in the prompts' order."""
        found = self.sample(
            prompts,
            GREEDY,
            samples=1,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=0,
            stop_strings=stop_strings,
        )
        return [texts[0] for texts in found.texts]

    def export(self, folder: str | Path) -> Path:
        """Writes the trained model, adapters merged, as a Hugging Face folder, and returns its path."""
        params = self.params if self.lora is None else adapters.merge(self.params, self.lora)
        base, params = self.engine.model, to_host(params)
        lead(lambda: models.save(dataclasses.replace(base, params=params, source=str(folder)), folder))
        return Path(folder)
