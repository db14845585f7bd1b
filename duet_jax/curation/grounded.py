"""How far a document supports what a response says, sentence by sentence.

MiniCheck (Tang et al. 2024, arXiv 2404.10774), section 3: a claim is supported with the highest probability that any
chunk of the document gives it. Claims should be single sentences, and how they add up is left to the user: here a
response is as well supported as its least supported sentence. The paper's own checkpoints are not of our family; any
model or function takes their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax.config import GroundedConfig
from duet_jax.curation.bench import Bench, Curated, lines
from duet_jax.curation.sentences import sentences
from duet_jax.data import Encoded, Example
from duet_jax.data.example import any_chat, as_row, plain_text
from duet_jax.errors import DataError, FeedbackError, ModelError
from duet_jax.feedback import load_function
from duet_jax.feedback.outside import source_of
from duet_jax.feedback.rewards.judge import two_letters
from duet_jax.feedback.rewards.readout import Readout, resident_dtype
from duet_jax.models.classifier import read_classifier

# Examples whose support is kept together.
PART = 16
# A sentence ends with its stop, and perhaps quotation marks or brackets, before white space; or with its line.
QUESTION = """A document and a claim are to be compared.

[Document]
{document}

[Claim]
{claim}

Does the document support the claim?
A: {first}
B: {second}
Answer with one letter, A or B."""
YES, NO = "Yes, all of it is said in the document.", "No, the document does not say so."


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Probabilities float64 `[n]` that n pairs of document and claim are supported; `identity` is what decides them."""

    identity: str
    function: Callable[[Sequence[tuple[str, str]]], np.ndarray]


def chunks(document: str, most: int) -> list[str]:
    """The document's sentences, packed in order into chunks of at most `most` words; a longer one is a chunk alone."""
    packed: list[list[str]] = []
    size = 0
    for sentence in sentences(document):
        count = len(sentence.split())
        if not packed or size + count > most:
            packed.append([])
            size = 0
        packed[-1].append(sentence)
        size += count
    return [" ".join(part) for part in packed]


def support(scorer: Scorer, pairs: Sequence[tuple[str, str]], chunk_words: int) -> list[list[float]]:
    """Probability of each sentence of each response, the highest that any chunk of its document gives it.

    Args:
      scorer: of a chunk and a sentence.
      pairs: documents and responses, each of at least one sentence.
      chunk_words: see `chunks`.
    """
    asked, owners = [], []
    for row, (document, response) in enumerate(pairs):
        parts = chunks(document, chunk_words)
        for number, claim in enumerate(sentences(response)):
            asked += [(part, claim) for part in parts]
            owners += [(row, number)] * len(parts)
    found = [[0.0] * len(sentences(response)) for _, response in pairs]
    for (row, number), value in zip(owners, scorer.function(asked).tolist(), strict=True):
        found[row][number] = max(found[row][number], value)
    return found


def curate(bench: Bench, config: GroundedConfig) -> Curated:
    """Scores all examples of all domains, held-out ones too.

    Files: support.jsonl, a row for each example with the probability of each sentence; supported.jsonl and
    unsupported.jsonl, the examples themselves with their `support`, that of the least supported sentence.

    Raises:
      DataError: an example has no document.
      FeedbackError: the function fails, or gives no probability.
      ModelError: there is no such model.
    """
    rows = [(domain.name, example) for domain in bench.domains for example in (*domain.train, *domain.validation)]
    pairs = [(_document(name, example, config.document), example.response) for name, example in rows]
    scorer = build(config)

    def some(part: list[int]) -> list[list[float]]:
        return support(scorer, [pairs[row] for row in part], config.chunk_words)

    sizes = [len(document) + len(response) for document, response in pairs]
    scores = bench.kept("support", [scorer.identity, config.chunk_words, pairs], sizes, some, PART)
    about: list[dict] = []
    split: dict[bool, list[tuple[str, Example, float]]] = {True: [], False: []}
    for (name, example), (_, response), values in zip(rows, pairs, scores, strict=True):
        claims = [{"claim": claim, "support": value} for claim, value in zip(sentences(response), values, strict=True)]
        least = min(values)
        about.append({"domain": name, "id": example.id, "support": least, "claims": claims})
        split[least > config.threshold].append((name, example, least))
    files = {"support.jsonl": lines(about)}
    chat = any_chat(example for _, example in rows)
    for supported, part in split.items():
        files["supported.jsonl" if supported else "unsupported.jsonl"] = lines(
            as_row(example, chat=chat) | {"domain": name, "support": least} for name, example, least in part
        )
    return Curated(files, f"{len(split[True])} of {len(rows)} examples are supported by their documents")


