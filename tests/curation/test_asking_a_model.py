"""A model of our own is asked: what it says is what single questions say, and what is too long is left out."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from duet_jax import models
from duet_jax.config import ConfidenceConfig
from duet_jax.curation import asking
from duet_jax.curation.answers import answer
from duet_jax.curation.asking import askable, confidence, dressed, require_asked, summary
from duet_jax.curation.confidence import final_answer, known_mean, reflection_score
from duet_jax.curation.reflection import questions
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.data import Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.data.example import plain_text
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback import Deployed, Engine
from duet_jax.models import llama
from tests.small import shape

TOKENIZER = CharacterTokenizer(string.printable[:95] + "\n")
SHAPE = shape(TOKENIZER, num_layers=1, max_length=256)
TEMPLATES = ("Q {prompt} A {answer}\n{options}", "Sure? {prompt} A {answer}\n{options}")
SHORT = ConfidenceConfig(
    samples=3,
    max_new_tokens=6,
    batch_size=4,
    sample_template="say: {prompt}",
    reflection_templates=TEMPLATES,
    contradiction_template="{prompt}: {first} or {second}\n{options}",
)


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
    consistency = known_mean(0.8 * found.similarities + (1 - 0.8) * found.matches)
    expected_value = 0.7 * consistency + 0.3 * reflection_score(found.options)
    np.testing.assert_allclose(found.value, expected_value)


def test_answers_that_cannot_be_asked_about_are_not_given(model: Deployed, tmp_path: Path) -> None:
    # Prompt and answer fit, but no question with them does.
    config = dataclasses.replace(SHORT, reflection_templates=("x" * 240 + "{prompt} {answer}\n{options}",))
    found = answer(ModelRespondent(model, "f", config, seed=3), EXAMPLES[:2], config, tmp_path)
    assert any(found.texts) and found.given(0.1) == (None, None)
    np.testing.assert_array_equal(found.confidence, [0, 0])


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
    # Where nothing is asked, nothing is chosen.
    letters, log_probs = ModelRespondent(model, "f", SHORT, 0).read([], [], ("Yes", "Yonder"), [EXAMPLES[0]], [0])
    assert letters.shape == (0, 2) and np.isfinite(log_probs).all()
