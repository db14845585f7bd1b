"""Self-reflection: a model is asked whether a proposed answer is correct, and takes one of three options.

BSDetector (arXiv 2308.16175), section 3.2, has it write a text and looks for the option in it. Here the option is read
from the probabilities of the letters, which needs one pass and no parsing, and every option stands once at each letter,
so that a liking for a letter cancels. The way of the paper is there as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation.respondent import Respondent
from duet_jax.data import Example
from duet_jax.data.example import plain_text

LETTERS = ("A", "B", "C")
OPTIONS = ("Correct", "Incorrect", "I am not sure")
# Each option stands once at each letter; numbers of OPTIONS by letter.
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
READ = "\nAnswer with one letter, A, B or C."
WRITTEN = '\nExplain briefly why, then end with "Answer:" and one letter, A, B or C.'
_MARK = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
# A letter that ends there, or ends as a label does: in "A wrong one" there is none.
_LETTER = re.compile(r"[\s*(]*([ABC])\**(?:[).:,]|\s*$|\s*\n)")


def questions(example: Example, config: ConfidenceConfig) -> list[Example]:
    """All questions about one example: each template with each order of the options, or with the first alone."""
    orders, end = (ORDERS, READ) if config.reflection == "probabilities" else (ORDERS[:1], WRITTEN)
    prompt = plain_text(example.prompt)
    found = []
    for template in config.reflection_templates:
        for order in orders:
            lines = (f"{letter}: {OPTIONS[i]}" for letter, i in zip(LETTERS, order, strict=True))
            text = template.format(prompt=prompt, answer=example.response, options="\n".join(lines))
            found.append(Example(example.id, text + end, ""))
    return found


def reflect(respondent: Respondent, examples: Sequence[Example], config: ConfidenceConfig) -> np.ndarray:
    """Probabilities of the options correct, incorrect and not sure, float64 `[n, templates, 3]`.

    Of a written text they are 0 and 1; one that takes no option (see `taken`) counts as not sure.
    """
    asked = [questions(example, config) for example in examples]
    flat = [question for own in asked for question in own]
    templates = len(config.reflection_templates)
    if config.reflection == "text":
        replies = respondent.answers(flat, 0, config.reflection_max_new_tokens)
        options = [taken(own[0].text) for own in replies]
        places = [OPTIONS.index("I am not sure") if one is None else one for one in options]
        return np.eye(len(OPTIONS))[places].reshape(len(examples), templates, len(OPTIONS))
    groups = [row for row, own in enumerate(asked) for _ in own]
    letters = respondent.options(flat, groups, LETTERS).reshape(len(examples), templates, len(ORDERS), len(LETTERS))
    found = np.zeros((len(examples), templates, len(OPTIONS)))
    for number, order in enumerate(ORDERS):
        found[..., list(order)] += letters[:, :, number] / len(ORDERS)
    return found


def taken(text: str) -> int | None:
    """Number of the option that a written text takes, in the order of `OPTIONS`; None where that cannot be told.

    That is the letter that follows the last "answer:" or "answer is", or else begins the text, as in "(B)", "B." or
    "B" alone; or an option in full, alone on the line there. Among other words none is looked for: it may be negated.
    """
    marks = [found.end() for found in _MARK.finditer(text)]
    said = text[marks[-1] :] if marks else text
    letter = _LETTER.match(said)
    if letter is not None:
        return LETTERS.index(letter[1])
    line = said.strip().partition("\n")[0].strip(" .*\"'").lower()
    return next((number for number, option in enumerate(OPTIONS) if line == option.lower()), None)
