"""Who says whether two answers contradict each other: a classifier, a function, or the model itself."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from duet_jax._confidence_config import CONTRADICTION
from duet_jax.config import ConfidenceConfig
from duet_jax.curation.contradiction import Pair, build_contradiction, outside, parts_of, questions
from duet_jax.curation.respondent import Respondent
from duet_jax.data import Example
from duet_jax.errors import ConfigError, FeedbackError, ModelError
from tests.curation.random_model import last_state, save_classifier

LABELS = {"0": "entailment", "1": "neutral", "2": "Contradiction"}
NAN = float("nan")
SCORE = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
NOBODY: Respondent = None  # type: ignore[assignment]  # is not asked


def config(folder: Path) -> ConfidenceConfig:
    return ConfidenceConfig(
        contradiction="nli", model=str(folder), contradiction_template="{prompt} {first} # {second}"
    )


def pair(first: str, second: str) -> Pair:
    return Pair(Example("e", "why?", "unused"), 0, first, second)


def test_a_classifier_reads_pairs_and_the_worst_sentence_of_long_ones(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "nli", SCORE, LABELS)
    found = build_contradiction(config(folder), NOBODY)

    def alone(first: str, second: str) -> float:
        logits = SCORE @ last_state(f"why? {first} # {second}")
        odds = np.exp(logits - logits.max())
        return float(odds[2] / odds.sum())

    parts = ["One two. ", "Three four! ", "a " * 64]
    long = "".join(parts)
    pairs = [pair("yes", "no"), pair("no", "yes"), pair("yes", long), pair("yes", "short. not split")]
    expected = [alone("yes", "no"), alone("no", "yes"), max(alone("yes", p.strip(" ")) for p in parts[:2])]
    values = found.function(pairs)
    np.testing.assert_allclose(values[[0, 1, 3]], [*expected[:2], alone("yes", "short. not split")], atol=1e-5)
    last = parts_of(long)[2]
    assert values[2] == pytest.approx(max(expected[2], alone("yes", last)), abs=1e-5)


def test_by_itself_a_classifier_reads_premise_and_hypothesis() -> None:
    assert ConfidenceConfig(contradiction="nli", model="m").pair_template == "premise: {first}\nhypothesis: {second}"
    assert ConfidenceConfig().pair_template == CONTRADICTION


def test_pairs_that_are_too_long_have_no_probability(tmp_path: Path) -> None:
    found = build_contradiction(config(save_classifier(tmp_path / "nli", SCORE, LABELS)), NOBODY)
    values = found.function([pair("yes", "no"), pair("y" * 600, "no"), pair("yes", "a. " * 64 + "n" * 600)])
    assert np.isnan(values).tolist() == [False, True, True]
    np.testing.assert_array_equal(np.isnan(found.function([pair("y" * 600, "no")])), [True])


def test_long_texts_are_split_into_sentences() -> None:
    assert parts_of("One. Two.") == ["One. Two."]
    words = "w " * 70
    assert parts_of(f"One. Two! {words}\nEnd") == ["One.", "Two!", words.strip(), "End"]


def test_classifiers_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no classifier of contradictions at"):
        build_contradiction(config(tmp_path / "nowhere"), NOBODY)
    with pytest.raises(ModelError, match="There is no classifier of contradictions at"):
        outside(config(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="has the labels LABEL_0, LABEL_1, LABEL_2; exactly one must be named after"):
        build_contradiction(config(save_classifier(tmp_path / "unnamed", SCORE)), NOBODY)
    two = save_classifier(tmp_path / "two", SCORE[:2], LABELS)
    with pytest.raises(ModelError, match=r"has shape \[2, 16\]; it must have the shape \[3, 16\]"):
        build_contradiction(config(two), NOBODY)


def test_the_files_of_a_classifier_decide(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "nli", SCORE, LABELS)
    (folder / "1_Pooling").mkdir()
    before = outside(config(folder)), build_contradiction(config(folder), NOBODY).identity
    save_classifier(tmp_path / "nli", SCORE + 1, LABELS)
    after = outside(config(folder)), build_contradiction(config(folder), NOBODY).identity
    assert before[0] != after[0] and before[1] != after[1]


def test_a_function_is_given_both_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("some_nli")
    monkeypatch.setitem(sys.modules, "some_nli", module)

    def build(function: object) -> object:
        module.compare = function  # type: ignore[attr-defined]
        asked = ConfidenceConfig(contradiction="python", function="some_nli:compare")
        return build_contradiction(asked, NOBODY).function([pair("a", "b"), pair("b", "b")])

    np.testing.assert_array_equal(build(lambda p, h: [float(x != y) for x, y in zip(p, h, strict=True)]), [1, 0])
    for function, message in (
        (lambda p, h: [0.5], r"must give one number in \[0, 1\] for each of 2 pairs; it gave \[0.5\]"),
        (lambda p, h: [0.5, float("nan")], "must give one number"),
        (lambda p, h: 1 / 0, "The function some_nli:compare failed: ZeroDivisionError"),
    ):
        with pytest.raises(FeedbackError, match=message):
            build(function)
    with pytest.raises(ConfigError, match="confidence.function: the module 'no_such' cannot be imported"):
        build_contradiction(ConfidenceConfig(contradiction="python", function="no_such:f"), NOBODY)


def test_the_model_itself_says_yes_or_no() -> None:
    class Sayer:
        identity, longest = "sayer", 200

        def sizes(self, examples: Sequence[Example]) -> list[int]:
            return [len(str(example.prompt)) for example in examples]

        def read(
            self, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str], *scored: Sequence
        ) -> tuple[np.ndarray, np.ndarray]:
            assert not any(scored)
            assert words == ("A", "B", "C") and list(groups) == [0] * 4
            assert max(self.sizes(questions)) <= self.longest
            # Half of what it says is a liking for the letter A, and a tenth is of C, at which nothing stands.
            found = []
            for question in questions:
                text = str(question.prompt)
                yes = 0.8 if "First answer: a" in text else 0.2
                first = yes if "A: Yes" in text else 1 - yes
                found.append([0.9 * (0.5 + first / 2), 0.9 * (1 - first) / 2, 0.1])
            return np.array(found), np.zeros((0, 2))

    found = build_contradiction(ConfidenceConfig(), Sayer())  # type: ignore[arg-type]
    # In the mean over both orders the liking cancels: (.5 + .8 / 2 + .8 / 2) / 2 = .65.
    np.testing.assert_allclose(
        found.function([pair("a", "b"), pair("b", "a"), pair("a" * 200, "b")]), [0.65, 0.35, NAN]
    )
    both = [str(question.prompt) for question in questions(pair("a", "b"), CONTRADICTION)]
    assert both[0].startswith("why?\n") and [text[-13:] for text in both] == ["\nA: Yes\nB: No", "\nA: No\nB: Yes"]
