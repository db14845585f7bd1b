"""Which choice of a multiple-choice question a written reply takes."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.answers import normalise

_SAID = re.compile(r"\b(?:answer|choice|option)(?:\s+is\b\s*:?|\s*:)[\s*]*(?:(?:choice|option)\s+)?", re.IGNORECASE)
# A capital letter by itself, or any letter in brackets or before what ends a label: "a dog" names no choice.
_LABEL = re.compile(
    r"\(([A-Za-z])\)|\$?\\boxed\{\(?([A-Za-z])\)?\}|([A-Za-z])(?=\**(?:[).:,]|\s*$|\n))|([A-Z])(?!['\w])"
)
_FIRST = re.compile(r"[\s*]*(?:\(([A-Za-z])\)|([A-Za-z])(?=\**(?:[).:]|\s*$|\n)))")
_BRACKETED = re.compile(r"\(([A-Z])\)|\\boxed\{\(?([A-Z])\)?\}")


def chosen(reply: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a reply takes, None where that cannot be told.

    In this order: the letter after the last "answer is" or "answer:" (or choice, option); the letter that the reply
    begins with, as in "(B)", "B." or "B"; the one choice whose text is named after the last "answer is", or else
    anywhere; the last capital letter in brackets. Texts are compared as whole words, after `answers.normalise`; of
    two choices of which one is a part of the other, the longer counts.
    """
    said = [found.end() for found in _SAID.finditer(reply)][-1:]
    letters = [found for found in (*(_LABEL.match(reply, end) for end in said), _FIRST.match(reply)) if found]
    named = [_named(text, choices) for text in (*(reply[end:] for end in said), reply)]
    bracketed = [_index(found, len(choices)) for found in _BRACKETED.finditer(reply)]
    ordered = [*(_index(found, len(choices)) for found in letters), *named, *reversed(bracketed)]
    return next((index for index in ordered if index is not None), None)


def right_choice(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 where a reply takes the example's right choice, else 0."""
    return [
        float(chosen(reply, example.choices) == example.answer_index)
        for reply, example in zip(replies, examples, strict=True)
    ]


def require_choices(example: Example) -> None:
    """Raises a FeedbackError where an example is no multiple-choice question."""
    if not 2 <= len(example.choices) <= len(string.ascii_uppercase) or example.answer_index is None:
        raise FeedbackError(
            f"Example {example.id} is no multiple-choice question; it needs the columns 'choices' (2 to 26 strings) "
            f"and 'answer_index'."
        )


def _index(found: re.Match[str], count: int) -> int | None:
    index = string.ascii_uppercase.index(next(letter for letter in found.groups() if letter).upper())
    return index if index < count else None


def _named(text: str, choices: Sequence[str]) -> int | None:
    """The one choice that is named in a text."""

    def within(part: str, whole: str) -> bool:
        return bool(part) and f" {part} " in f" {whole} "

    plain = [normalise(choice) for choice in choices]
    whole = normalise(text)
    found = [i for i, choice in enumerate(plain) if within(choice, whole)]
    longest = [i for i in found if not any(plain[j] != plain[i] and within(plain[i], plain[j]) for j in found)]
    return longest[0] if len(longest) == 1 else None
