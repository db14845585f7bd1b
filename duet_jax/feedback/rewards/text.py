"""Rewards of the text alone: equality, overlap of words, ROUGE-L, a pattern, a length. All lie in [0, 1].

Where an example accepts several answers, the best of them counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from duet_jax.feedback import answers
from duet_jax.feedback.rewards.reward import Function, references

_WORD = re.compile(r"[a-z0-9]+")


def against_references(compare: Callable[[str, Iterable[str]], float]) -> Function:
    """The batch function that compares each reply with what its example accepts."""
    return lambda replies, examples: [
        compare(reply, references(example)) for reply, example in zip(replies, examples, strict=True)
    ]


exact_match = against_references(answers.exact_match)
token_f1 = against_references(answers.token_f1)


def best_rouge_l(reply: str, accepted: Iterable[str]) -> float:
    """F1 of the longest common subsequence of words, the best over the accepted texts.

    The sentence-level ROUGE-L of Lin 2004 (ROUGE: A Package for Automatic Evaluation of Summaries, section 3.1) with
    beta = 1, the whole text taken as one sentence; words are runs of a-z and 0-9 in lower case, not stemmed, as in
    the package rouge-score. A text without words scores 0.
    """
    found = words(reply)
    return max(rouge_l_of_words(found, words(other)) for other in accepted)


rouge_l = against_references(best_rouge_l)


def words(text: str) -> list[str]:
    """The words that ROUGE-L compares."""
    return _WORD.findall(text.lower())


def rouge_l_of_words(one: Sequence[str], other: Sequence[str]) -> float:
    """`best_rouge_l` of texts that are lists of words already."""
    common = common_subsequence(one, other)
    # 2PR / (P + R) of P = common / len(one) and R = common / len(other).
    return 2 * common / (len(one) + len(other)) if common else 0.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence: a row of its table a step, as the bits of one number.

    Hyyro 2004, Bit-parallel LCS-length computation revisited: a bit is 0 where the row grows by one.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(one) - row.bit_count()


def matches(pattern: re.Pattern[str], where: Literal["whole", "anywhere"]) -> Function:
    """1 if the pattern matches the reply, without the white space around it, as a whole or anywhere; else 0."""
    match = pattern.fullmatch if where == "whole" else pattern.search
    return lambda replies, examples: [float(match(reply.strip()) is not None) for reply in replies]


def length(unit: Literal["words", "characters"], minimum: int, maximum: int | None) -> Function:
    """1 within the window, ends included; outside the smaller of length and nearest end divided by the larger.

    So a reply of half the least length, or of twice the most, scores 1/2. Words are what white space separates;
    characters are Unicode code points, white space included.
    """

    def one(reply: str) -> float:
        size = len(reply.split()) if unit == "words" else len(reply)
        if size < minimum:
            return size / minimum
        return 1.0 if maximum is None or size <= maximum else maximum / size

    return lambda replies, examples: [one(reply) for reply in replies]
