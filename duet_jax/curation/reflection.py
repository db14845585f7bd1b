"""Self-reflection: a model is asked whether a proposed answer is correct, and takes one of three options.

BSDetector (arXiv 2308.16175), section 3.2, has it write a text and looks for the option in it. Here the option is read
from the probabilities of the letters, which needs one pass and no parsing, in every order of the options (`choices`).
The way of the paper is there as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation.choices import LETTERS, lines, orders
from duet_jax.curation.respondent import Respondent
from duet_jax.data import Example
from duet_jax.data.example import plain_text

OPTIONS = ("Correct", "Incorrect", "I am not sure")
# The share of every option for a text that takes none.
UNREADABLE = 1 / len(OPTIONS)
# Before the options, for it is the same in all orders and goes through the network once.
READ = "Answer with one letter, A, B or C.\n"
WRITTEN = '\nExplain briefly why, then end with "Answer:" and one letter, A, B or C.'
_MARK = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
# A letter that ends there, or ends as a label does: in "A wrong one" there is none.
_LETTER = re.compile(r"[\s*(]*([ABC])\**(?:[).:,]|\s*$|\s*\n)")


def questions(example: Example, config: ConfidenceConfig) -> list[list[Example]]:
    """What is asked about one example: each template in all orders of the options, or to be answered with a text."""
    prompt = plain_text(example.prompt)

    def asked(template: str, options: str, end: str = "") -> Example:
        return Example(example.id, template.format(prompt=prompt, answer=example.response, options=options) + end, "")

    every = [lines(OPTIONS, order) for order in orders(len(OPTIONS))]
    if config.reflection == "text":
        return [[asked(template, every[0], WRITTEN)] for template in config.reflection_templates]
    return [[asked(template, READ + options) for options in every] for template in config.reflection_templates]


def written(respondent: Respondent, examples: Sequence[Example], config: ConfidenceConfig) -> np.ndarray:
    """Which options texts take that the respondent writes, 0 and 1 `[n, templates, 3]`.

    One that takes no option (see `taken`) says nothing: it has `UNREADABLE`, which is worth what not sure is.
    """
    flat = [one for example in examples for own in questions(example, config) for one in own]
    replies = respondent.answers(flat, 0, config.reflection_max_new_tokens)
    options = [taken(own[0].text) for own in replies]
    found = [np.full(len(OPTIONS), UNREADABLE) if one is None else np.eye(len(OPTIONS))[one] for one in options]
    return np.reshape(found, (len(examples), -1, len(OPTIONS)))


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
