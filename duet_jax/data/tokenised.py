"""Examples as token ids: prompt, response and end of text, cut to a maximum length.

Prompt and response are tokenised apart and then joined, so that the prompt of a training sequence
is, id for id, what the model is given when it is asked to answer; no token straddles the boundary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from duet_jax.data.arrow import Names
from duet_jax.data.example import Example, plain_text
from duet_jax.data.rows import Rows
from duet_jax.data.texts import ids_of
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
      tokens: one int32 array [length] an example: prompt, response, end of text. They are kept as `Rows`.
      prompt_lengths: int32 [n], the tokens before the response, BOS included.
      ids: the examples' ids.
      cut: bool [n], whether each example lost tokens to the maximum length; [0] where nobody looked.
      dropped: examples left out because none of their response was left.
    """

    tokens: Sequence[np.ndarray]
    prompt_lengths: np.ndarray
    ids: Sequence[str]
    cut: np.ndarray | Sequence[bool] = ()
    dropped: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", Rows.of(self.tokens))
        object.__setattr__(self, "cut", np.asarray(self.cut, np.bool_))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> Rows:
        """The tokens."""
        return cast(Rows, self.tokens)

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """Some of the examples, in the order of their numbers `rows`; no tokens are copied."""
        chosen, cut = np.asarray(rows, np.int64), np.asarray(self.cut)
        ids = self.ids.take(chosen) if isinstance(self.ids, Names) else tuple(self.ids[row] for row in chosen)
        return Encoded(self.rows.take(chosen), self.prompt_lengths[chosen], ids, cut[chosen] if len(cut) else ())

    @property
    def truncated(self) -> int:
        """Examples that lost tokens to the maximum length."""
        return int(np.count_nonzero(self.cut))

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
        return self.rows.lengths


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
    found = join(list(encoded_parts(examples, tokenizer, chat=chat, max_length=max_length, name=name)))
    if examples and not len(found):
        shortest = min(
            len(prompt)
            for first in range(0, len(examples), TOGETHER)
            for prompt in _prompt_ids(list(examples[first : first + TOGETHER]), tokenizer, chat)
        )
        raise DataError(
            f"domain '{name}': no response is left of any of its {len(examples)} examples within "
            f"max_length {max_length}; the shortest prompt alone has {shortest} "
            f"tokens, so raise max_length or shorten the prompts"
        )
    return found


def encoded_parts(
    examples: Sequence[Example], tokenizer: TokenizerLike, *, chat: bool, max_length: int, name: str
) -> Iterator[Encoded]:
    """`encode`, a few examples at a time; of some it may leave none."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length}")
    end = list(tokenizer.eos_ids[:1])
    for start in range(0, len(examples), TOGETHER):
        some = list(examples[start : start + TOGETHER])
        for example in some:
            if not example.response:
                raise DataError(
                    f"domain '{name}': the example '{example.id}' has no response to train on or to score; name the "
                    f"column that holds it, or use the example only where replies are sampled and rewarded"
                )
        prompts = _prompt_ids(some, tokenizer, chat)
        responses = tokenizer.encode_batch([example.response for example in some])
        tokens, prompt_lengths, ids, cut = [], [], [], []
        for example, prompt, response in zip(some, prompts, responses, strict=True):
            whole = [*prompt, *response, *end]
            if max(len(prompt), 1) < min(len(whole), max_length):
                cut.append(len(whole) > max_length)
                tokens.append(np.array(whole[:max_length], np.int32))
                prompt_lengths.append(len(prompt))
                ids.append(example.id)
        yield Encoded(tokens, np.array(prompt_lengths, np.int32), ids, cut, len(some) - len(tokens))


def join(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all parts, one after the other; no tokens are copied."""
    return Encoded(
        tokens=Rows.join([part.rows for part in parts]),
        prompt_lengths=np.concatenate([np.zeros(0, np.int32), *(part.prompt_lengths for part in parts)]),
        ids=Names.join([part.ids for part in parts]),
        cut=np.concatenate([np.zeros(0, np.bool_), *(part.cut for part in parts)]),
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
        for prompt in _prompt_ids(list(examples[first : first + TOGETHER]), tokenizer, chat):
            cut.append(len(prompt) > max_length)
            if cut[-1]:
                start = prompt[:1] if prompt[0] == tokenizer.bos_id else []
                prompt = start + prompt[len(prompt) - max_length + len(start) :]
            tokens.append(np.array(prompt, np.int32))
    lengths = np.fromiter((len(t) for t in tokens), np.int32, len(tokens))
    return Encoded(tokens, lengths, tuple(ids_of(examples)), cut)


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
