"""Confidence in an answer to a prompt, in [0, 1], from what a model sampled and said (BSDetector).

Chen and Mueller 2024 (arXiv 2308.16175), section 3: observed consistency of the answer with sampled ones, and
self-reflection. CLEAR (arXiv 2403.12776), section 3, applies it to the targets of training data. A part that is
missing is left out of the mean and the weights are renormalised, as in cleanlab's TLM; the paper has no such case.
Numbers that are missing are NaN throughout.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from duet_jax.feedback.answers import normalise
from duet_jax.feedback.rewards.numeric import split_numbers

# What the options of self-reflection are worth: correct, incorrect, not sure.
OPTION_VALUES = np.array([1.0, 0.0, 0.5])
_OPEN = re.compile(r"[{\[]")
_ANSWER = re.compile(r"\banswer\s*(?:is\b\s*:?|:)|####", re.IGNORECASE)


def similarity(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """1 less the mean of the probabilities of contradiction in both orders; arrays of one shape."""
    return 1 - (forward + backward) / 2


def reflection_score(probabilities: np.ndarray) -> np.ndarray:
    """Self-reflection S, float64 `[n]`: the mean worth of the options over the questions.

    Args:
      probabilities: of the options correct, incorrect and not sure, `[n, questions, 3]`.
    """
    return known_mean(probabilities @ OPTION_VALUES)


def known_mean(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of what is not NaN; NaN where nothing else is there."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def combine(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted mean of the parts that are there, float64 `[n]`; NaN where none with a weight is.

    With weights beta * alpha, beta * (1 - alpha) and 1 - beta of the mean similarity, the mean match and the reflection
    this is C = beta * O + (1 - beta) * S.

    Args:
      parts: numbers `[n]` by name.
      weights: of each, not negative.
    """
    values = np.stack([parts[name] for name in parts]).astype(float)
    shares = np.array([weights[name] for name in parts])[:, None] * ~np.isnan(values)
    total = shares.sum(axis=0)
    return np.where(total > 0, (shares * np.nan_to_num(values)).sum(axis=0) / np.where(total > 0, total, 1), np.nan)


def final_answer(text: str) -> str:
    """What follows the last "answer:", "answer is" or "####", up to the end of the line; else the whole text."""
    marks = [found.end() for found in _ANSWER.finditer(text)]
    after = text[marks[-1] :].strip() if marks else ""
    return after.splitlines()[0].strip() if after else text.strip()


def same_answer(target: str, sample: str) -> bool:
    """Whether two texts give the same final answer: the same numbers, and between them the same words.

    Numbers are compared by their value (1/2 is 0.5, and -5 is not 5), words after `answers.normalise`. Of an answer
    with neither, such as the choice "A" or the operator "+", all but case and the punctuation around it is compared. A
    target that is a JSON object or list is compared with the first one in the sample, field by field; order and spacing
    do not matter.
    """
    fields = _json(target.strip())
    if fields is not None:
        return next(_jsons(sample), None) == fields
    return _answer(final_answer(target)) == _answer(final_answer(sample))


def _answer(text: str) -> list[str | Fraction]:
    """What is compared of an answer: numbers, and words in their plain form."""
    parts = [normalise(part) if isinstance(part, str) else part for part in split_numbers(text)]
    bare = text.strip()
    return [part for part in parts if part != ""] or [(bare.strip(string.punctuation + " ") or bare).lower()]


def _json(text: str) -> Any:
    """The object or list that a text is, strings normalised; None if it is none."""
    try:
        found = json.loads(text)
        return _normalised(found) if isinstance(found, dict | list) else None
    except (ValueError, RecursionError):
        return None


def _jsons(text: str) -> Iterator[Any]:
    """The objects and lists in a text, strings normalised."""
    decoder, place = json.JSONDecoder(), 0
    while found := _OPEN.search(text, place):
        try:
            value, place = decoder.raw_decode(text, found.start())
            yield _normalised(value)
        except (ValueError, RecursionError):
            place = found.end()


def _normalised(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _normalised(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_normalised(each) for each in value]
    return _answer(value) if isinstance(value, str) else value
