"""Weights of domains by the model's errors, and the cases it gets wrong without near repetitions.

Adaptive bad-case sampling of MLLM-DataEngine (Zhao et al. 2023, arXiv 2308.13566): data of a type is drawn in
proportion to the square root of the model's error rate on that type. The paper leaves open how the ratios are
normalised; here they sum to 1, and are equal where there are no errors at all. It compares bad cases by spaCy's
similarity; here two texts are as similar as the share of their words that they have in common, which needs no other
model.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import yaml

from duet_jax.config import ErrorWeightsConfig
from duet_jax.curation.bench import Bench, Curated, Marked, lines
from duet_jax.data.example import any_chat, as_row, plain_text
from duet_jax.errors import DataError

_WORD = re.compile(r"\w+")


def error_weights(accuracies: np.ndarray) -> np.ndarray:
    """`sqrt(1 - a)` of each accuracy over their sum, float64 `[n]`; equal weights where every accuracy is 1.

    Raises:
      ValueError: an accuracy is not in [0, 1].
    """
    accuracies = np.asarray(accuracies, np.float64)
    if not np.all((accuracies >= 0) & (accuracies <= 1)):
        raise ValueError(f"accuracies must be in [0, 1], not {accuracies}")
    ratios = np.sqrt(1 - accuracies)
    if not ratios.any():
        ratios = np.ones_like(ratios)
    return ratios / ratios.sum()


def distinct_cases(texts: Sequence[str], similarity: float, rng: np.random.Generator) -> list[int]:
    """Rows that are left when a random text is kept, all that are similar to it are removed, and so on.

    Args:
      texts: compared as sets of words, in lower case: shared words over all words of both (Jaccard). Two texts without
        words are equal.
      similarity: above which a text is removed.
      rng: chooses the texts to keep.

    Returns:
      Rows of the kept texts, ascending.
    """
    words = [set(_WORD.findall(text.lower())) for text in texts]
    places: dict[str, list[int]] = defaultdict(list)
    for row, own in enumerate(words):
        for word in own:
            places[word].append(row)
    sizes, left, kept = np.array([len(own) for own in words]), np.ones(len(texts), bool), []
    # A random order without the removed ones is a random choice among those left, again and again.
    for row in rng.permutation(len(texts)).tolist():
        if not left[row]:
            continue
        kept.append(row)
        meeting = [place for word in words[row] for place in places[word]]
        shared = np.bincount(np.array(meeting, np.int64), minlength=len(texts))
        union = sizes + sizes[row] - shared
        left &= np.where(union > 0, shared / np.maximum(union, 1), 1.0) <= similarity
    return sorted(kept)


def curate(bench: Bench, config: ErrorWeightsConfig) -> Curated:
    """Asks the model for the held-out examples of every domain.

    Files: weights.yaml with `prior`, as `search` of a study takes it; accuracy.json; bad_cases.jsonl.

    Raises:
      DataError: a domain has no held-out example, or a prompt does not fit the model.
      FeedbackError: a reply cannot be rewarded.
    """
    for domain in bench.domains:
        if not domain.validation:
            raise DataError(
                f"domain '{domain.name}' has no held-out example to measure the model on; it needs two or more examples"
            )
    marked = [bench.marked(domain.validation, config, f"{domain.name}, replies") for domain in bench.domains]
    accuracies = np.array([np.mean([one.right for one in part]) for part in marked])
    weights = dict(zip((domain.name for domain in bench.domains), error_weights(accuracies).tolist(), strict=True))
    cases, kept = [], {}
    for number, (domain, part) in enumerate(zip(bench.domains, marked, strict=True)):
        wrong = [one for one in part if not one.right]
        texts = [plain_text(one.example.prompt) for one in wrong]
        rows = distinct_cases(texts, config.similarity, np.random.default_rng([bench.seed, number]))
        kept[domain.name] = len(rows)
        cases += [(domain.name, wrong[row]) for row in rows]
    measured = {
        domain.name: {
            "asked": len(part),
            "right": sum(one.right for one in part),
            "accuracy": float(accuracy),
            "weight": weights[domain.name],
            "bad_cases": kept[domain.name],
        }
        for domain, part, accuracy in zip(bench.domains, marked, accuracies, strict=True)
    }
    prior = yaml.safe_dump({"prior": weights}, sort_keys=False, allow_unicode=True)
    files = {
        "weights.yaml": f"# For `search` of a study, beside the `penalty` that says how much it counts.\n{prior}",
        "accuracy.json": json.dumps(measured, indent=1, ensure_ascii=False) + "\n",
        "bad_cases.jsonl": lines(_rows(cases)),
    }
    right = " · ".join(f"{name} {part['accuracy']:.1%}" for name, part in measured.items())
    return Curated(files, f"{len(cases)} bad cases; accuracy: {right}")


def _rows(cases: Sequence[tuple[str, Marked]]) -> list[dict]:
    chat = any_chat(one.example for _, one in cases)
    return [
        as_row(one.example, chat=chat) | {"domain": name, "reply": one.reply, "reward": one.reward}
        for name, one in cases
    ]
