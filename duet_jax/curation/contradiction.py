"""How probable it is that two answers to a prompt contradict each other, by a classifier, a function or the model.

BSDetector (arXiv 2308.16175), section 3.1, uses a classifier of natural language inference. Where there is none, the
model itself is asked, and the probability is that of "Yes" against "No", each at both letters (`choices`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax.config import ConfidenceConfig
from duet_jax.curation.choices import LETTERS, ask, lines, orders
from duet_jax.curation.respondent import Respondent
from duet_jax.curation.sentences import sentences
from duet_jax.data import Encoded, Example
from duet_jax.data.example import plain_text
from duet_jax.errors import FeedbackError, ModelError
from duet_jax.feedback.outside import load_function, source_of
from duet_jax.feedback.rewards.readout import Readout, resident_dtype
from duet_jax.models.classifier import read_classifier

OPTIONS = ("Yes", "No")
# Words from which a text is long: its sentences are compared one at a time, and the greatest contradiction counts.
LONG = 64


class Pair(NamedTuple):
    """Two answers to one prompt; the first is the premise.

    Attributes:
      example: whose prompt it is.
      group: pairs with the same number have the same prompt.
      first, second: the answers.
    """

    example: Example
    group: int
    first: str
    second: str


class Contradiction(NamedTuple):
    """Who says whether answers contradict each other.

    Attributes:
      identity: all that decides it, as values of JSON.
      function: probabilities float64 `[n]` in [0, 1] of n pairs; NaN of a pair that is longer than a model takes.
      questions: where the model itself says it, what it is asked about a pair, in all orders of `OPTIONS`.
    """

    identity: Any
    function: Callable[[Sequence[Pair]], np.ndarray]
    questions: Callable[[Pair], list[Example]] | None = None


def build_contradiction(config: ConfidenceConfig, respondent: Respondent) -> Contradiction:
    """As the configuration says.

    Raises:
      ConfigError: there is no such function.
      ModelError: there is no such classifier.
    """
    if config.contradiction == "nli":
        assert config.model is not None
        return nli(Path(config.model).expanduser(), config)
    if config.contradiction == "python":
        assert config.function is not None
        return python(config.function)
    return judged(respondent, config.pair_template)


def judged(respondent: Respondent, template: str) -> Contradiction:
    """The model itself is asked, and answers Yes or No."""

    def asked(pair: Pair) -> list[Example]:
        return questions(pair, template)

    def function(pairs: Sequence[Pair]) -> np.ndarray:
        found, _ = ask(respondent, [asked(pair) for pair in pairs], [pair.group for pair in pairs])
        return np.array([float(options[0]) for options in found])

    return Contradiction(["judge", template, OPTIONS, LETTERS, respondent.identity], function, asked)


def questions(pair: Pair, template: str) -> list[Example]:
    """What the model itself is asked about a pair, in all orders of the options."""
    offered = [lines(OPTIONS, order) for order in orders(len(OPTIONS))]
    return [Example(pair.example.id, _text(pair, template, options=options), "") for options in offered]


def python(name: str) -> Contradiction:
    """The function named `module:callable`; premises and hypotheses are the answers alone.

    Raises:
      ConfigError: there is no such function.
      FeedbackError: on use, where it fails, or gives other than one number in [0, 1] for each pair.
    """
    called = load_function(name, "confidence.function")

    def function(pairs: Sequence[Pair]) -> np.ndarray:
        try:
            given = called([pair.first for pair in pairs], [pair.second for pair in pairs])
            found = np.asarray(given, float)
        except Exception as error:  # whatever a stranger's function raises
            raise FeedbackError(f"The function {name} failed: {type(error).__name__}: {error}") from error
        if found.shape != (len(pairs),) or not np.all((found >= 0) & (found <= 1)):
            raise FeedbackError(
                f"The function {name} must give one number in [0, 1] for each of {len(pairs)} pairs; it gave {given!r}."
            )
        return found

    return Contradiction(["python", name, source_of(called)], function)


def nli(folder: Path, config: ConfidenceConfig) -> Contradiction:
    """A decoder of our family with a head of three labels, one of which is named after contradiction.

    It reads the pair as the template lays it out, with BOS where its tokenizer adds one. One of several sentences that
    is too long makes the whole pair so.

    Raises:
      ModelError: there is no such model.
    """
    read = read_classifier(folder, dtype=resident_dtype("float32"), labels=3, kind="classifier of contradictions")
    named = [number for number, label in enumerate(read.labels) if "contra" in label.lower()]
    if len(named) != 1:
        raise ModelError(
            f"{folder} has the labels {', '.join(read.labels)}; exactly one must be named after contradiction, in "
            f"id2label of its config.json."
        )
    fingerprint = models.fingerprint(read.config, {**read.params, "score": read.score})
    model = models.Model(read.config, read.params, read.tokenizer, str(folder), fingerprint)
    batch_size = max(config.batch_tokens // 256, 1)
    readout = Readout(model, jnp.asarray(read.score, jnp.float32), batch_size, jnp.dtype("float32"))

    def function(pairs: Sequence[Pair]) -> np.ndarray:
        parts = [parts_of(pair.second) for pair in pairs]
        texts = [
            _text(pair._replace(second=sentence), config.pair_template)
            for pair, own in zip(pairs, parts, strict=True)
            for sentence in own
        ]
        owners = np.array([row for row, own in enumerate(parts) for _ in own])
        tokens = tuple(np.array(ids, np.int32) for ids in read.tokenizer.encode_batch(texts, add_special=True))
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        encoded = Encoded(tokens, lengths, tuple(pairs[owner].example.id for owner in owners))
        rows = np.flatnonzero(lengths <= read.config.max_length)
        logits = readout(encoded.take(rows), (lengths[rows] - 1).tolist()).astype(float)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        found = np.zeros(len(pairs))
        np.maximum.at(found, owners[rows], odds[:, named[0]] / odds.sum(axis=1))
        found[np.delete(owners, rows)] = np.nan
        return found

    return Contradiction(["nli", readout.identity, list(read.labels), config.pair_template, LONG], function)


def outside(config: ConfidenceConfig) -> str:
    """A hash of what decides contradictions besides the configuration: a function, or the files of a classifier.

    Raises:
      ConfigError: there is no such function.
      ModelError: there is no such folder.
    """
    if config.contradiction == "python":
        assert config.function is not None
        return source_of(load_function(config.function, "confidence.function"))
    digest = hashlib.sha256()
    if config.contradiction == "nli":
        folder = Path(config.model or "").expanduser()
        if not folder.is_dir():
            raise ModelError(f"There is no classifier of contradictions at {folder}; give a Hugging Face folder.")
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def parts_of(text: str) -> list[str]:
    """The sentences of a long text; a shorter one as it is."""
    return sentences(text) if len(text.split()) >= LONG else [text]


def _text(pair: Pair, template: str, **more: str) -> str:
    return template.format(prompt=plain_text(pair.example.prompt), first=pair.first, second=pair.second, **more)
