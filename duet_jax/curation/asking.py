"""The pass that computes confidence: answers are sampled, compared with targets, and the model is asked about these.

Each stage takes all examples, in batches of like length, and is kept in parts in a folder. The target's likelihood and
all questions that are answered with a letter are one stage, so that those of an example share what they begin with
(`branches`), and equal pairs of answers are compared once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duet_jax.config import ConfidenceConfig
from duet_jax.curation import contradiction as contradictions
from duet_jax.curation import reflection
from duet_jax.curation.choices import LETTERS, ask
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
      examples: n of them, with a response each.
      config: how.
      folder: keeps what was computed, under hashes of all that it depends on.
      on_progress: is told a stage, examples done and of how many.

    Raises:
      ConfigError, ModelError: the function or classifier of contradictions cannot be had.
      DataError: an example has no response; before anything is computed.
      FeedbackError: contradictions cannot be computed.
    """
    empty = next((example.id for example in examples if not example.response), None)
    if empty is not None:
        raise DataError(f"example '{empty}' has no response to be confident in; leave it out, or name its column.")
    asked = askable(respondent, examples, config)
    drawn = config.samples if config.beta else 0
    more = {"similarities": [drawn], "matches": [drawn], "options": [len(config.reflection_templates), 3]}
    numbers = [name for name in Confidence._fields if name not in ("samples", "asked")]
    whole: dict[str, Any] = {name: np.full([len(examples), *more.get(name, [])], np.nan) for name in numbers}
    samples: tuple[tuple[str, ...], ...] = ()
    if asked.any():
        contradiction = build_contradiction(config, respondent)
        chosen = [example for example, there in zip(examples, asked, strict=True) if there]
        found = _asked(respondent, chosen, config, contradiction, folder, on_progress)
        for name, values in whole.items():
            values[asked] = getattr(found, name)
        samples = found.samples
    own = iter(samples)
    return Confidence(**whole, samples=tuple(next(own) if there else () for there in asked), asked=asked)


def require_asked(examples: Sequence[Example], found: Confidence, longest: int) -> None:
    """Raises a DataError where no question about any example fits the `longest` tokens that the model takes."""
    if not found.asked.any():
        raise DataError(
            f"no question about any of {len(examples)} examples, such as '{examples[0].id}', fits into the {longest} "
            f"tokens that the model takes, with room for what it writes; shorten the templates of the confidence, or "
            f"lower its max_new_tokens."
        )


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
            asked = [one for e in examples for own in reflection.questions(e, config) for one in own]
            found &= fits(respondent, asked, room + more).reshape(len(examples), -1).all(axis=1)
        if config.samples and config.beta:
            prompts = [dressed(example, config.sample_template) for example in examples]
            found &= fits(respondent, prompts, config.max_new_tokens + more)
            if config.contradiction == "judge" and config.alpha:
                pairs = [Pair(example, row, example.response, "") for row, example in enumerate(examples)]
                asked = [one for pair in pairs for one in contradictions.questions(pair, config.pair_template)]
                found &= fits(respondent, asked, config.max_new_tokens + more).reshape(len(examples), -1).all(axis=1)
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
    if unread := int((found.options == reflection.UNREADABLE).all(axis=-1).sum()):
        written = int((~np.isnan(found.options[..., 0])).sum())
        parts.append(f"{unread} of {written} written reflections take no option and count as not sure")
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

    templates = list(config.reflection_templates) if weights["reflection"] else []
    offered = [reflection.OPTIONS, LETTERS]
    options = np.full((count, len(config.reflection_templates), 3), np.nan)
    if templates and config.reflection == "text":
        options[:] = stage(
            "reflection",
            [templates, reflection.WRITTEN, offered, config.reflection_max_new_tokens],
            lambda rows: reflection.written(respondent, [examples[row] for row in rows], config).tolist(),
        )
        templates = []
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
    compared = contradiction if len(samples[0]) and config.alpha else None
    if compared is not None and compared.questions is None:
        similarities[:] = stage(
            "contradiction", [compared.identity, samples], lambda rows: _compare(compared, rows, examples, samples)
        )
        compared = None
    found = stage(
        "questions",
        [templates and [templates, reflection.READ, offered], compared and [compared.identity, samples]],
        lambda rows: _read(respondent, rows, examples, samples, config, bool(templates), compared),
    )
    log_prob, tokens = np.array([own for own, _, _ in found]).T
    if templates:
        options[:] = [own for _, own, _ in found]
    if compared is not None:
        similarities[:] = [own for _, _, own in found]
    matches = np.array([_matches(*pair) for pair in zip(examples, samples, strict=True)]).reshape(similarities.shape)
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


def _read(
    respondent: Respondent,
    rows: list[int],
    examples: Sequence[Example],
    samples: list[list[str]],
    config: ConfidenceConfig,
    reflects: bool,
    compared: Contradiction | None,
) -> list[tuple[list[float], list[list[float]], list[float]]]:
    """What is read of each row: how probable its response is, its options of self-reflection, and its similarities
    with samples."""
    pairs = [[] if compared is None else _pairs(examples[row], row, samples[row]) for row in rows]
    asked: list[list[Example]] = []
    groups: list[int] = []
    for row, own in zip(rows, pairs, strict=True):
        if reflects:
            asked += reflection.questions(examples[row], config)
        if compared is not None and compared.questions is not None:
            asked += map(compared.questions, own)
        groups += [row] * (len(asked) - len(groups))
    told, likelihoods = ask(respondent, asked, groups, [examples[row] for row in rows], rows)
    answers, found = iter(told), []
    for row, own, likelihood in zip(rows, pairs, likelihoods.tolist(), strict=True):
        options = [next(answers).tolist() for _ in config.reflection_templates] if reflects else []
        known = {(pair.first, pair.second): float(next(answers)[0]) for pair in own}
        found.append((likelihood, options, _similarities(examples[row], samples[row], known)))
    return found


def _compare(
    contradiction: Contradiction, rows: list[int], examples: Sequence[Example], samples: list[list[str]]
) -> list[list[float]]:
    """Similarities of the response of each row with each of its samples, by a classifier or a function."""
    pairs = [pair for row in rows for pair in _pairs(examples[row], row, samples[row])]
    values = contradiction.function(pairs).tolist() if pairs else []
    known: dict[int, dict[tuple[str, str], float]] = {row: {} for row in rows}
    for pair, value in zip(pairs, values, strict=True):
        known[pair.group][pair.first, pair.second] = value
    return [_similarities(examples[row], samples[row], known[row]) for row in rows]


def _pairs(example: Example, row: int, samples: Sequence[str]) -> list[Pair]:
    """Those of the response and an answer that is not empty, in both orders; equal ones once."""
    target = example.response
    answers = [one for one in map(final_answer, samples) if one]
    wanted = {pair for one in answers for pair in ((target, one), (one, target))}
    return [Pair(example, row, *pair) for pair in sorted(wanted)]


def _similarities(example: Example, samples: Sequence[str], known: Mapping[tuple[str, str], float]) -> list[float]:
    """From the probabilities of contradiction of pairs; NaN for an empty sample, and where a pair is too long."""
    missing, target = float("nan"), example.response
    pairs = [(target, answer) for answer in map(final_answer, samples)]
    forward, backward = (
        np.array([known.get(pair, missing) for pair in own]) for own in (pairs, [pair[::-1] for pair in pairs])
    )
    return similarity(forward, backward).tolist()


def _matches(example: Example, samples: Sequence[str]) -> list[float]:
    return [float(same_answer(example.response, one)) if final_answer(one) else float("nan") for one in samples]
