"""A model that is asked about data: it writes answers, says which option it takes, and how probable a text is."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation.branches import read_ends
from duet_jax.data import Encoded, Example, encode, encode_prompts
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback import Deployed
from duet_jax.feedback.likelihood import response_tokens
from duet_jax.models import llama
from duet_jax.models.sampling import GREEDY, Sampling


class Respondent(Protocol):
    """Whatever can be asked."""

    @property
    def identity(self) -> Any:
        """What decides what it thinks of a text, as values of JSON."""
        ...

    @property
    def writing(self) -> Any:
        """What decides its answers besides, as values of JSON."""
        ...

    def check(self, examples: Sequence[Example], *, writes: bool) -> None:
        """Raises a DataError where a prompt, with room for an answer where it `writes` one, is more than it takes."""
        ...

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of the prompts."""
        ...

    def answers(self, examples: Sequence[Example], samples: int) -> list[list[str]]:
        """So many sampled answers to each prompt, or with 0 the greedy one."""
        ...

    def options(self, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str]) -> np.ndarray:
        """Probabilities float64 `[questions, words]`, among the words, that the answer begins with each."""
        ...

    def log_probs(self, examples: Sequence[Example]) -> np.ndarray:
        """Log-probability of each response and its scored tokens, float64 `[n, 2]`, NaN where it cannot be had."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRespondent:
    """Our own model. Nothing that it reads is cut: what does not fit its context is refused.

    Attributes:
      model: what is asked.
      fingerprint: of its parameters, adapters included.
      config: how answers are sampled, and how much is done at a time.
      seed: of sampled answers. The random numbers of an answer depend on it, on the prompt and on the answer's number.
    """

    model: Deployed
    fingerprint: str
    config: ConfidenceConfig
    seed: int

    @cached_property
    def identity(self) -> list[Any]:
        """What decides what it thinks of a text, as values of JSON."""
        engine = self.model.engine
        tokenizer = engine.model.tokenizer
        vocabulary = repr((tokenizer.eos_ids, tokenizer.token_bytes, tokenizer.chat_template, tokenizer.add_bos))
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        return [self.fingerprint, digest, engine.chat, str(jnp.dtype(engine.compute_dtype))]

    @property
    def writing(self) -> list[Any]:
        """What decides its answers besides, as values of JSON."""
        return [self.config.max_new_tokens, self.config.temperature, list(self.config.stop), self.seed]

    def check(self, examples: Sequence[Example], *, writes: bool) -> None:
        """Raises a DataError where a prompt, with room for an answer where it `writes` one, is more than it takes."""
        longest, new_tokens = self.model.engine.model.config.max_length, self.config.max_new_tokens if writes else 0
        for example, length in zip(examples, self.sizes(examples), strict=True):
            if length + new_tokens > longest:
                after = f" with {new_tokens} tokens after it" if new_tokens else ""
                raise DataError(
                    f"example '{example.id}': a question about it has {length} tokens, which{after} are more than the "
                    f"{longest} that the model takes; leave it out, or shorten the templates."
                )

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of the prompts."""
        return self._encode(examples).lengths.tolist()

    def answers(self, examples: Sequence[Example], samples: int) -> list[list[str]]:
        """So many sampled answers to each prompt, or with 0 the greedy one; equal prompts get the same ones."""
        encoded = self._encode(examples)
        first = {tokens.tobytes(): row for row, tokens in reversed(list(enumerate(encoded.tokens)))}
        rows = sorted(first.values())
        found = self._wide(encoded).sample(
            encoded.take(rows),
            Sampling(self.config.temperature) if samples else GREEDY,
            samples=max(samples, 1),
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            seed=self.seed,
            stop_strings=self.config.stop,
        )
        texts = dict(zip(rows, found.texts, strict=True))
        return [list(texts[first[tokens.tobytes()]]) for tokens in encoded.tokens]

    def options(self, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str]) -> np.ndarray:
        """Probabilities float64 `[questions, words]`, among the words, that the answer begins with each.

        Only the first token of a word is looked at.

        Raises:
          DataError: a question is longer than the model takes.
          ModelError: two words begin with the same token.
        """
        self.check(questions, writes=False)
        engine, base = self.model.engine, self.model.engine.model
        first = [ids[0] for ids in base.tokenizer.encode_batch(list(words)) if ids]
        if len(set(first)) < len(words):
            raise ModelError(
                f"{base.source} cannot choose between {', '.join(words)}: its tokenizer begins them with the ids "
                f"{first}, which must all differ."
            )
        logits = read_ends(
            base.config,
            self.model.params,
            self.model.lora,
            llama.output_head(self.model.params)[np.array(first)].astype(jnp.float32),
            self._encode(questions).tokens,
            groups,
            pad_id=base.tokenizer.pad_id,
            batch_tokens=self.config.batch_tokens,
            compute_dtype=engine.compute_dtype,
        ).astype(float)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return odds / odds.sum(axis=1, keepdims=True)

    def log_probs(self, examples: Sequence[Example]) -> np.ndarray:
        """Log-probability of each response with its end of text in nats, and its scored tokens, float64 `[n, 2]`.

        NaN where the prompt leaves no room for any token of the response.
        """
        engine = self.model.engine
        numbered = [dataclasses.replace(example, id=str(row)) for row, example in enumerate(examples)]
        longest = engine.model.config.max_length
        encoded = encode(numbered, engine.model.tokenizer, chat=engine.chat, max_length=longest)
        model = self._wide(encoded)
        batch_size = max(self.config.batch_tokens // model.engine.buckets[-1], 1)
        found = np.full((len(examples), 2), np.nan)
        rows = [int(identifier) for identifier in encoded.ids]
        found[rows] = np.stack([model.log_probs(encoded, batch_size), response_tokens(encoded)], axis=1)
        return found

    def _encode(self, examples: Sequence[Example]) -> Encoded:
        engine = self.model.engine
        return encode_prompts(examples, engine.model.tokenizer, chat=engine.chat, max_length=sys.maxsize)

    def _wide(self, encoded: Encoded) -> Deployed:
        """The model with buckets for these texts: their templates make them longer than what it is trained on."""
        engine = self.model.engine
        buckets = [64]
        while buckets[-1] < max(encoded.lengths, default=0):
            buckets.append(2 * buckets[-1])
        most = engine.model.config.max_length
        wide = dataclasses.replace(engine, buckets=tuple(min(size, most) for size in buckets))
        return dataclasses.replace(self.model, engine=wide)
