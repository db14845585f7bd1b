"""A model that is asked about data: it writes answers, says which option it takes, and how probable a text is."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

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

# Texts that are tokenised together where only their lengths are kept.
CHUNK = 1024


class Reply(NamedTuple):
    """What was written.

    Attributes:
      text: without what ended it.
      ended: whether the end of text or a stop string ended it, rather than the limit of its tokens.
    """

    text: str
    ended: bool


class Respondent(Protocol):
    """Whatever can be asked."""

    @property
    def identity(self) -> Any:
        """What decides what it thinks of a text, as values of JSON."""
        ...

    @property
    def writing(self) -> Any:
        """What decides its sampled answers besides, as values of JSON."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of a prompt and an answer together, at most."""
        ...

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of the prompts."""
        ...

    def answers(
        self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[Reply]]:
        """So many sampled answers to each prompt, or with 0 the greedy one; a text of `stop` ends them too."""
        ...

    def read(
        self,
        questions: Sequence[Example],
        groups: Sequence[int],
        words: Sequence[str],
        scored: Sequence[Example] = (),
        owners: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """What it says without writing.

        Args:
          questions: n of them.
          groups: n numbers; questions with the same one begin alike, as do scored examples with the same number.
          words: that the answers begin with.
          scored: m examples with a response.
          owners: m numbers of groups.

        Returns:
          Probabilities float64 `[n, words]`, among the words, that the answer begins with each; and float64 `[m, 2]`,
          the log-probability of each response and its scored tokens, NaN where it cannot be had.
        """
        ...


def fits(respondent: Respondent, prompts: Sequence[Example], max_new_tokens: int = 0) -> np.ndarray:
    """Whether each prompt, with so many tokens after it, is not more than the model takes, bool `[n]`."""
    return np.array(respondent.sizes(prompts), np.int64) + max_new_tokens <= respondent.longest


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRespondent:
    """Our own model. Nothing that it reads is cut: what does not fit its context is refused, or has no number.

    Attributes:
      model: what is asked.
      fingerprint: of its parameters, adapters included.
      config: at which temperature answers are sampled, and how much is done at a time.
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
        """What decides its sampled answers besides, as values of JSON."""
        return [self.config.temperature, self.seed]

    @property
    def longest(self) -> int:
        """Tokens of a prompt and an answer together, at most."""
        return self.model.engine.model.config.max_length

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of the prompts."""
        starts = range(0, len(examples), CHUNK)
        return [size for at in starts for size in self._encode(examples[at : at + CHUNK]).lengths.tolist()]

    def answers(
        self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[Reply]]:
        """So many sampled answers to each prompt, or with 0 the greedy one; equal prompts get the same ones.

        Raises:
          DataError: a prompt and an answer are longer than the model takes.
        """
        encoded = self._encode(examples)
        self._require_room(encoded, max_new_tokens)
        first = {tokens.tobytes(): row for row, tokens in reversed(list(enumerate(encoded.tokens)))}
        rows = sorted(first.values())
        found = self._wide(encoded).sample(
            encoded.take(rows),
            Sampling(self.config.temperature) if samples else GREEDY,
            samples=max(samples, 1),
            max_new_tokens=max_new_tokens,
            batch_size=self.config.batch_size,
            seed=self.seed,
            stop_strings=stop,
        )
        replies = {
            row: [Reply(*one) for one in zip(texts, ended.tolist(), strict=True)]
            for row, texts, ended in zip(rows, found.texts, found.ended, strict=True)
        }
        return [replies[first[tokens.tobytes()]] for tokens in encoded.tokens]

    def read(
        self,
        questions: Sequence[Example],
        groups: Sequence[int],
        words: Sequence[str],
        scored: Sequence[Example] = (),
        owners: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """What it says without writing; see `Respondent`.

        Only the first token of a word is looked at. A log-probability is that of the response with its end of text, in
        nats; it is NaN where prompt and response are longer than the model takes.

        Raises:
          DataError: a question is longer than the model takes.
          ModelError: two words begin with the same token.
        """
        encoded = self._encode(questions)
        self._require_room(encoded, 0)
        engine, base = self.model.engine, self.model.engine.model
        first = [ids[0] for ids in base.tokenizer.encode_batch(list(words)) if ids]
        if questions and len(set(first)) < len(words):
            raise ModelError(
                f"{base.source} cannot choose between {', '.join(words)}: its tokenizer begins them with the ids "
                f"{first}, which must all differ."
            )
        numbered = [dataclasses.replace(example, id=str(row)) for row, example in enumerate(scored)]
        whole = encode(numbered, base.tokenizer, chat=engine.chat, max_length=sys.maxsize)
        targets = whole.take(np.flatnonzero(whole.lengths <= self.longest))
        rows = np.array([int(identifier) for identifier in targets.ids], np.int64)
        tokens = response_tokens(targets)
        # A token of a response is read off the text before it, and these texts are one branch.
        before = [
            (ids[:place], owners[row], int(ids[place]))
            for ids, row, count in zip(targets.tokens, rows, tokens, strict=True)
            for place in range(len(ids) - count, len(ids))
        ]
        logits, log_probs = read_ends(
            base.config,
            self.model.params,
            self.model.lora,
            llama.output_head(self.model.params)[np.array(first)].astype(jnp.float32),
            [*encoded.tokens, *(text for text, _, _ in before)],
            [*groups, *(owner for _, owner, _ in before)],
            [*[-1] * len(encoded), *(label for _, _, label in before)],
            pad_id=base.tokenizer.pad_id,
            batch_tokens=self.config.batch_tokens,
            compute_dtype=engine.compute_dtype,
            mesh=engine.mesh,
        )
        logits = logits[: len(encoded)].astype(float)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        found = np.full((len(scored), 2), np.nan)
        sums = np.bincount(np.repeat(rows, tokens), log_probs[len(encoded) :], minlength=len(scored))
        found[rows] = np.stack([sums[rows], tokens], axis=1)
        return odds / odds.sum(axis=1, keepdims=True), found

    def _encode(self, examples: Sequence[Example]) -> Encoded:
        engine = self.model.engine
        return encode_prompts(examples, engine.model.tokenizer, chat=engine.chat, max_length=sys.maxsize)

    def _require_room(self, prompts: Encoded, max_new_tokens: int) -> None:
        length, identifier = max(zip(prompts.lengths.tolist(), prompts.ids, strict=True), default=(0, ""))
        if length + max_new_tokens > self.longest:
            after = f" with {max_new_tokens} tokens after it" if max_new_tokens else ""
            raise DataError(
                f"example '{identifier}': a question about it has {length} tokens, which{after} are more than the "
                f"{self.longest} that the model takes; leave it out, or shorten the templates."
            )

    def _wide(self, prompts: Encoded) -> Deployed:
        """The model with buckets for these prompts: templates make them longer than what it is trained on."""
        engine = self.model.engine
        buckets = [64]
        while buckets[-1] < max(prompts.lengths, default=0):
            buckets += [buckets[-1] * 3 // 2, buckets[-1] * 2]
        most = engine.model.config.max_length
        wide = dataclasses.replace(engine, buckets=tuple(min(size, most) for size in buckets))
        return dataclasses.replace(self.model, engine=wide)
