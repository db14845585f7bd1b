"""Replies that the model did not sample: labels, the beginnings of labels as guidance, and generations from a file.

A text becomes ids once, with the end of text after it, and stays ids from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax.data import Encoded
from duet_jax.data.sources import read_rows
from duet_jax.errors import DataError
from duet_jax.models.generate import Samples
from duet_jax.models.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Guided(NamedTuple):
    """Prompts that say how the answer begins.

    Attributes:
      prompts: followed by the first half of their labels' ids, as prompt.
      beginnings: that half as text. A reply's whole answer, which the reward is to see, is this and then the reply's
        own text.
    """

    prompts: Encoded
    beginnings: tuple[str, ...]


def labelled(prompts: Encoded, responses: Sequence[str], tokenizer: Tokenizer) -> Encoded:
    """Prompts followed by their labels and the end of text, none cut or left out.

    Args:
      prompts: as the sampler gets them.
      responses: their labels.
      tokenizer: of the model.

    Raises:
      DataError: a label is empty.
    """
    tokens = [
        np.concatenate([prompt, np.array([*label, *tokenizer.eos_ids[:1]], np.int32)])
        for prompt, label in zip(prompts.tokens, _label_ids(prompts, responses, tokenizer), strict=True)
    ]
    return Encoded(tuple(tokens), prompts.lengths, prompts.ids, (False,) * len(tokens))


def guided(prompts: Encoded, responses: Sequence[str], tokenizer: Tokenizer, max_length: int) -> Guided:
    """Appends the first half of each label's ids to its prompt (NICE's guidance).

    What is given is prompt: it has no part in log pi(y|x), unlike in the published code, where the gradient is that of
    ids nobody sampled. Half is rounded down, and then to a whole character. A prompt that becomes too long loses its
    beginning after BOS, as in `data.encode_prompts`.

    Args:
      prompts: as the sampler would get them.
      responses: their labels.
      tokenizer: of the model.
      max_length: of a prompt with what is appended, in tokens.

    Raises:
      DataError: a label is empty, or its half alone is longer than `max_length`.
    """
    tokens, beginnings, cut = [], [], []
    for identifier, prompt, label in zip(
        prompts.ids, prompts.tokens, _label_ids(prompts, responses, tokenizer), strict=True
    ):
        half = label[: len(label) // 2]
        while tokenizer.decode(half).endswith(REPLACEMENT):
            half = half[:-1]
        first = prompt[:1] if len(prompt) and prompt[0] == tokenizer.bos_id else prompt[:0]
        room = max_length - len(first) - len(half)
        if room < 0:
            raise DataError(
                f"half of the label of '{identifier}' has {len(half)} tokens, more than a prompt of at most "
                f"{max_length} holds; raise max_length, or do without guidance."
            )
        rest = prompt[len(first) :]
        tokens.append(np.concatenate([first, rest[max(len(rest) - room, 0) :], np.array(half, np.int32)]))
        beginnings.append(tokenizer.decode(half))
        cut.append(len(rest) > room)
    lengths = np.fromiter((len(row) for row in tokens), np.int32, len(tokens))
    return Guided(Encoded(tuple(tokens), lengths, prompts.ids, tuple(cut)), tuple(beginnings))


def _label_ids(prompts: Encoded, responses: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    for identifier, response in zip(prompts.ids, responses, strict=True):
        if not response:
            raise DataError(f"the prompt '{identifier}' has no label; give it a response, or choose without labels.")
    return tokenizer.encode_batch(list(responses))


def external_samples(path: str | Path, prompts: Encoded, tokenizer: Tokenizer, max_new_tokens: int) -> Samples:
    """Replies from a file, such as another model's, in the place of sampled ones.

    Each line of the file is `{"id": ..., "replies": [text, ...]}`, with the same number of replies for all prompts;
    rows of other prompts are passed over. A text gets the end of text after it; one of more than `max_new_tokens` ids
    is cut there and has none, as if it had been sampled.

    What the replies were sampled from is not known: `sampled_log_probs` of their ids are NaN, and estimators with
    importance weights refuse them; the gradient is then that of another objective, the reward-weighted likelihood
    of these texts, as in the published code. `log_probs` are NaN, too.

    Args:
      path: of the file (.jsonl).
      prompts: that replies are wanted to, in this order.
      tokenizer: of the model.
      max_new_tokens: of a reply.

    Raises:
      DataError: the file or a prompt's replies are missing or malformed; it names both.
    """
    path = Path(path)
    texts = _read(path, prompts.ids)
    count, each = len(texts), len(texts[0])
    flat = [text for replies in texts for text in replies]
    ids = np.full((count * each, max_new_tokens), tokenizer.pad_id, np.int32)
    lengths, kept, whole = np.zeros(count * each, np.int32), [], np.zeros(count * each, bool)
    for row, (own, text) in enumerate(zip(tokenizer.encode_batch(flat), flat, strict=True)):
        whole[row] = len(own) + 1 <= max_new_tokens
        own = [*own, *tokenizer.eos_ids[:1]][:max_new_tokens]
        if not own:
            raise DataError(f"{path}: a reply to '{prompts.ids[row // each]}' is empty, and the model has no EOS.")
        ids[row, : len(own)], lengths[row] = own, len(own)
        kept.append(text if whole[row] else tokenizer.decode(own))
    counted = np.arange(max_new_tokens) < lengths[:, None]
    unknown = np.where(counted, np.nan, 0).astype(np.float32).reshape(count, each, -1)
    return Samples(
        ids=ids.reshape(count, each, -1),
        lengths=lengths.reshape(count, each),
        ended=whole.reshape(count, each),
        log_probs=unknown,
        sampled_log_probs=unknown,
        texts=tuple(tuple(kept[row * each : (row + 1) * each]) for row in range(count)),
    )


def _read(path: Path, wanted: Sequence[str]) -> list[list[str]]:
    """The replies to each prompt, the same number for all."""
    if not path.is_file():
        raise DataError(f"There is no file of replies {path}.")
    found: dict[str, list[str]] = {}
    for where, columns in read_rows(str(path), split="train", name="replies"):
        identifier, replies = columns.get("id"), columns.get("replies")
        if not isinstance(identifier, str | int) or not isinstance(replies, list):
            raise DataError(f'{where}: a row of replies must be {{"id": ..., "replies": [texts]}}.')
        if str(identifier) in found:
            raise DataError(f"{where}: the prompt '{identifier}' has replies already; give each prompt one row.")
        if not replies or not all(isinstance(reply, str) for reply in replies):
            raise DataError(f"{where}: the replies to '{identifier}' must be one or more texts.")
        found[str(identifier)] = replies
    for identifier in wanted:
        if identifier not in found:
            raise DataError(f"{path} has no replies to the prompt '{identifier}'; add a row with this id.")
        if len(found[identifier]) != len(found[wanted[0]]):
            raise DataError(
                f"{path} has {len(found[identifier])} replies to the prompt '{identifier}' and "
                f"{len(found[wanted[0]])} to '{wanted[0]}'; give the same number to all."
            )
    return [found[identifier] for identifier in wanted]