def _document(domain: str, example: Example, column: str | None) -> str:
    document = plain_text(example.prompt) if column is None else example.meta.get(column)
    if not isinstance(document, str) or not document.strip():
        where = "its prompt is empty" if column is None else f"it has no text in the column '{column}'"
        raise DataError(f"domain '{domain}': the example '{example.id}' has no document: {where}.")
    return document


def build(config: GroundedConfig) -> Scorer:
    """The scorer that a configuration describes.

    Raises:
      ModelError, ConfigError: there is no such model, or function.
    """
    if config.scorer == "function":
        assert config.function is not None
        return _of_function(config.function)
    assert config.model is not None
    if config.scorer == "judge":
        return _of_judge(config.model, config)
    return _of_classifier(Path(config.model).expanduser(), config)


def _of_function(name: str) -> Scorer:
    function = load_function(name, "grounded.function")

    def every(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        found = np.empty(len(pairs))
        for row, (document, claim) in enumerate(pairs):
            try:
                found[row] = function(document, claim)
            except Exception as error:  # whatever a stranger's function raises
                raise FeedbackError(
                    f"The function {name} failed for the claim {claim!r}: {type(error).__name__}: {error}"
                ) from error
            if not 0 <= found[row] <= 1:
                raise FeedbackError(f"The function {name} gave {found[row]} for the claim {claim!r}, no probability.")
        return found

    return Scorer(f"function {name} {source_of(function)}", every)


def _of_judge(source: str, config: GroundedConfig) -> Scorer:
    asked = two_letters(source, config.batch_size, config.dtype)

    def every(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        questions = [
            Example(claim, QUESTION.format(document=document, claim=claim, first=first, second=second), "")
            for document, claim in pairs
            for first, second in ((YES, NO), (NO, YES))
        ]
        return asked(questions)

    return Scorer(f"judge {asked.identity}, asked: {QUESTION}{YES}{NO}", every)


def _of_classifier(folder: Path, config: GroundedConfig) -> Scorer:
    read = read_classifier(folder, dtype=resident_dtype(config.dtype), labels=(2, 3), kind="classifier of support")
    supports = _label_of_support(folder, read.labels)
    fingerprint = models.fingerprint(read.config, {**read.params, "score": read.score})
    model = models.Model(read.config, read.params, read.tokenizer, str(folder), fingerprint)
    readout = Readout(model, jnp.asarray(read.score, jnp.float32), config.batch_size, jnp.dtype(config.dtype))

    def every(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        texts = [f"{document}\n{claim}" for document, claim in pairs]
        tokens = tuple(np.array(ids, np.int32) for ids in read.tokenizer.encode_batch(texts, add_special=True))
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        encoded = Encoded(tokens, lengths, tuple(claim for _, claim in pairs))
        logits = readout(encoded, [length - 1 for length in lengths]).astype(float)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights[:, supports] / weights.sum(axis=1)

    return Scorer(f"classifier {readout.identity}, label {supports}", every)


def _label_of_support(folder: Path, labels: tuple[str, ...]) -> int:
    """Which label means that a claim is supported: by its name or, of two without names, the second."""
    named = [number for number, label in enumerate(labels) if label.lower().startswith(("entail", "support"))]
    if labels == ("LABEL_0", "LABEL_1"):
        named = [1]
    if len(named) != 1:
        raise ModelError(
            f"{folder} has the labels {', '.join(labels)}; the name of exactly one must begin with entail or support, "
            f"in id2label of its config.json."
        )
    return named[0]
