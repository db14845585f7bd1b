"""Confidence in targets: the formulas (C1 to C4), noise that it finds (C8), and the pass of a real model."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from duet_jax import models
from duet_jax.config import ConfidenceConfig
from duet_jax.curation import asking
from duet_jax.curation.answers import answer
from duet_jax.curation.asking import askable, confidence, dressed, require_asked, summary
from duet_jax.curation.confidence import (
    combine,
    final_answer,
    known_mean,
    reflection_score,
    same_answer,
    similarity,
)
from duet_jax.curation.parts import in_parts
from duet_jax.curation.reflection import questions, taken, written
from duet_jax.curation.respondent import ModelRespondent, Reply
from duet_jax.data import Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.data.example import plain_text
from duet_jax.errors import ConfigError, DataError, ModelError
from duet_jax.feedback import Deployed, Engine
from duet_jax.models import llama

NAN = float("nan")
TOKENIZER = CharacterTokenizer(string.printable[:95] + "\n")
SHAPE = llama.LlamaConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=256,
)
TEMPLATES = ("Q {prompt} A {answer}\n{options}", "Sure? {prompt} A {answer}\n{options}")
SHORT = ConfidenceConfig(
    samples=3,
    max_new_tokens=6,
    batch_size=4,
    sample_template="say: {prompt}",
    reflection_templates=TEMPLATES,
    contradiction_template="{prompt}: {first} or {second}\n{options}",
)


def weights(alpha: float, beta: float, samples: int = 5) -> Any:
    return ConfidenceConfig(alpha=alpha, beta=beta, samples=samples).weights


def consistency(similarities: np.ndarray, matches: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's O: the mean over samples of alpha * s + (1 - alpha) * r."""
    return known_mean(alpha * similarities + (1 - alpha) * matches)


def test_c1_closed_form() -> None:
    s, r = np.array([[1, 0.5]]), np.array([[1.0, 0.0]])
    np.testing.assert_allclose(0.8 * s + 0.2 * r, [[1, 0.4]])
    assert consistency(s, r, 0.8)[0] == pytest.approx(0.7)
    reflected = reflection_score(np.eye(3)[[[0, 2]]])
    assert reflected[0] == 0.75
    mean = {"similarity": s.mean(1), "match": r.mean(1), "reflection": reflected, "likelihood": np.array([NAN])}
    assert combine(mean, weights(0.8, 0.7))[0] == pytest.approx(0.7 * 0.7 + 0.3 * 0.75) == 0.715


def test_c2_similarity_is_symmetric() -> None:
    forward, backward = np.array([0.2]), np.array([0.4])
    assert similarity(forward, backward)[0] == pytest.approx(0.7)
    assert similarity(backward, forward) == similarity(forward, backward)


def test_c3_weights() -> None:
    found = weights(0.8, 0.7)
    expected = {"similarity": 0.56, "match": 0.14, "reflection": 0.30, "likelihood": 0}
    assert found == pytest.approx(expected)


def test_c4_missing_parts_are_left_out() -> None:
    tlm = {"consistency": 0.32, "indicator": 0.01, "reflection": 0.47, "perplexity": 0.20}
    parts = {"consistency": 0.5, "indicator": 0.0, "reflection": 1.0, "perplexity": NAN}
    arrays = {name: np.array([value, NAN, NAN]) for name, value in parts.items()}
    arrays["reflection"][1] = 1.0
    found = combine(arrays, tlm)
    assert found[0] == pytest.approx((0.32 * 0.5 + 0.47) / 0.80) == 0.7875
    assert found[1] == 1.0 and np.isnan(found[2])


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_confidence_is_the_papers_formula_and_in_the_unit_interval(rows, alpha, beta) -> None:
    s, r, reflected = np.array(rows).T
    parts = {"similarity": s[None].mean(1), "match": r[None].mean(1), "reflection": reflected[:1]}
    whole = combine(parts, weights(alpha, min(beta, 0.999)))
    beta = min(beta, 0.999)
    expected = beta * consistency(s[None], r[None], alpha) + (1 - beta) * reflected[:1]
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    assert -1e-12 <= whole[0] <= 1 + 1e-12


def test_empty_samples_count_neither_way() -> None:
    assert consistency(np.array([[1, NAN]]), np.array([[0, NAN]]), 0.8)[0] == pytest.approx(0.8)
    assert np.isnan(consistency(np.full((1, 0), 0.0), np.full((1, 0), 0.0), 0.8)[0])


