"""Asking about targets: noise that is found (C8), parts that are computed once, and answers that are not given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from duet_jax.config import ConfidenceConfig
from duet_jax.curation import asking
from duet_jax.curation.answers import answer
from duet_jax.curation.asking import confidence, summary
from duet_jax.curation.parts import in_parts
from duet_jax.curation.reflection import taken, written
from duet_jax.curation.respondent import Reply
from duet_jax.data import Example
from tests.curation.respondents import QUESTIONS, ByHeart

TWICE = ["{prompt} {answer}\n{options}", "{prompt} {answer}\n\n{options}"]
ASKED = ConfidenceConfig(samples=3, max_new_tokens=6, batch_size=4, **QUESTIONS | {"reflection_templates": TWICE})


def planted(count: int, share: float, seed: int) -> tuple[list[Example], np.ndarray, dict[str, str]]:
    """Prompts with their answers, of which a share is another prompt's."""
    rng = np.random.default_rng(seed)
    right = {f"q{i}": f"w{i % 10}" for i in range(count)}
    wrong = np.zeros(count, bool)
    wrong[rng.permutation(count)[: int(share * count)]] = True
    examples = []
    for i, (prompt, word) in enumerate(right.items()):
        target = f"w{(i + 1 + rng.integers(9)) % 10}" if wrong[i] else word
        examples.append(Example(f"e{i}", prompt, target))
    return examples, wrong, right


@pytest.mark.parametrize(("error", "low", "high"), [(0.0, 1.0, 1.0), (0.9, 0.39, 0.61)])
def test_c8_an_oracle_finds_all_noise_and_chance_none(tmp_path: Path, error: float, low: float, high: float) -> None:
    examples, wrong, right = planted(400, 0.2, 0)
    # With nine wrong words and an error of .9, each word is as probable as any other. The standard error of an AUROC
    # by chance is sqrt(401 / (12 * 80 * 320)) = .036.
    found = confidence(ByHeart(right, error), examples, ASKED, tmp_path)
    assert low <= roc_auc_score(wrong, 1 - found.value) <= high
    if not error:
        assert np.all(found.value[~wrong] == 1) and np.all(found.value[wrong] == 0)


def test_a_killed_pass_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "in_parts", partial(in_parts, part=4))
    examples, _, right = planted(10, 0.2, 1)
    respondent = ByHeart(right, 0.5)
    stages: list[tuple[str, int, int]] = []
    whole = confidence(respondent, examples, ASKED, tmp_path / "whole", lambda *step: stages.append(step))
    assert [name for name, done, of in stages if done == of] == ["samples", "questions"]
    assert len(stages) == 2 * 3 and len(set(whole.value.tolist())) > 3
    for stop in range(1, len(stages) + 1):
        done = []

        def kill(*step: Any, done: list = done, stop: int = stop) -> None:
            done.append(step)
            if len(done) == stop:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            confidence(respondent, examples, ASKED, folder, kill)
        kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
        assert len(kept) == stop
        again = confidence(respondent, examples, ASKED, folder)
        for one, other in zip(whole, again, strict=True):
            np.testing.assert_array_equal(one, other)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_weights_alone_compute_nothing_again(tmp_path: Path) -> None:
    examples, _, right = planted(10, 0.2, 1)
    respondent = ByHeart(right, 0.5)
    first = confidence(respondent, examples, ASKED, tmp_path)
    files = set(tmp_path.rglob("*.json"))
    other = dataclasses.replace(ASKED, alpha=0.5, beta=0.2, likelihood=0.4)
    second = confidence(respondent, examples, other, tmp_path)
    assert set(tmp_path.rglob("*.json")) == files
    shares = {"similarity": 0.1, "match": 0.1, "reflection": 0.8, "likelihood": 0.4}
    expected = sum(share * getattr(first, name) for name, share in shares.items()) / 1.4
    np.testing.assert_allclose(second.value, expected)


def test_without_samples_reflection_stands_alone(tmp_path: Path) -> None:
    examples, wrong, right = planted(10, 0.2, 1)
    found = confidence(ByHeart(right, 0.0), examples, dataclasses.replace(ASKED, samples=0), tmp_path)
    np.testing.assert_array_equal(found.value, found.reflection)
    np.testing.assert_array_equal(found.value, ~wrong)
    assert found.similarities.shape == (10, 0) and np.isnan(found.similarity).all()


