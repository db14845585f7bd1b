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
from duet_jax.curation.contradiction import Contradiction, Pair, build_contradiction, question
from duet_jax.curation.parts import Progress, in_parts
from duet_jax.curation.respondent import CHUNK, Respondent, fits
from duet_jax.data import Example
from duet_jax.errors import DataError

# Ids that are named where something is told of many.
FEW = 3


class Confidence(NamedTuple):
    """Confidence in n targets, and what led to it; NaN where a number is missing.

    Attributes:
      value: float64 `[n]` in [0, 1].
      similarity, match, reflection, likelihood: float64 `[n]` in [0, 1], its parts.
      log_prob: float64 `[n]`, of the target with its end of text, nats.
      tokens: float64 `[n]`, that it is the sum over.
      similarities, matches: float64 `[n, samples]`, of the target with each sample.
      options: float64 `[n, templates, 3]`, probabilities of correct, incorrect and not sure.
      samples: `[n][samples]`, the answers; none of an example that was not asked about.
      asked: bool `[n]`, whether all questions about an example fit the model's context; where not, nothing was asked,
        and every number is NaN.
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
    asked: np.ndarray


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
      DataError: an example has no response, or no example fits the model's context; before anything is computed.
      FeedbackError: contradictions cannot be computed.
    """
    contradiction = build_contradiction(config, respondent)
    empty = next((example.id for example in examples if not example.response), None)
    if empty is not None:
        raise DataError(f"example '{empty}' has no response to be confident in; leave it out, or name its column.")
    asked = askable(respondent, examples, config)
    if not asked.any():
        raise DataError(
            f"no question about any of {len(examples)} examples, such as '{examples[0].id}', fits into the "
            f"{respondent.longest} tokens that the model takes, with room for what it writes; shorten the templates of "
            f"the confidence, or lower its max_new_tokens."
        )
    chosen = [example for example, there in zip(examples, asked, strict=True) if there]
    found = _asked(respondent, chosen, config, contradiction, folder, on_progress)
    whole: dict[str, Any] = {}
    for name, values in found._asdict().items():
        if isinstance(values, np.ndarray):
            whole[name] = np.full((len(examples), *values.shape[1:]), np.nan)
            whole[name][asked] = values
    own = iter(found.samples)
    whole |= {"samples": tuple(next(own) if there else () for there in asked), "asked": asked}
    return Confidence(**whole)


def askable(respondent: Respondent, examples: Sequence[Example], config: ConfidenceConfig, more: int = 0) -> np.ndarray:
    """Whether all questions about each example fit the model's context, bool `[n]`.

    Answers that are still to be sampled are taken to be as long as they may be; a pair with one that has more tokens
    beside the other has no probability of contradiction.

    Args:
      respondent: the model.
      examples: n of them.
      config: what is asked.
      more: tokens that each question is still to grow by.
    """

    def some(examples: Sequence[Example]) -> np.ndarray:
        found = np.ones(len(examples), bool)
        if config.weights["reflection"]:
            room = config.reflection_max_new_tokens if config.reflection == "text" else 0
            asked = [one for example in examples for one in reflection.questions(example, config)]
            found &= fits(respondent, asked, room + more).reshape(len(examples), -1).all(axis=1)
        if config.samples and config.beta:
            prompts = [dressed(example, config.sample_template) for example in examples]
            found &= fits(respondent, prompts, config.max_new_tokens + more)
            if config.contradiction == "judge" and config.alpha:
                pairs = [Pair(example, row, example.response, "") for row, example in enumerate(examples)]
                asked = [question(pair, config.pair_template) for pair in pairs]
                found &= fits(respondent, asked, config.max_new_tokens + more)
        return found

    # In chunks, for all questions about all examples are many times their texts.
    parts = [some(examples[at : at + CHUNK]) for at in range(0, len(examples), CHUNK)]
    return np.concatenate([np.ones(0, bool), *parts])


def summary(examples: Sequence[Example], found: Confidence) -> str:
    """Means of the confidence and its parts, and of how many examples there is none, for people."""
    names = ("value", "similarity", "match", "reflection", "likelihood")
    means = {name: float(known_mean(getattr(found, name))) for name in names}
    parts = [", ".join(f"{name} {mean:.3g}" for name, mean in means.items() if not np.isnan(mean)) or "none can be had"]
    if unknown := int(np.isnan(found.value).sum()):
        parts.append(f"{unknown} of {len(examples)} examples have none and are left out")
    if long := [example.id for example, asked in zip(examples, found.asked, strict=True) if not asked]:
        parts.append(f"{len(long)} are longer than the model takes with the questions ({first_of(long)})")
    return f"means of the confidence and its parts: {'; '.join(parts)}"


def first_of(ids: Sequence[str]) -> str:
    """The first few of some ids, for people."""
    return ", ".join(map(repr, ids[:FEW])) + (", ..." if len(ids) > FEW else "")


def _asked(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    contradiction: Contradiction,
    folder: Path,
    on_progress: Progress,
) -> Confidence:
    """`confidence` of examples whose questions fit."""
    sizes = respondent.sizes(examples)
    count = len(examples)
    weights = config.weights
    texts = [[example.prompt, example.response] for example in examples]

    def stage(name: str, identity: Any, compute: Any, texts: Any = texts) -> list[Any]:
        return in_parts(folder, name, [identity, respondent.identity, texts], sizes, compute, on_progress)

    likelihoods = np.array(
        stage("likelihood", None, lambda rows: respondent.log_probs([examples[row] for row in rows]).tolist())
    )
    options = np.full((count, len(config.reflection_templates), 3), np.nan)
    if weights["reflection"]:
        written = config.reflection_max_new_tokens if config.reflection == "text" else None
        asked = [config.reflection, list(config.reflection_templates), written]
        options[:] = stage(
            "reflection",
            asked,
            lambda rows: reflection.reflect(respondent, [examples[row] for row in rows], config).tolist(),
        )
    samples: list[list[str]] = [[] for _ in examples]
    if config.samples and config.beta:
        prompts = [dressed(example, config.sample_template) for example in examples]
        limits = [config.samples, config.max_new_tokens, list(config.stop), respondent.writing]

        def sample(rows: list[int]) -> list[list[str]]:
            some = [prompts[row] for row in rows]
            found = respondent.answers(some, config.samples, config.max_new_tokens, config.stop)
            return [[reply.text for reply in own] for own in found]

        # Of the prompts alone, so that another response is compared with the same samples.
        samples = stage("samples", limits, sample, [prompt.prompt for prompt in prompts])
    similarities = np.full((count, len(samples[0])), np.nan)
    if len(samples[0]) and config.alpha:
        similarities[:] = stage(
            "contradiction",
            [contradiction.identity, samples],
            lambda rows: _similarities(contradiction, rows, examples, samples),
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
        asked=np.ones(count, bool),
    )


def dressed(example: Example, template: str) -> Example:
    """The example with the template around its prompt, or around the last message of a conversation."""
    # A conversation may be a reply alone.
    prompt = example.prompt or ""
    if isinstance(prompt, str):
        return dataclasses.replace(example, prompt=template.format(prompt=prompt))
    *before, last = prompt
    asked = {**last, "content": template.format(prompt=last["content"])}
    return dataclasses.replace(example, prompt=(*before, asked))


def _similarities(
    contradiction: Contradiction, rows: list[int], examples: Sequence[Example], samples: list[list[str]]
) -> list[list[float]]:
    """Of the response of each row with each of its samples; NaN for an empty sample, and where a pair is too
    long. Equal pairs are compared once."""
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
