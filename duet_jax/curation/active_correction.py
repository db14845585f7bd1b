"""One round of correcting labels, with people for a few of them.

ALC3 (Taneja and Goel 2024, arXiv 2401.05467): a model is trained on noisily labelled data; labels that it contradicts
with very high confidence are replaced, those that are most likely wrong are sent to people, and some of the remaining
suspicious ones are left out. Only what people said outlives a round: the next one begins with the first labels again.

The labels here are right choices of multiple-choice questions, and the model's probabilities are those of the choices'
log-likelihoods. They are out-of-fold: a model that has learnt a wrong label would not doubt it. An example is as
suspicious as the probability of the model's choice exceeds that of the label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from duet_jax.config import ActiveCorrectionConfig
from duet_jax.curation.bench import Bench, Curated, lines, read_answers
from duet_jax.data import Domain, Example
from duet_jax.data.example import any_chat, as_row, plain_text
from duet_jax.errors import DataError
from duet_jax.feedback.tasks import MultipleChoice


class Review(NamedTuple):
    """What is done with n labels.

    Attributes:
      predicted: int64 `[n]`, the most probable choice, the first of equals.
      suspicion: float64 `[n]`, its probability less the label's.
      correct: rows whose labels become `predicted`, ascending.
      query: rows that people check, most suspicious first.
      drop: rows that are left out, most suspicious first.
    """

    predicted: np.ndarray
    suspicion: np.ndarray
    correct: np.ndarray
    query: np.ndarray
    drop: np.ndarray


def review(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    trusted: np.ndarray,
    *,
    correct_above: float,
    budget: int,
    drop: int,
) -> Review:
    """Decides about every label; equally suspicious ones come in order.

    Args:
      probabilities: `[choices]` of each of n examples.
      labels: int `[n]`.
      trusted: bool `[n]`, labels that people gave: they stay.
      correct_above: probability of another choice above which it becomes the label.
      budget, drop: labels to check, and then to leave out, at most: no more than are contradicted.
    """
    predicted = np.array([int(np.argmax(part)) for part in probabilities], np.int64)
    highest = np.array([part.max() for part in probabilities])
    own = np.array([part[label] for part, label in zip(probabilities, labels, strict=True)])
    suspicion = np.where(predicted == labels, 0.0, highest - own)
    contradicted = (predicted != labels) & ~trusted
    correct = contradicted & (highest > correct_above)
    order = np.argsort(-suspicion, kind="stable")
    waiting = order[(contradicted & ~correct)[order]]
    return Review(predicted, suspicion, np.flatnonzero(correct), waiting[:budget], waiting[budget : budget + drop])


def curate(bench: Bench, config: ActiveCorrectionConfig) -> Curated:
    """Reviews the labels of the one domain.

    Files: check.jsonl, the questions for people, who answer with rows of `id` and `answer_index` in the file
    `answers`; corrected.jsonl, the examples with their new labels, without the dropped ones and with those that are to
    be checked as they were; changes.jsonl, what was done with whom. A changed label's choice is the new response.

    Raises:
      DataError: an example is no multiple-choice question, or an answer is of no example or no choice.
      ModelError: a checkpoint in the folder is of other data.
    """
    (domain,) = bench.domains
    examples = domain.train
    if len(examples) < config.folds:
        raise DataError(
            f"domain '{domain.name}' has {len(examples)} examples, fewer than active_correction.folds ({config.folds})."
        )
    task = MultipleChoice.build(bench.student.engine, examples, domain.name, config.batch_size, per_byte=False)
    given = np.array([example.answer_index for example in examples])
    labels, trusted = _checked(config.answers, domain, given)
    probabilities = _out_of_fold(bench, config, examples, labels, task)
    found = review(
        probabilities,
        labels,
        trusted,
        correct_above=config.correct_above,
        budget=config.budget,
        drop=config.drop,
    )
    final = labels.copy()
    final[found.correct] = found.predicted[found.correct]
    dropped = set(found.drop.tolist())
    kept = [_relabelled(example, final[row]) for row, example in enumerate(examples) if row not in dropped]
    chat = any_chat(kept)
    actions = [
        ("people", np.flatnonzero(trusted & (labels != given))),
        ("corrected", found.correct),
        ("to check", found.query),
        ("dropped", found.drop),
    ]
    files = {
        "check.jsonl": lines(_question(examples[row], found, probabilities[row], row) for row in found.query.tolist()),
        "corrected.jsonl": lines(as_row(example, chat=chat) for example in kept),
        "changes.jsonl": lines(
            {
                "id": examples[row].id,
                "action": action,
                "from": int(given[row]),
                "to": int(final[row]),
                "suspicion": float(found.suspicion[row]),
            }
            for action, rows in actions
            for row in rows.tolist()
        ),
    }
    counts = " · ".join(f"{action} {len(rows)}" for action, rows in actions)
    return Curated(files, f"{len(examples)} labels, {int(trusted.sum())} given by people; {counts}")


def _checked(path: str | None, domain: Domain, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels after people's answers, and which of them are theirs."""
    labels, trusted = given.copy(), np.zeros(len(given), bool)
    rows = {example.id: row for row, example in enumerate(domain.train)}
    for identifier, answer in [] if path is None else read_answers(path, rows, "active_correction.answers"):
        row, label = rows[identifier], answer.columns.get("answer_index")
        count = len(domain.train[row].choices)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
            raise DataError(
                f"active_correction.answers: {answer.where} has answer_index {label!r}; it must be a whole number from "
                f"0 to {count - 1}."
            )
        labels[row], trusted[row] = label, True
    return labels, trusted


