"""Whether targets that a fine-tuned model proposes are better than those in the data, as the base model judges (CLEAR).

Chen and Mueller 2024 (arXiv 2403.12776), section 3.2. Ours is that a proposal must win in both positions, since judges
prefer a position whatever stands there, and that the verdict is read from the probabilities of the letters, in every
order of the options (`choices`). How sure the verdict is comes from the confidence of the answer that it is
("confidence", the paper's) or, in one pass without samples, from these probabilities ("probability").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from duet_jax.config import PREFERENCE, ClearConfig, ConfidenceConfig
from duet_jax.curation.asking import askable, confidence
from duet_jax.curation.choices import LETTERS, ask, lines, orders
from duet_jax.curation.confidence import same_answer
from duet_jax.curation.decisions import Decision, Filter, actions, auto_correct
from duet_jax.curation.parts import Progress, in_parts
from duet_jax.curation.respondent import CHUNK, Respondent, fits
from duet_jax.data import Example
from duet_jax.data.example import plain_text

OPTIONS = ("The first answer is better", "The second answer is better", "They are equally good")


class Verdicts(NamedTuple):
    """What a judge says of n proposals.

    NaN where there is nothing to judge: a proposal is empty or the target itself, or too long for the judge to read.

    Attributes:
      first, second: float64 `[n, 3]`, probabilities of proposal, target and tie, with the proposal as the first
        answer and as the second.
      better: bool `[n]`, whether the proposal is the most probable in both positions.
      acceptance: float64 `[n]`, confidence in the verdict, the mean of both positions; NaN also where the questions
        about it are too long.
    """

    first: np.ndarray
    second: np.ndarray
    better: np.ndarray
    acceptance: np.ndarray


def judge(
    respondent: Respondent,
    examples: Sequence[Example],
    proposals: Sequence[str],
    config: ConfidenceConfig,
    folder: Path,
    *,
    acceptance: Literal["confidence", "probability"] = "confidence",
    template: str = PREFERENCE,
    on_progress: Progress = lambda name, done, of: None,
) -> Verdicts:
    """Compares each proposal with the example's response.

    Args:
      respondent: the base model.
      examples: n of them.
      proposals: n texts, such as greedy answers of a model that was trained on the kept examples.
      config: of the confidence in verdicts.
      folder: keeps what was computed.
      acceptance: how sure a verdict is, see above.
      template: of the question, with {prompt}, {first}, {second} and {options}, of which the last is a tie.
      on_progress: is told a stage, examples done and of how many.

    Raises:
      DuetError: as `asking.confidence`.
    """

    def both(row: int) -> list[list[Example]]:
        return [questions(examples[row], proposals[row], template, place) for place in (0, 1)]

    differ = [row for row, (e, y) in enumerate(zip(examples, proposals, strict=True)) if _differs(e.response, y)]
    sizes: dict[int, int] = {}
    # In chunks, for the questions about a pair are many times its texts.
    for at in range(0, len(differ), CHUNK):
        rows = differ[at : at + CHUNK]
        lengths = respondent.sizes([one for row in rows for place in both(row) for one in place])
        sizes |= zip(rows, np.reshape(lengths, (len(rows), -1)).max(axis=1).tolist(), strict=True)
    judged = [row for row in differ if sizes[row] <= respondent.longest]

    def compute(rows: list[int]) -> list[list[list[float]]]:
        every = [place for row in rows for place in both(judged[row])]
        found, _ = ask(respondent, every, [row for row in rows for _ in (0, 1)])
        return np.reshape(found, (len(rows), 2, len(OPTIONS))).tolist()

    pairs = [[examples[row].prompt, examples[row].response, proposals[row]] for row in judged]
    identity = [respondent.identity, template, OPTIONS, LETTERS, pairs]
    options = np.full((len(examples), 2, len(OPTIONS)), np.nan)
    if judged:
        longest = [sizes[row] for row in judged]
        options[judged] = in_parts(folder, "judge", identity, longest, compute, on_progress)
    # With the proposal as the second answer, the options stand for target, proposal, tie.
    first, second = options[:, 0], options[:, 1][:, [1, 0, 2]]
    sure = (first[:, 0] + second[:, 0]) / 2
    better = prefers(first) & prefers(second)
    if acceptance == "confidence":
        sure = np.full(len(examples), np.nan)
        # The confidence in a verdict that is no reason to correct is not needed.
        winners = [row for row in judged if better[row]]
        verdicts = [
            dataclasses.replace(own[0], response=LETTERS[i]) for row in winners for i, own in enumerate(both(row))
        ]
        found = confidence(respondent, verdicts, config, folder, _named("judge", on_progress)).value
        sure[winners] = found.reshape(-1, 2).mean(axis=1)
    return Verdicts(first, second, better, sure)


def correctable(respondent: Respondent, examples: Sequence[Example], config: ClearConfig) -> np.ndarray:
    """Whether a proposal for each example, of as many tokens as it may have, can be written and judged, bool `[n]`."""
    asked = [questions(example, "", config.preference_template, 0)[0] for example in examples]
    found = fits(respondent, examples, config.max_new_tokens) & fits(respondent, asked, config.max_new_tokens)
    if config.acceptance == "confidence":
        verdicts = [dataclasses.replace(one, response=LETTERS[0]) for one in asked]
        found &= askable(respondent, verdicts, config.confidence, config.max_new_tokens)
    return found


def prefers(verdict: np.ndarray) -> np.ndarray:
    """Whether the proposal is more probable than target and tie, bool `[n]`, of `[n, 3]`; not where they are NaN."""
    return verdict[:, 0] > np.max(verdict[:, 1:], axis=1)


def decide(
    examples: Sequence[Example],
    confidences: np.ndarray,
    filtered: Filter,
    *,
    proposals: Sequence[str] | None = None,
    verdicts: Verdicts | None = None,
    eta: float = 0.8,
) -> list[Decision]:
    """The decision on each example, from what was measured.

    Args:
      examples: n of them.
      confidences: `[n]`, in their targets.
      filtered: of `decisions.auto_filter`.
      proposals, verdicts: of `judge`; None: examples are filtered alone.
      eta: that the acceptance of a proposal must exceed.
    """
    missing = np.full(len(examples), np.nan)
    better = np.zeros(len(examples), bool) if verdicts is None else verdicts.better
    acceptance = missing if verdicts is None else verdicts.acceptance
    found = actions(filtered.kept, auto_correct(better, acceptance, eta))
    return [
        Decision(
            id=example.id,
            action=found[row],
            confidence=float(confidences[row]),
            threshold=float(filtered.thresholds[row]),
            beaten=bool(filtered.beaten[row]),
            proposal=None if proposals is None else proposals[row],
            better=bool(better[row]),
            acceptance=float(acceptance[row]),
            eta=eta,
        )
        for row, example in enumerate(examples)
    ]


def _differs(target: str, proposal: str) -> bool:
    return bool(proposal.strip()) and not same_answer(target, proposal)


def questions(example: Example, proposal: str, template: str, place: int) -> list[Example]:
    """What the judge is asked, in all orders of the options: the proposal is the first answer at place 0, else the
    second."""
    first, second = (proposal, example.response) if place == 0 else (example.response, proposal)
    offered = [lines(OPTIONS, order) for order in orders(len(OPTIONS))]
    prompt = plain_text(example.prompt)
    texts = [template.format(prompt=prompt, first=first, second=second, options=options) for options in offered]
    return [Example(example.id, text, "") for text in texts]


def _named(prefix: str, on_progress: Progress) -> Callable[[str, int, int], None]:
    return lambda name, done, of: on_progress(f"{prefix}, {name}", done, of)
