"""Support by a document: sentences, chunks, their maximum, and what the scorers read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax._curate_config import GroundedConfig
from duet_jax.curation.grounded import NO, QUESTION, YES, Scorer, build, chunks, sentences, support
from duet_jax.errors import FeedbackError, ModelError
from tests.curation.random_model import TOKENIZER, last_state, params, save, save_classifier


def test_sentences() -> None:
    text = 'It is 3.5 m long. "Is it?" she asked.\nYes! (Indeed.) And\n\nso on...'
    assert sentences(text) == ["It is 3.5 m long.", '"Is it?"', "she asked.", "Yes!", "(Indeed.)", "And", "so on..."]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 12))
def test_chunks_hold_all_sentences_in_order(counts: list[int], most: int) -> None:
    document = " ".join("w " * (count - 1) + "w." for count in counts)
    found = chunks(document, most)
    assert [sentence for part in found for sentence in sentences(part)] == sentences(document)
    sizes = [len(part.split()) for part in found]
    assert all(size <= most or len(sentences(part)) == 1 for size, part in zip(sizes, found, strict=True))
    # None could be joined to the one before it.
    first = [len(sentences(part)[0].split()) for part in found]
    assert all(size + after > most for size, after in zip(sizes, first[1:], strict=False))


def overlap(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """The share of the claim's letters that the document has."""
    return np.array([np.mean([letter in document for letter in claim.strip(".").split()]) for document, claim in pairs])


def test_a_claim_has_the_support_of_its_best_chunk() -> None:
    document = "a b c. d e f. g h i."
    scorer = Scorer("overlap", overlap)
    assert chunks(document, 3) == ["a b c.", "d e f.", "g h i."]
    # No chunk has both d and h, and the document has.
    assert support(scorer, [(document, "a b. d h."), (document, "z.")], 3) == [[1.0, 0.5], [0.0]]
    assert support(scorer, [(document, "a b. d h.")], 9) == [[1.0, 1.0]]


PAIRS = [("The cat sat. It was fat.", "The cat was fat."), ("Rain.", "It was dry.")]


def test_a_classifier_gives_the_second_label(tmp_path: Path) -> None:
    config = GroundedConfig(scorer="classifier", model=str(save(tmp_path)), batch_size=2)
    with pytest.raises(ModelError, match="is no classifier of support: the tensor score.weight is not there"):
        build(config)
    score = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
    save_classifier(tmp_path, score)
    expected = [jax.nn.softmax(score @ last_state("\n".join(pair)))[1] for pair in PAIRS]
    np.testing.assert_allclose(build(config).function(PAIRS), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("labels", "supports"),
    [
        (["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"], 0),
        (["contradiction", "neutral", "entailment"], 2),
        (["entailment", "not_entailment"], 0),
        (["LABEL_0", "LABEL_1"], 1),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["unsupported", "no"], None),
    ],
)
def test_the_label_of_support_is_found_by_its_name(tmp_path: Path, labels: list[str], supports: int | None) -> None:
    score = np.random.default_rng(0).normal(size=(len(labels), 16)).astype(np.float32)
    save_classifier(tmp_path, score, dict(enumerate(labels)))
    config = GroundedConfig(scorer="classifier", model=str(tmp_path), batch_size=2)
    if supports is None:
        with pytest.raises(ModelError, match="the name of exactly one must begin with entail or support"):
            build(config)
        return
    expected = [jax.nn.softmax(score @ last_state("\n".join(pair)))[supports] for pair in PAIRS]
    np.testing.assert_allclose(build(config).function(PAIRS), expected, atol=2e-5)


def test_a_judge_is_asked_both_ways(tmp_path: Path) -> None:
    letters = np.asarray(params()["embedding"])[[TOKENIZER.encode(letter)[0] for letter in "AB"]]

    def asked(pair: tuple[str, str], first: str, second: str) -> np.ndarray:
        question = QUESTION.format(document=pair[0], claim=pair[1], first=first, second=second)
        return np.asarray(jax.nn.softmax(letters @ last_state(question + "\n")))

    expected = [(asked(pair, YES, NO)[0] + asked(pair, NO, YES)[1]) / 2 for pair in PAIRS]
    found = build(GroundedConfig(scorer="judge", model=str(save(tmp_path)), batch_size=3)).function(PAIRS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return 2", "gave 2.0 for the claim 'x', no probability"),
        ("raise KeyError(claim)", "for the claim 'x': KeyErr"),
    ],
)
def test_functions_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, sentence: str) -> None:
    (tmp_path / f"f{len(body)}.py").write_text(f"def f(document, claim):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    scorer = build(GroundedConfig(scorer="function", function=f"f{len(body)}:f"))
    with pytest.raises(FeedbackError, match=sentence):
        scorer.function([("d", "x")])