def _out_of_fold(
    bench: Bench, config: ActiveCorrectionConfig, examples: Sequence[Example], labels: np.ndarray, task: MultipleChoice
) -> list[np.ndarray]:
    """Probabilities of each example's choices by a model that was trained on the other folds."""
    engine = bench.student.engine
    fold = np.random.default_rng([bench.seed, 0]).permutation(len(examples)) % config.folds
    chosen = [
        dataclasses.replace(example, response=example.choices[label])
        for example, label in zip(examples, labels, strict=True)
    ]

    def one(part: list[int]) -> list[list[list[float]]]:
        (number,) = part
        others = [chosen[row] for row in np.flatnonzero(fold != number)]
        model = bench.trained(engine.encode(others, "active_correction"), f"fold {number + 1} of {config.folds}")
        own = np.flatnonzero(fold == number)
        rows = np.concatenate([np.arange(task.starts[row], task.starts[row + 1]) for row in own])
        sums = model.log_probs(task.encoded.take(rows), config.batch_size)
        sizes = task.starts[own + 1] - task.starts[own]
        return [[_softmax(values).tolist() for values in np.split(sums, np.cumsum(sizes)[:-1])]]

    identity = [engine.encode(chosen, "active_correction").digest, task.encoded.digest]
    found: list[np.ndarray] = [np.zeros(0)] * len(examples)
    for number, values in enumerate(bench.kept("folds", identity, [1] * config.folds, one, 1)):
        for row, part in zip(np.flatnonzero(fold == number), values, strict=True):
            found[row] = np.array(part)
    return found


def _softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def _relabelled(example: Example, label: int) -> Example:
    if label == example.answer_index:
        return example
    # The old answer, in words, would be accepted where replies are judged.
    meta = {name: value for name, value in example.meta.items() if name not in ("answer", "answers")}
    meta["answer_index"] = int(label)
    return dataclasses.replace(example, response=example.choices[label], answer_index=int(label), answers=(), meta=meta)


def _question(example: Example, found: Review, probabilities: np.ndarray, row: int) -> dict:
    return {
        "id": example.id,
        "prompt": plain_text(example.prompt),
        "choices": list(example.choices),
        "answer_index": example.answer_index,
        "suggestion": int(found.predicted[row]),
        "suspicion": float(found.suspicion[row]),
        "probabilities": probabilities.tolist(),
    }
