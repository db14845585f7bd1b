"""Answers of a deployed model with the confidence in each, so that it can abstain where it is not sure.

The confidence is BSDetector's (Chen and Mueller 2024, arXiv 2308.16175), of the greedy answer. Its variant that gives
the surest of several sampled answers, at as many times the cost, is not here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duet_jax.config import AnswersConfig, ConfidenceConfig
from duet_jax.curation.asking import confidence
from duet_jax.curation.bench import Bench, Curated, lines
from duet_jax.curation.calibrated import calibration, selective
from duet_jax.curation.parts import Progress, in_parts
from duet_jax.curation.respondent import ModelRespondent, Respondent
from duet_jax.data import Example
from duet_jax.data.example import plain_text
from duet_jax.errors import ConfigError, DataError
from duet_jax.feedback import Deployed
from duet_jax.feedback.rewards import build_reward
from duet_jax.report.abstention import page


class Answers(NamedTuple):
    """Greedy answers to n prompts.

    Attributes:
      texts: n of them.
      confidence: float64 `[n]` in [0, 1]; 0 for an empty answer, and for one of which no confidence can be had (see
        `asking.Confidence`), so that the model abstains.
    """

    texts: tuple[str, ...]
    confidence: np.ndarray

    def given(self, threshold: float) -> tuple[str | None, ...]:
        """The answers with a confidence of at least the threshold; None where the model abstains."""
        return tuple(text if sure >= threshold else None for text, sure in zip(*self, strict=True))


def propose(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> list[str]:
    """A model's greedy answers to prompts as they are, without white space around them; kept in `folder` in parts.

    An answer ends after `config.max_new_tokens` tokens at the latest.

    Raises:
      DataError: a prompt and an answer are longer than the model takes; before anything is computed.
    """
    sizes = respondent.sizes(examples)
    for example, size in zip(examples, sizes, strict=True):
        if size + config.max_new_tokens > respondent.longest:
            raise DataError(
                f"example '{example.id}': its prompt of {size} tokens and an answer of up to {config.max_new_tokens} "
                f"are more than the {respondent.longest} tokens that the model takes; leave it out, or lower "
                f"max_new_tokens."
            )
    stop = config.stop
    identity = [respondent.identity, config.max_new_tokens, list(stop), [example.prompt for example in examples]]

    def compute(rows: list[int]) -> list[str]:
        found = respondent.answers([examples[row] for row in rows], 0, config.max_new_tokens, stop)
        return [replies[0].text.strip() for replies in found]

    return in_parts(folder, "answers", identity, sizes, compute, on_progress)


def answer(
    respondent: Respondent,
    examples: Sequence[Example],
    config: ConfidenceConfig,
    folder: Path,
    on_progress: Progress = lambda name, done, of: None,
) -> Answers:
    """A model's greedy answers, and its own confidence in them; responses of the examples are not looked at.

    Raises:
      DuetError: as `propose` and `asking.confidence`.
    """
    texts = propose(respondent, examples, config, folder, on_progress)
    said = [dataclasses.replace(e, response=text) for e, text in zip(examples, texts, strict=True) if text]
    value = confidence(respondent, said, config, folder, on_progress).value
    found = np.zeros(len(texts))
    # The probability of a sure text may be rounded above 1.
    found[[bool(text) for text in texts]] = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
    return Answers(tuple(texts), found)


def curate(bench: Bench, config: AnswersConfig) -> Curated:
    """Answers the prompts of all domains.

    Files: answers.jsonl, a row for each prompt: id, domain, prompt, answer, confidence, abstain (whether the confidence
    is below the threshold) and score, None where nothing says what is right. Where anything does, calibration.json (see
    `measured`) and calibration.html, the same as a page with figures.

    Raises:
      ConfigError: the reward has values that are not in [0, 1].
      DuetError: as `answer`, `build_reward` and `Reward`.
    """
    reward = build_reward(config.reward, bench.folder / "rewards")
    if reward.low < 0 or reward.high > 1:
        raise ConfigError(
            f"answers.reward: the values of {reward.name} lie in [{reward.low:g}, {reward.high:g}], but how right an "
            f"answer is must lie in [0, 1]; take another reward."
        )
    student = bench.student
    names = [domain.name for domain in bench.domains for _ in domain.train]
    examples = [example for domain in bench.domains for example in domain.train]
    rows = [row for row, e in enumerate(examples) if e.response or e.answers or not reward.needs_label]
    known = [examples[row] for row in rows]
    reward.check(known)
    model = Deployed(student.engine, student.trainer.load_base())
    respondent = ModelRespondent(model, student.fingerprint, config.confidence, bench.seed)
    found = answer(respondent, examples, config.confidence, bench.folder / "answers", bench.on_progress)
    scores = np.full(len(examples), np.nan)
    scores[rows] = reward([found.texts[row] for row in rows], known)
    given = found.given(config.threshold)
    files: dict[str, str | bytes] = {
        "answers.jsonl": lines(
            {
                "id": example.id,
                "domain": names[row],
                "prompt": plain_text(example.prompt),
                "answer": found.texts[row],
                "confidence": float(found.confidence[row]),
                "abstain": given[row] is None,
                "score": None if np.isnan(scores[row]) else float(scores[row]),
            }
            for row, example in enumerate(examples)
        )
    }
    summary = f"{len(given)} answers, {given.count(None)} of them less sure than {config.threshold:g} and withheld"
    if rows:
        told = measured(found.confidence[rows], scores[rows], config.threshold) | {"metric": reward.name}
        files["calibration.json"] = json.dumps(told, indent=1) + "\n"
        files["calibration.html"] = page(told)
        means = f"{_score(told['score'])} of all that can be scored, {_score(told['score_given'])} of those given"
        error = f"expected calibration error {told['expected_calibration_error']:.3g}"
        summary += f"; {reward.name} {means}, {error}"
    return Curated(files, summary)


def measured(sure: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, Any]:
    """How far confidence can be trusted, as values of JSON.

    Args:
      sure, score: of n answers, `[n]` in [0, 1], n at least 1.
      threshold: the least confidence of an answer that is given.

    Returns:
      `answers` n; `given`, how many have the threshold; `score` of all and `score_given` of these (None: there are
      none); `threshold`; `expected_calibration_error` and its `bins`; `area_under_risk_coverage`, whose risk is 1 less
      the score, and the `curve`, a point for each confidence: the share of answers that have it or more, and their
      score.
    """
    bins, curve = calibration(sure, score), selective(sure, score)
    given = sure >= threshold
    # Equally sure answers are given together.
    last = np.append(curve.threshold[1:] != curve.threshold[:-1], True)
    return {
        "answers": len(sure),
        "given": int(given.sum()),
        "threshold": threshold,
        "score": float(score.mean()),
        "score_given": float(score[given].mean()) if given.any() else None,
        "expected_calibration_error": bins.error,
        "area_under_risk_coverage": curve.area,
        "bins": _points(confidence=bins.confidence, score=bins.accuracy, answers=bins.answers),
        "curve": _points(threshold=curve.threshold[last], coverage=curve.coverage[last], score=curve.accuracy[last]),
    }


def _points(**columns: np.ndarray) -> list[dict[str, Any]]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
