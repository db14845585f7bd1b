"""The pass that computes confidence: answers are sampled, compared with targets, and the model is asked about these.

Each stage takes all examples, in batches of like length, and is kept in parts in a folder. Questions about an example
that begin alike go through the network in one row (`branches`); equal pairs of answers are compared once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation import reflection
from duet_jax.curation.confidence import (
    combine,
    final_answer,
    known_mean,
    reflection_score,
    same_answer,
    similarity,
)
from duet_jax.curation.contradiction import Contradiction, Pair, build_contradiction
from duet_jax.curation.parts import Progress, in_parts
from duet_jax.curation.respondent import Respondent
from duet_jax.data import Example
from duet_jax.errors import DataError


class Confidence(NamedTuple):
    """Confidence in n targets, and what led to it; NaN where a number is missing.

    Attributes:
      value: float64 `[n]` in [0, 1].
      similarity, match, reflection, likelihood: float64 `[n]` in [0, 1], its parts.
      log_prob: float64 `[n]`, of the target with its end of text, nats.
      tokens: float64 `[n]`, that it is the sum over.
      similarities, matches: float64 `[n, samples]`, of the target with each sample.
      options: float64 `[n, templates, 3]`, probabilities of correct, incorrect and not sure.
      samples: `[n][samples]`, the answers.
    """

    value: np.ndarray
    similarity: np.ndarray
    match: np.ndarray
    reflection: np.ndarray
    likelihood: np.ndarray
    log_prob: np.ndarray
    tokens: np.ndarray
    similarities: np.ndarray
    matches: np.ndarray
    options: np.ndarray
    samples: tuple[tuple[str, ...], ...]


def confidence(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> Confidence:
    """How sure a model is that each example's response answers its prompt.

    Accepted answers (`Example.answers`) are not looked at: it is the response that is judged.

    Args:
      respondent: the model.
      examples: n of them, at least one, with a response each.
      config: how.
      folder: keeps what was computed, under hashes of all that it depends on.
      on_progress: is told a stage, examples done and of how many.

    Raises:
      ConfigError, ModelError: the function or classifier of contradictions cannot be had.
      DataError: an example has no response, or is longer than the model takes; before anything is computed, but for
        pairs of answers whose tokens are more than those of both.
      FeedbackError: contradictions cannot be computed.
    """
    contradiction = build_contradiction(config, respondent)
    _check(respondent, examples, config, contradiction)
    sizes = respondent.sizes(examples)
    count = len(examples)
    weights = config.weights

    def stage(name: str, identity: Any, compute: Any) -> list[Any]:
        texts = [[example.prompt, example.response] for example in examples]
        return in_parts(folder, name, [identity, respondent.identity, texts], sizes, compute, on_progress)

    likelihoods = np.array(
        stage("likelihood", None, lambda rows: respondent.log_probs([examples[row] for row in rows]).tolist())
    )
    options = np.full((count, len(config.reflection_templates), 3), np.nan)
    if weights["reflection"]:
        written = respondent.writing if config.reflection == "text" else None
        asked = [config.reflection, list(config.reflection_templates), written]
        options[:] = stage(
            "reflection",
            asked,
            lambda rows: reflection.reflect(respondent, [examples[row] for row in rows], config).tolist(),
        )
    samples: list[list[str]] = [[] for _ in examples]
    if config.samples and config.beta:
        prompts = [dressed(example, config.sample_template) for example in examples]
        asked = [config.samples, config.sample_template, respondent.writing]
        samples = stage(
            "samples", asked, lambda rows: respondent.answers([prompts[row] for row in rows], config.samples)
        )
    similarities = np.full((count, len(samples[0])), np.nan)
    if len(samples[0]) and config.alpha:
        asked = [contradiction.identity, samples]
        similarities[:] = stage(
            "contradiction", asked, lambda rows: _similarities(contradiction, rows, examples, samples)
        )
    matches = np.array([_matches(*pair) for pair in zip(examples, samples, strict=True)]).reshape(similarities.shape)
    log_prob, tokens = likelihoods.T
    parts = {
        "similarity": known_mean(similarities),
        "match": known_mean(matches),
        "reflection": reflection_score(options),
        "likelihood": np.exp(log_prob / tokens),
    }
    return Confidence(
        value=combine(parts, weights),
        **parts,
        log_prob=log_prob,
        tokens=tokens,
        similarities=similarities,
        matches=matches,
        options=options,
        samples=tuple(map(tuple, samples)),
    )


def dressed(example: Example, template: str) -> Example:
    """The example with the template around its prompt, or around the last message of a conversation."""
    prompt = example.prompt
    if isinstance(prompt, str):
        return dataclasses.replace(example, prompt=template.format(prompt=prompt))
    *before, last = prompt
    asked = {**last, "content": template.format(prompt=last["content"])}
    return dataclasses.replace(example, prompt=(*before, asked))


def _check(
    respondent: Respondent, examples: Sequence[Example], config: ConfidenceConfig, contradiction: Contradiction
) -> None:
    empty = next((example.id for example in examples if not example.response), None)
    if empty is not None:
        raise DataError(f"example '{empty}' has no response to be confident in; leave it out, or name its column.")
    if config.weights["reflection"]:
        asked = [one for example in examples for one in reflection.questions(example, config)]
        respondent.check(asked, writes=config.reflection == "text")
    if config.samples and config.beta:
        respondent.check([dressed(example, config.sample_template) for example in examples], writes=True)
        if contradiction.question is not None and config.alpha:
            pairs = [Pair(example, row, example.response, "") for row, example in enumerate(examples)]
            respondent.check([contradiction.question(pair) for pair in pairs], writes=True)


def _similarities(
    contradiction: Contradiction, rows: list[int], examples: Sequence[Example], samples: list[list[str]]
) -> list[list[float]]:
    """Of the response of each row with each of its samples; NaN for an empty sample. Equal pairs are compared once."""
    wanted = {
        (row, *pair)
        for row in rows
        for answer in map(final_answer, samples[row])
        if answer
        for pair in ((examples[row].response, answer), (answer, examples[row].response))
    }
    ordered = sorted(wanted)
    pairs = [Pair(examples[row], row, first, second) for row, first, second in ordered]
    known = dict(zip(ordered, contradiction.function(pairs) if pairs else [], strict=True))

    def one(row: int, answer: str) -> float:
        target = examples[row].response
        if not answer:
            return float("nan")
        return float(similarity(known[row, target, answer], known[row, answer, target]))

    return [[one(row, final_answer(sample)) for sample in samples[row]] for row in rows]


def _matches(example: Example, samples: Sequence[str]) -> list[float]:
    return [float(same_answer(example.response, one)) if final_answer(one) else float("nan") for one in samples]