def test_written_reflections_are_searched_for_the_option(tmp_path: Path) -> None:
    texts = ["It fits. Answer: A", "(B)", "who knows", "I am not sure"]

    class Writer(ByHeart):
        def answers(
            self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
        ) -> list[list[Reply]]:
            # Neither the stop nor the limit of sampled answers.
            assert samples == 0 and len(examples) == 4 and max_new_tokens == 99 and not stop
            return [[Reply(text, True)] for text in texts]

    config = dataclasses.replace(ASKED, samples=0, reflection="text", reflection_max_new_tokens=99, stop=("\n",))
    pair = [Example("a", "p", "r"), Example("b", "p", "r")]
    np.testing.assert_allclose(written(Writer({}), pair, config) @ [1, 0, 0.5], [[1, 0], [0.5, 0.5]])
    whole = confidence(Writer({}), pair, config, tmp_path)
    np.testing.assert_allclose(whole.reflection, [0.5, 0.5])
    assert "1 of 4 written reflections take no option and count as not sure" in summary(pair, whole)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("The answer is not correct.", None),
        ("This is not correct.", None),
        ("I doubt that the answer is correct, for it is not.", None),
        ("The answer is not (A).", None),
        ("A wrong one.", None),
        ("A: Correct", 0),
        ("The answer is correct. So:\nAnswer: **B**\n", 1),
        ("answer is C", 2),
        ("The proposed answer is correct.", 0),
        ("Incorrect", 1),
        ("", None),
    ],
)
def test_an_option_among_other_words_is_not_taken(text: str, option: int | None) -> None:
    assert taken(text) == option


def test_an_answer_without_confidence_is_not_given(tmp_path: Path) -> None:
    class Silent(ByHeart):
        def answers(
            self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
        ) -> list[list[Reply]]:
            return [[Reply("" if samples else "yes", True)] * max(samples, 1) for _ in examples]

    examples, *_ = planted(2, 0.0, 0)
    found = answer(Silent({}), examples, dataclasses.replace(ASKED, beta=1.0), tmp_path)
    np.testing.assert_array_equal(found.confidence, [0, 0])
    assert found.texts == ("yes", "yes") and found.given(0.1) == (None, None)


def test_what_the_questions_say_decides_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, _, right = planted(10, 0.2, 1)
    first = confidence(ByHeart(right, 0.5), examples, ASKED, tmp_path)
    monkeypatch.setattr("duet_jax.curation.reflection.READ", "Choose.\n")
    monkeypatch.setattr(ByHeart, "options", lambda self, asked, words: np.tile([0.5, 0.3, 0.2], (len(asked), 1)))
    second = confidence(ByHeart(right, 0.5), examples, ASKED, tmp_path)
    assert len(list(tmp_path.glob("questions-*"))) == 2 and not np.array_equal(first.reflection, second.reflection)


def test_another_response_is_compared_with_the_same_samples(tmp_path: Path) -> None:
    examples, _, right = planted(10, 0.2, 1)
    first = confidence(ByHeart(right, 0.5), examples, ASKED, tmp_path)
    edited = [dataclasses.replace(examples[0], response="w9"), *examples[1:]]
    second = confidence(ByHeart(right, 0.5, seed=1), edited, ASKED, tmp_path)
    assert second.samples == first.samples and len(list(tmp_path.glob("samples-*"))) == 1
    assert len(list(tmp_path.glob("questions-*"))) == 2


def test_parts_follow_sizes_and_are_computed_once(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def compute(rows: list[int]) -> list[Any]:
        seen.append(rows)
        return [{"row": row, "text": "\x00é"} for row in rows]

    def run(sizes: Sequence[int] = (5, 1, 3), part: int = 2) -> list[Any]:
        return in_parts(tmp_path, "work", [1], sizes, compute, part=part)

    assert [one["row"] for one in run()] == [0, 1, 2] and seen == [[1, 2], [0]]
    assert run() == run() and len(seen) == 2
    # Other sizes and parts of another size have files of their own.
    assert run(part=1) == run((1, 2, 3)) == run((1, 2, 3, 4))[:3] == run()
    assert seen[2:] == [[1], [2], [0], [0, 1], [2], [0, 1], [2, 3]]