@pytest.mark.parametrize(
    ("target", "sample", "same"),
    [
        ("Paris", "explanation: the capital.\nanswer: The Paris!", True),
        ("2 + 2 = 4\n#### 4", "It is four; the answer is 4", True),
        ("Paris", "Paris is nice.\nanswer: Rome", False),
        ('{"a": 1, "b": "The X"}', 'Sure: {"b": "x", "a": 1} as asked', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": 1}', "a is 1", False),
        ('{"a": 1}', 'as [asked]: {"a": 1}', True),
        ("[1] is the source. answer: Rome", "answer: Paris", False),
        ("see [1]", "see [1]", True),
        ("-5", "5", False),
        ("x = -5", "x = 5", False),
        ("3.5", "35", False),
        ("1/2", "12", False),
        ("1/2", "answer: 0.50", True),
        ("3.5 m", "35 m", False),
        ("$1,000", "1000", True),
        ('{"a": "-5"}', '{"a": "5"}', False),
        ("A", "answer: a.", True),
        ("A", "the", False),
        ("+", "-", False),
        ("no answer: ", "some answer", False),
    ],
)
def test_final_answers_are_compared(target: str, sample: str, same: bool) -> None:
    assert same_answer(target, sample) is same


def test_the_last_mark_counts() -> None:
    assert final_answer("Answer: 1\nno, the answer is: 2 apples\nso there") == "2 apples"
    assert final_answer(" plain ") == "plain" and final_answer("answer:") == "answer:"


@dataclasses.dataclass
class Toy:
    """Knows answers by heart: `right` of each prompt, and gives `wrong` ones with some probability."""

    right: dict[str, str]
    error: float
    seed: int = 0
    identity: str = "toy"
    writing: str = ""
    longest: int = 10**6

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        return [len(example.prompt) for example in examples]

    def _says(self, rng: np.random.Generator, prompt: str) -> str:
        others = sorted(set(self.right.values()) - {self.right[prompt]})
        return str(rng.choice(others)) if rng.random() < self.error else self.right[prompt]

    def answers(
        self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[Reply]]:
        prompts = [str(example.prompt).removeprefix("say: ") for example in examples]
        rng = np.random.default_rng([self.seed, len(prompts)])
        return [[Reply(self._says(rng, prompt), True) for _ in range(max(samples, 1))] for prompt in prompts]

    def options(self, asked: Sequence[Example], groups: Sequence[int], words: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(asked), len(words)))
        rng = np.random.default_rng([self.seed, len(asked), 1])
        for row, question in enumerate(asked):
            text = str(question.prompt)
            said, options = text.split("\n", 1)
            if " or " in said:
                first, second = said.partition(": ")[2].split(" or ")
                meaning = "No" if first == second else "Yes"
                line = next(line for line in options.splitlines() if line.endswith(f": {meaning}"))
                found[row, words.index(line[0])] = 1
                continue
            prompt, proposed = said.split(" ", 1)[1].split(" A ")
            believed = self._says(rng, prompt)
            meaning = "Correct" if believed == proposed else "Incorrect"
            line = next(line for line in options.splitlines() if line.endswith(f": {meaning}"))
            found[row, words.index(line[0])] = 1
        return found

    def read(
        self,
        questions: Sequence[Example],
        groups: Sequence[int],
        words: Sequence[str],
        scored: Sequence[Example] = (),
        owners: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.options(questions, groups, words), np.tile([-1.0, 2.0], (len(scored), 1))


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
    found = confidence(Toy(right, error), examples, SHORT, tmp_path)
    assert low <= roc_auc_score(wrong, 1 - found.value) <= high
    if not error:
        assert np.all(found.value[~wrong] == 1) and np.all(found.value[wrong] == 0)


@pytest.fixture(scope="module")
def model() -> Deployed:
    params = llama.init(SHAPE, key=jax.random.key(1))
    params["embedding"] = params["embedding"] * 20
    engine = Engine(models.Model(SHAPE, {}, TOKENIZER, "random", "f"), False, (32,))
    return Deployed(engine, params)


EXAMPLES = [
    Example("a", "one?", "yes"),
    Example("b", "a much longer question, of many words?", "no"),
    Example("c", "one?", "certainly not, as far as I know"),
    Example("d", "three", "4", answers=("never looked at",)),
    Example("e", ({"role": "system", "content": "be good"}, {"role": "user", "content": "hi"}), "ho"),
]


@jax.jit
def states(params: llama.Params, ids: jax.Array) -> jax.Array:
    return llama.hidden_states(SHAPE, params, ids)


def alone(model: Deployed, prompt: Any, words: Sequence[str]) -> np.ndarray:
    """Probabilities of words' first characters after one prompt by itself."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    ids = np.zeros((1, 256), np.int32)
    own = TOKENIZER.encode(text + "\n", add_special=True)
    ids[0, : len(own)] = own
    hidden = np.asarray(states(model.params, ids))[0, len(own) - 1]
    logits = np.asarray(model.params["embedding"] @ hidden)[[TOKENIZER.encode(word)[0] for word in words]]
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_a_real_pass_is_what_single_questions_say(model: Deployed, tmp_path: Path) -> None:
    respondent = ModelRespondent(model, "f", SHORT, seed=3)
    found = confidence(respondent, EXAMPLES, SHORT, tmp_path)
    assert found.similarities.shape == found.matches.shape == (5, 3) and found.options.shape == (5, 2, 3)
    # Equal prompts share their samples, and other prompts have others.
    assert found.samples[0] == found.samples[2] and len(set(found.samples)) == 4
    for row, example in enumerate(EXAMPLES):
        expected = np.zeros((2, 3))
        for number, own in enumerate(questions(example, SHORT)):
            for order, one in zip([(0, 1, 2), (1, 2, 0), (2, 0, 1)], own, strict=True):
                expected[number, list(order)] += alone(model, one.prompt, "ABC") / 3
        np.testing.assert_allclose(found.options[row], expected, atol=1e-5)
        for sample, value in zip(found.samples[row], found.similarities[row], strict=True):
            own = final_answer(sample)
            if not own:
                assert np.isnan(value)
                continue
            text = plain_text(example.prompt)
            pairs = (example.response, own), (own, example.response)
            ends = ("A: Yes\nB: No", 0), ("A: No\nB: Yes", 1)
            yes = [alone(model, f"{text}: {a} or {b}\n{end}", "AB")[i] for a, b in pairs for end, i in ends]
            assert value == pytest.approx(1 - np.mean(yes), abs=1e-5)
    # The study's longest bucket cuts nothing here.
    wide = dataclasses.replace(model, engine=dataclasses.replace(model.engine, buckets=(64,)))
    encoded = wide.engine.encode(EXAMPLES, "all")
    assert max(encoded.lengths) > 32
    np.testing.assert_allclose(found.log_prob, wide.log_probs(encoded, 8), atol=1e-4)
    np.testing.assert_allclose(found.likelihood, np.exp(found.log_prob / found.tokens))
    assert np.all((found.value > 0) & (found.value < 1))
    expected_value = 0.7 * consistency(found.similarities, found.matches, 0.8) + 0.3 * reflection_score(found.options)
    np.testing.assert_allclose(found.value, expected_value)


def test_a_killed_pass_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "in_parts", partial(in_parts, part=4))
    examples, _, right = planted(10, 0.2, 1)
    respondent = Toy(right, 0.5)
    stages: list[tuple[str, int, int]] = []
    whole = confidence(respondent, examples, SHORT, tmp_path / "whole", lambda *step: stages.append(step))
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
            confidence(respondent, examples, SHORT, folder, kill)
        kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
        assert len(kept) == stop
        again = confidence(respondent, examples, SHORT, folder)
        for one, other in zip(whole, again, strict=True):
            np.testing.assert_array_equal(one, other)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_weights_alone_compute_nothing_again(tmp_path: Path) -> None:
    examples, _, right = planted(10, 0.2, 1)
    respondent = Toy(right, 0.5)
    first = confidence(respondent, examples, SHORT, tmp_path)
    files = set(tmp_path.rglob("*.json"))
    other = dataclasses.replace(SHORT, alpha=0.5, beta=0.2, likelihood=0.4)
    second = confidence(respondent, examples, other, tmp_path)
    assert set(tmp_path.rglob("*.json")) == files
    shares = {"similarity": 0.1, "match": 0.1, "reflection": 0.8, "likelihood": 0.4}
    expected = sum(share * getattr(first, name) for name, share in shares.items()) / 1.4
    np.testing.assert_allclose(second.value, expected)


def test_without_samples_reflection_stands_alone(tmp_path: Path) -> None:
    examples, wrong, right = planted(10, 0.2, 1)
    found = confidence(Toy(right, 0.0), examples, dataclasses.replace(SHORT, samples=0), tmp_path)
    np.testing.assert_array_equal(found.value, found.reflection)
    np.testing.assert_array_equal(found.value, ~wrong)
    assert found.similarities.shape == (10, 0) and np.isnan(found.similarity).all()


def test_written_reflections_are_searched_for_the_option(tmp_path: Path) -> None:
    texts = ["It fits. Answer: A", "(B)", "who knows", "I am not sure"]

    class Writer(Toy):
        def answers(
            self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
        ) -> list[list[Reply]]:
            # Neither the stop nor the limit of sampled answers.
            assert samples == 0 and len(examples) == 4 and max_new_tokens == 99 and not stop
            return [[Reply(text, True)] for text in texts]

    config = dataclasses.replace(SHORT, samples=0, reflection="text", reflection_max_new_tokens=99, stop=("\n",))
    pair = [Example("a", "p", "r"), Example("b", "p", "r")]
    np.testing.assert_allclose(written(Writer({}, 0), pair, config) @ [1, 0, 0.5], [[1, 0], [0.5, 0.5]])
    whole = confidence(Writer({}, 0), pair, config, tmp_path)
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
    class Silent(Toy):
        def answers(
            self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
        ) -> list[list[Reply]]:
            return [[Reply("" if samples else "yes", True)] * max(samples, 1) for _ in examples]

    found = answer(Silent({}, 0), EXAMPLES[:2], dataclasses.replace(SHORT, beta=1.0), tmp_path)
    np.testing.assert_array_equal(found.confidence, [0, 0])
    assert found.texts == ("yes", "yes") and found.given(0.1) == (None, None)


def test_answers_that_cannot_be_asked_about_are_not_given(model: Deployed, tmp_path: Path) -> None:
    # Prompt and answer fit, but no question with them does.
    config = dataclasses.replace(SHORT, reflection_templates=("x" * 240 + "{prompt} {answer}\n{options}",))
    found = answer(ModelRespondent(model, "f", config, seed=3), EXAMPLES[:2], config, tmp_path)
    assert any(found.texts) and found.given(0.1) == (None, None)
    np.testing.assert_array_equal(found.confidence, [0, 0])


def test_what_the_questions_say_decides_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, _, right = planted(10, 0.2, 1)
    first = confidence(Toy(right, 0.5), examples, SHORT, tmp_path)
    monkeypatch.setattr("duet_jax.curation.reflection.READ", "Choose.\n")
    monkeypatch.setattr(Toy, "options", lambda self, asked, groups, words: np.tile([0.5, 0.3, 0.2], (len(asked), 1)))
    second = confidence(Toy(right, 0.5), examples, SHORT, tmp_path)
    assert len(list(tmp_path.glob("questions-*"))) == 2 and not np.array_equal(first.reflection, second.reflection)


def test_another_response_is_compared_with_the_same_samples(tmp_path: Path) -> None:
    examples, _, right = planted(10, 0.2, 1)
    first = confidence(Toy(right, 0.5), examples, SHORT, tmp_path)
    edited = [dataclasses.replace(examples[0], response="w9"), *examples[1:]]
    second = confidence(Toy(right, 0.5, seed=1), edited, SHORT, tmp_path)
    assert second.samples == first.samples and len(list(tmp_path.glob("samples-*"))) == 1
    assert len(list(tmp_path.glob("questions-*"))) == 2


def test_what_is_too_long_has_no_confidence_and_ends_nothing(model: Deployed, tmp_path: Path) -> None:
    respondent = ModelRespondent(model, "f", SHORT, seed=3)
    long = [Example(f"long{i}", "p" * 250, "yes") for i in range(4)]
    found = confidence(respondent, [long[0], *EXAMPLES, *long[1:]], SHORT, tmp_path)
    whole = confidence(respondent, EXAMPLES, SHORT, tmp_path)
    assert found.asked.tolist() == [False] + [True] * 5 + [False] * 3
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one[1:6], other)
    assert all(np.isnan(getattr(found, name)[[0, 6]]).all() for name in ("value", "options", "matches", "log_prob"))
    said = summary([long[0], *EXAMPLES, *long[1:]], found)
    assert "4 of 9 examples have none and are left out" in said
    assert said.endswith("4 are longer than the model takes with the questions ('long0', 'long1', 'long2', ...)")
    # Each kind of question by itself: room is left for what is written.
    example = [Example("x", "p" * 120, "r" * 30)]
    assert askable(respondent, example, SHORT).all() and not askable(respondent, example, SHORT, 60).any()
    for change in ({"max_new_tokens": 110, "beta": 1.0}, {"reflection": "text", "reflection_max_new_tokens": 100}):
        assert not askable(respondent, example, dataclasses.replace(SHORT, **change)).any()
    # What is scored is not cut either.
    assert np.isnan(respondent.read([], [], "AB", [Example("x", "p" * 200, "r" * 100)], [0])[1]).all()


def test_lengths_are_counted_in_chunks(model: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    respondent = ModelRespondent(model, "f", SHORT, seed=3)
    whole = respondent.sizes(EXAMPLES)
    monkeypatch.setattr(asking, "CHUNK", 2)
    monkeypatch.setattr("duet_jax.curation.respondent.CHUNK", 2)
    counted: list[int] = []
    encode = ModelRespondent._encode

    def count(self: ModelRespondent, examples: Sequence[Example]) -> Any:
        counted.append(len(examples))
        return encode(self, examples)

    monkeypatch.setattr(ModelRespondent, "_encode", count)
    assert respondent.sizes(EXAMPLES) == whole and askable(respondent, EXAMPLES, SHORT).tolist() == [True] * 5
    assert max(counted) == 2


def test_a_model_answers_with_its_confidence(model: Deployed, tmp_path: Path) -> None:
    respondent = ModelRespondent(model, "f", SHORT, seed=3)
    found = answer(respondent, EXAMPLES, SHORT, tmp_path)
    scored = [dataclasses.replace(e, response=text) for e, text in zip(EXAMPLES, found.texts, strict=True)]
    told = [row for row, example in enumerate(scored) if example.response]
    assert told
    expected = confidence(respondent, [scored[row] for row in told], SHORT, tmp_path).value
    np.testing.assert_array_equal(found.confidence[told], expected)
    threshold = float(np.median(found.confidence))
    given_ = found.given(threshold)
    assert [one is not None for one in given_] == (found.confidence >= threshold).tolist()
    assert all(one is None or one == text for one, text in zip(given_, found.texts, strict=True))


def test_templates_go_around_the_last_message() -> None:
    assert dressed(EXAMPLES[0], "say: {prompt}").prompt == "say: one?"
    found = dressed(EXAMPLES[4], "say: {prompt}").prompt
    assert found == ({"role": "system", "content": "be good"}, {"role": "user", "content": "say: hi"})
    assert dressed(Example("x", (), "a reply alone"), "say: {prompt}").prompt == "say: "


def test_mistakes_are_named_before_anything_is_computed(model: Deployed, tmp_path: Path) -> None:
    def run(example: Example, **change: Any) -> Any:
        config = dataclasses.replace(SHORT, **change)
        return confidence(ModelRespondent(model, "f", config, seed=0), [example], config, tmp_path)

    with pytest.raises(DataError, match="example 'x' has no response"):
        run(Example("x", "p", ""))
    long = Example("x", "p" * 60, "r")
    for found in (run(Example("x", "p" * 256, "r")), run(long, max_new_tokens=200)):
        assert found.samples == ((),) and not found.asked.any()
        shapes = {"similarities": (1, 3), "matches": (1, 3), "options": (1, 2, 3)}
        for name, values in found._asdict().items():
            assert name in ("samples", "asked") or (values.shape == shapes.get(name, (1,)) and np.isnan(values).all())
        message = "no question about any of 1 examples, such as 'x', fits into the 256 tokens that the model takes"
        with pytest.raises(DataError, match=message):
            require_asked([long], found, 256)
    config = dataclasses.replace(SHORT, max_new_tokens=200)
    with pytest.raises(
        DataError, match="'x': its prompt of 62 tokens and an answer of up to 200 are more than the 256"
    ):
        answer(ModelRespondent(model, "f", config, seed=0), [Example("x", "p" * 60, "")], config, tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(ModelError, match="random cannot choose between Yes, Yonder: .* must all differ"):
        ModelRespondent(model, "f", SHORT, 0).read([EXAMPLES[0]], [0], ("Yes", "Yonder"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1.5; it must be in \[0, 1\]"),
        ({"samples": 0, "beta": 1.0}, "samples is 0, but beta is 1"),
        ({"contradiction": "nli"}, "model is missing; it is needed where contradiction is 'nli'"),
        ({"function": "a:b"}, "function has no meaning; leave it out where contradiction is 'judge'"),
        ({"sample_template": "{question}"}, "sample_template is '{question}'; it must be a text with {prompt}"),
        ({"reflection_templates": ("{prompt} {",)}, r"reflection_templates.0 is .*, no template"),
        (
            {"contradiction": "python", "function": "a:b", "contradiction_template": "{first} {second}"},
            "contradiction_template has no meaning; leave it out where contradiction is 'python'",
        ),
    ],
)
def test_configurations_that_are_none(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConfidenceConfig(**change)


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
