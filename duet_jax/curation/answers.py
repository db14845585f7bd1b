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


class Answers(NamedTuple):
    """Greedy answers to n prompts.

    Attributes:
      texts: n of them.
      confidence: float64 `[n]` in [0, 1]; 0 for an empty answer.
    """

    texts: tuple[str, ...]
    confidence: np.ndarray

    def given(self, threshold: float) -> tuple[str | None, ...]:
        """The answers with a confidence of at least the threshold; None where the model abstains."""
        return tuple(text if sure >= threshold else None for text, sure in zip(*self, strict=True))


def propose(
    respondent: Respondent,
    examples: Sequence[Example],
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> list[str]:
    """A model's greedy answers to prompts as they are, without white space around them; kept in `folder` in parts.

    Raises:
      DataError: a prompt and an answer are longer than the model takes.
    """
    sizes = respondent.sizes(examples)
    respondent.check(examples, writes=True)
    identity = [respondent.identity, respondent.writing, [example.prompt for example in examples]]

    def compute(rows: list[int]) -> list[str]:
        return [texts[0].strip() for texts in respondent.answers([examples[row] for row in rows], 0)]

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
    texts = propose(respondent, examples, folder, on_progress)
    said = [dataclasses.replace(e, response=text) for e, text in zip(examples, texts, strict=True) if text]
    found = np.zeros(len(texts))
    if said:
        found[[bool(text) for text in texts]] = confidence(respondent, said, config, folder, on_progress).value
    return Answers(tuple(texts), found)
