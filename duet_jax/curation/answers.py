"""Answers of a deployed model with the confidence in each, so that it can abstain where it is not sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation.asking import confidence
from duet_jax.curation.parts import Progress, in_parts
from duet_jax.curation.respondent import Respondent
from duet_jax.data import Example
from duet_jax.errors import DataError


class Answers(NamedTuple):
    """Greedy answers to n prompts.

    Attributes:
      texts: n of them.
      confidence: float64 `[n]` in [0, 1]; 0 for an empty answer, and for one of which no confidence can be had (see
        `asking.Confidence`), so that the model abstains.
    """

    texts: tuple[str, ...]
    confidence: np.ndarray

    def given(self, threshold: float) -> tuple[str | None, ...]:
        """The answers with a confidence of at least the threshold; None where the model abstains."""
        return tuple(text if sure >= threshold else None for text, sure in zip(*self, strict=True))


def propose(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> list[str]:
    """A model's greedy answers to prompts as they are, without white space around them; kept in `folder` in parts.

    An answer ends after `config.max_new_tokens` tokens at the latest.

    Raises:
      DataError: a prompt and an answer are longer than the model takes; before anything is computed.
    """
    sizes = respondent.sizes(examples)
    for example, size in zip(examples, sizes, strict=True):
        if size + config.max_new_tokens > respondent.longest:
            raise DataError(
                f"example '{example.id}': its prompt of {size} tokens and an answer of up to {config.max_new_tokens} "
                f"are more than the {respondent.longest} tokens that the model takes; leave it out, or lower "
                f"max_new_tokens."
            )
    stop = config.stop
    identity = [respondent.identity, config.max_new_tokens, list(stop), [example.prompt for example in examples]]

    def compute(rows: list[int]) -> list[str]:
        found = respondent.answers([examples[row] for row in rows], 0, config.max_new_tokens, stop)
        return [replies[0].text.strip() for replies in found]

    return in_parts(folder, "answers", identity, sizes, compute, on_progress)


def answer(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> Answers:
    """A model's greedy answers, and its own confidence in them; responses of the examples are not looked at.

    Raises:
      DuetError: as `propose` and `asking.confidence`.
    """
    texts = propose(respondent, examples, config, folder, on_progress)
    said = [dataclasses.replace(e, response=text) for e, text in zip(examples, texts, strict=True) if text]
    found = np.zeros(len(texts))
    if said:
        value = confidence(respondent, said, config, folder, on_progress).value
        found[[bool(text) for text in texts]] = np.nan_to_num(value, nan=0.0)
    return Answers(tuple(texts), found)
