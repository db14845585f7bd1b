"""Examples as token ids: prompt, response and end of text, cut to a maximum length.

Prompt and response are tokenised apart and then joined, so that the prompt of a training sequence
is, id for id, what the model is given when it is asked to answer; no token straddles the boundary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from duet_jax.data.example import Example, plain_text
from duet_jax.errors import DataError

# Examples that are tokenised together: of each of their tokens a tokenizer holds about a hundred bytes, of which four
# are kept.
TOGETHER = 1024


class TokenizerLike(Protocol):
    """What encoding needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def add_bos(self) -> bool: ...

    def encode_batch(self, texts: list[str], /) -> list[list[int]]: ...

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool, /) -> str: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids of examples, in their order, less the dropped ones.

    Attributes:
      tokens: one int32 array [length] an example: prompt, response, end of text.
      prompt_lengths: int32 [n], the tokens before the response, BOS included.
      ids: the examples' ids.
      cut: for each example, whether it lost tokens to the maximum length.
      dropped: examples left out because none of their response was left.
    """

    tokens: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    ids: tuple[str, ...]
    cut: tuple[bool, ...] = ()
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """Some of the examples, in the order of their numbers `rows`."""
        return Encoded(
            tuple(self.tokens[row] for row in rows),
            self.prompt_lengths[np.asarray(rows, np.int64)],
            tuple(self.ids[row] for row in rows),
            tuple(self.cut[row] for row in rows) if self.cut else (),
        )

    @property
    def truncated(self) -> int:
        """Examples that lost tokens to the maximum length."""
        return sum(self.cut)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and where their responses begin, in order, hexadecimal."""
        digest = hashlib.sha256()
        for tokens, prompt in zip(self.tokens, self.prompt_lengths, strict=True):
            digest.update(np.array([len(tokens), prompt], np.int64).tobytes())
            digest.update(np.asarray(tokens, np.int32).tobytes())
        return digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [n]."""
        return np.fromiter((len(t) for t in self.tokens), np.int32, len(self.tokens))


def encode(
    examples: Sequence[Example],
    tokenizer: TokenizerLike,
    *,
    chat: bool,
    max_length: int,
    name: str = "unnamed",
) -> Encoded:
    """Tokenises examples for training or for scoring their responses.

    Tokens beyond `max_length` are cut from the end (`truncated`). Where that leaves no response token
    to predict, the example is left out (`dropped`): every example returned has at least one.

    Args:
      examples: may be empty.
      tokenizer: see `TokenizerLike`; with `chat` it needs a chat template.
      chat: renders prompts by the chat template, a text as one message of the user. An example with
        an empty prompt is plain text to continue and is not rendered. Without `chat`, a prompt and a
        newline precede the response; messages are written as lines `role: content`.
      max_length: in tokens, BOS and end of text included; at least 2.
      name: of the domain, for messages.

    Raises:
      DataError: an example has no response, or all examples would be dropped.
      ValueError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length}")
    for example in examples:
        if not example.response:
            raise DataError(
                f"domain '{name}': the example '{example.id}' has no response to train on or to score; name the column "
                f"that holds it, or use the example only where replies are sampled and rewarded"
            )
    end = list(tokenizer.eos_ids[:1])
    tokens, prompt_lengths, ids, cut, shortest = [], [], [], [], math.inf
    for start in range(0, len(examples), TOGETHER):
        some = examples[start : start + TOGETHER]
        prompts = _prompt_ids(some, tokenizer, chat)
        responses = tokenizer.encode_batch([example.response for example in some])
        shortest = min(shortest, *map(len, prompts))
        for example, prompt, response in zip(some, prompts, responses, strict=True):
            whole = [*prompt, *response, *end]
            if max(len(prompt), 1) < min(len(whole), max_length):
                cut.append(len(whole) > max_length)
                tokens.append(np.array(whole[:max_length], np.int32))
                prompt_lengths.append(len(prompt))
                ids.append(example.id)
    if examples and not tokens:
        raise DataError(
            f"domain '{name}': no response is left of any of its {len(examples)} examples within "
            f"max_length {max_length}; the shortest prompt alone has {shortest} "
            f"tokens, so raise max_length or shorten the prompts"
        )
    dropped = len(examples) - len(tokens)
    return Encoded(tuple(tokens), np.array(prompt_lengths, np.int32), tuple(ids), tuple(cut), dropped)


def join(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all parts, one after the other."""
    return Encoded(
        tokens=tuple(tokens for part in parts for tokens in part.tokens),
        prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
        ids=tuple(identifier for part in parts for identifier in part.ids),
        cut=tuple(cut for part in parts for cut in part.cut),
        dropped=sum(part.dropped for part in parts),
    )


def encode_prompts(examples: Sequence[Example], tokenizer: TokenizerLike, *, chat: bool, max_length: int) -> Encoded:
    """Tokenises prompts alone, for generation: the part of `encode` before the response.

    A prompt longer than `max_length` loses its beginning after BOS (`truncated`), because an answer
    depends most on the prompt's end. None is dropped; an empty prompt without BOS has length 0.

    Args:
      examples: their responses are not used.
      tokenizer: as for `encode`.
      chat: as for `encode`.
      max_length: of a prompt, in tokens, BOS included; at least 2.

    Raises:
      ValueError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length}")
    tokens, cut = [], []
    for first in range(0, len(examples), TOGETHER):
        for prompt in _prompt_ids(examples[first : first + TOGETHER], tokenizer, chat):
            cut.append(len(prompt) > max_length)
            if cut[-1]:
                start = prompt[:1] if prompt[0] == tokenizer.bos_id else []
                prompt = start + prompt[len(prompt) - max_length + len(start) :]
            tokens.append(np.array(prompt, np.int32))
    lengths = np.fromiter((len(t) for t in tokens), np.int32, len(tokens))
    return Encoded(tuple(tokens), lengths, tuple(e.id for e in examples), tuple(cut))


def _prompt_ids(examples: Sequence[Example], tokenizer: TokenizerLike, chat: bool) -> list[list[int]]:
    prompts = tokenizer.encode_batch([_prompt_text(e.prompt, tokenizer, chat) for e in examples])
    bos = tokenizer.bos_id
    if not tokenizer.add_bos or bos is None:
        return prompts
    # Many chat templates write BOS themselves; two of them would be out of distribution.
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompts]


def _prompt_text(prompt: str | tuple[dict[str, str], ...], tokenizer: TokenizerLike, chat: bool) -> str:
    if not prompt:
        return ""
    if not chat:
        return plain_text(prompt) + "\n"
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.render_chat(messages, True)
