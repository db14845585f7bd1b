"""Whether a reply ends in the right number, however it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards.reward import Function, references

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+"
_DECIMAL = rf"(?:{_DIGITS})(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
# No digits of a name (x2, x_2), of an exponent (m^2, m^{-2}) or after a second point (1.2.3). A minus is a sign only
# where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(
    rf"(?<![\w^])(?<!\^\{{)(?<!\^-)(?<!\^\{{-)(?<![0-9]\.)(?P<sign>(?<![)\]}}])-)?"
    rf"(?:(?P<whole>[0-9]+)(?:[ ]+|[ ]+and[ ]+)(?=[0-9]+[ ]?/[ ]?[0-9]))?"
    rf"(?P<top>{_DECIMAL})(?:[ ]?/[ ]?(?P<bottom>{_DECIMAL}))?"
)
_GSM8K = re.compile(r"####[ ]*")
_BOXED = re.compile(r"\\boxed\b")
_SAID = re.compile(r"\banswer is\b", re.IGNORECASE)
# More characters than any answer has, and few enough for exact arithmetic on whatever a model writes.
_LONGEST = 300


def number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, exactly; None if there is none.

    That is the number right after the first "####" that has one (GSM8K, arXiv 2110.14168), or else the first on the
    line after the last "\boxed" (MATH, arXiv 2103.03874), or else after the last "answer is", or else the last
    number of the text. Understood are signs, commas between groups of three digits, decimal points, powers of ten as
    in 1.5e3, fractions as 3/4 or \frac{3}{4}, and mixed numbers as 1 3/4; not words, roots or arithmetic. Currency
    signs and units are left out, the percent sign among them: 50% is 50, not 0.5.
    """
    found = next(_candidates(_plain(text)), None)
    return None if found is None or len(found[0]) > _LONGEST else _value(found)


def split_numbers(text: str) -> list[str | Fraction]:
    """A text taken apart: its numbers, understood as by `number`, and the texts around them, in order.

    A number that is too long to reckon with, or has nothing below its line, stays text.
    """
    plain, end = _plain(text), 0
    parts: list[str | Fraction] = []
    for found in _NUMBER.finditer(plain):
        value = _value(found) if len(found[0]) <= _LONGEST else None
        if value is not None:
            parts += [plain[end : found.start()], value]
            end = found.end()
    return [*parts, plain[end:]]


def equals_reference(tolerance: float) -> Function:
    """1 if the reply's `number` is that of a reference, up to `tolerance` times the reference's size; else 0."""
    allowed = Fraction(tolerance)

    def one(reply: str, example: Example) -> float:
        given = number(reply)
        return float(given is not None and any(abs(given - x) <= allowed * abs(x) for x in _right(example)))

    return lambda replies, examples: [one(*pair) for pair in zip(replies, examples, strict=True)]


def require_number(example: Example) -> None:
    """Raises a FeedbackError where no accepted answer of an example is a number, or there is none in its response."""
    if not _right(example):
        raise FeedbackError(
            f"Example {example.id} has the right answer {references(example)[0]!r}; a numeric reward needs one with "
            f"exactly one number, or a response that ends in one."
        )


def _right(example: Example) -> list[Fraction]:
    """The numbers that are right.

    An accepted answer with several (3x + 4, a pair) is no number; a response may reckon before it gives its answer.
    """
    single = [text for text in example.answers if len(_NUMBER.findall(_plain(text))) == 1]
    found = [number(text) for text in (single if example.answers else [example.response])]
    return [value for value in found if value is not None]


def _plain(text: str) -> str:
    """Without currency signs and the LaTeX around digits."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = re.sub(r"\\?[$€£¥]|\\[,!;]", "", text)
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac\b)", " ", text)  # 1\frac{3}{4} is a mixed number
    return re.sub(r"\\[dt]?frac\{([0-9.]+)\}\{([0-9.]+)\}", r"\1/\2", text)


def _candidates(text: str) -> Iterator[re.Match[str]]:
    """Numbers in the order in which they may be the answer."""
    for mark in _GSM8K.finditer(text):
        found = _NUMBER.match(text, mark.end())
        if found is not None:
            yield found
    for pattern in (_BOXED, _SAID):
        for mark in list(pattern.finditer(text))[-1:]:
            end = text.find("\n", mark.end())
            found = _NUMBER.search(text, mark.end(), len(text) if end < 0 else end)
            if found is not None:
                yield found
    yield from list(_NUMBER.finditer(text))[-1:]


def _value(found: re.Match[str]) -> Fraction | None:
    top, bottom = (Fraction((found[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if bottom == 0:
        return None
    size = int(found["whole"] or 0) + top / bottom
    return -size if found["sign"] else size
