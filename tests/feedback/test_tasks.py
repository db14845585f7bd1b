"""Built-in tasks: their numbers equal those of the definition, computed the long way."""

from __future__ import annotations

import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax._checks import FieldError
from duet_jax.config import RewardConfig, TaskConfig
from duet_jax.data import Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import DataError, FeedbackError
from duet_jax.feedback import Deployed, Engine, Feedback, WeightedSum, build
from duet_jax.feedback.answers import exact_match, normalise, token_f1
from duet_jax.models import llama
from duet_jax.models.sampling import Sampling
from tests.small import shape

TOKENIZER = CharacterTokenizer("abcdefgh ?\n")
CONFIG = shape(TOKENIZER, max_length=2048)


def example(number: int, prompt: str, response: str, **fields) -> Example:
    return Example(id=str(number), prompt=prompt, response=response, **fields)


@pytest.fixture(scope="module")
def model() -> Deployed:
    params = llama.init(CONFIG, key=jax.random.key(0))
    params["embedding"] = params["embedding"] * 30
    base = types.SimpleNamespace(config=CONFIG, params=params, tokenizer=TOKENIZER)
    return Deployed(Engine(base, False, (8, 16, 24)), params)


@jax.jit
def every_logit(params: llama.Params, ids: jax.Array) -> jax.Array:
    return llama.hidden_states(CONFIG, params, ids[None])[0] @ llama.output_head(params).T


def logits(model: Deployed, ids: list[int]) -> np.ndarray:
    """Logits `[T, V]` after each of some ids, one text at a time, at one padded length."""
    return np.asarray(every_logit(model.params, jnp.asarray(np.pad(ids, (0, 32 - len(ids))))))[: len(ids)]


def log_probs(model: Deployed, prompt: str, response: str) -> np.ndarray:
    """Log-probability of each response token and the end of text, one forward pass without batching."""
    start = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt + "\n" if prompt else "")]
    ids = [*start, *TOKENIZER.encode(response), TOKENIZER.eos_ids[0]]
    every = np.asarray(jax.nn.log_softmax(logits(model, ids)))
    return np.array([every[t - 1, ids[t]] for t in range(len(start), len(ids))])


ROWS = [("ab?", "cd"), ("", "hgfedcba"), ("a b c d e f", "g"), ("h?", "abc abc"), ("e?", "e")]


def test_response_loss_and_perplexity(model):
    examples = [example(i, *row) for i, row in enumerate(ROWS)]
    parts = [log_probs(model, *row) for row in ROWS]
    sums, counts = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
    loss = -sums.sum() / counts.sum()
    config = TaskConfig(kind="response_loss", source="x", batch_size=2)
    found = build(config, model.engine, examples, "task")(model)
    assert found.value == pytest.approx(-loss, abs=1e-5)
    residual = -sums - loss * counts
    stderr = math.sqrt(residual @ residual * 5 / 4) / counts.sum()
    assert found.stderr == pytest.approx(stderr, rel=1e-4)

    config = TaskConfig(kind="perplexity", source="x", batch_size=2)
    found = build(config, model.engine, examples, "task")(model)
    assert found.value == pytest.approx(-math.exp(loss), rel=1e-5)
    assert found.stderr == pytest.approx(math.exp(loss) * stderr, rel=1e-4)


@pytest.mark.parametrize("normalisation", ["raw", "length"])
def test_multiple_choice(model, normalisation):
    rng = np.random.default_rng(0)
    examples, right = [], []
    for i in range(12):
        choices = tuple("".join(rng.choice(list("abcdefgh"), rng.integers(1, 8))) for _ in range(3))
        answer = int(rng.integers(3))
        examples.append(example(i, "ab?", choices[answer], choices=choices, answer_index=answer))
        scores = [
            log_probs(model, "ab?", choice).sum() / (1 if normalisation == "raw" else len(choice)) for choice in choices
        ]
        right.append(float(np.argmax(scores) == answer))
    config = TaskConfig(kind="multiple_choice", source="x", batch_size=4, normalisation=normalisation)
    found = build(config, model.engine, examples, "task")(model)
    share = np.mean(right)
    assert 0 < share < 1
    assert found.value == pytest.approx(share)
    assert found.stderr == pytest.approx(math.sqrt(share * (1 - share) / 11))


def test_multiple_choice_needs_choices_that_fit(model):
    config = TaskConfig(kind="multiple_choice", source="x")
    with pytest.raises(DataError, match="example 0 is no multiple-choice question"):
        build(config, model.engine, [example(0, "a", "b")], "task")
    long = example(0, "a" * 20, "b", choices=("b" * 9, "c"), answer_index=1)
    with pytest.raises(DataError, match="raise data.max_length"):
        build(config, model.engine, [long], "task")


def test_generated_answers_are_compared_with_the_accepted_ones(model):
    prompts = [row[0] for row in ROWS]
    replies = []
    for prompt in prompts:
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt + "\n" if prompt else "")]
        start = len(ids)
        for _ in range(6):
            ids.append(int(logits(model, ids)[-1].argmax()))
        reply = ids[start:]
        replies.append(TOKENIZER.decode(reply[: reply.index(2)] if 2 in reply else reply))
    wrong = [text + "h" for text in replies]
    mixed = [
        example(i, prompt, "zzz", answers=(reply if i % 2 else wrong[i], "zz"))
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]
    config = TaskConfig(kind="exact_match", source="x", batch_size=3, max_new_tokens=6)
    task = build(config, model.engine, mixed, "task")
    assert model.answer(task.prompts, 6, 3) == replies
    expected = [exact_match(reply, e.answers) for reply, e in zip(replies, mixed, strict=True)]
    assert task(model).value == pytest.approx(np.mean(expected))


def test_answers_must_fit_the_context(model):
    config = TaskConfig(kind="exact_match", source="x", max_new_tokens=2046)
    with pytest.raises(DataError, match="a prompt of 4 tokens and an answer of up to 2046 are more than the 2048"):
        build(config, model.engine, [example(0, "ab", "c")], "x")


def test_the_best_of_several_answers_is_at_least_their_mean(model):
    """Against the samples themselves; of rewards of 0 and 1, the best of all is whether there is a 1."""
    examples = [example(i, prompt, "") for i, prompt in enumerate(["ab", "ba", "abc"])]
    reward = RewardConfig(kind="regex", pattern="[a-d]", where="anywhere")
    fields = dict(kind="reward", source="x", reward=reward, max_new_tokens=6, batch_size=4, temperature=3.0, samples=5)
    prompts = model.engine.encode_prompts(examples)
    found = model.sample(prompts, Sampling(3.0), samples=5, max_new_tokens=6, batch_size=4, seed=0)
    held = np.array([[bool(re.search("[a-d]", text)) for text in texts] for texts in found.texts])
    values = [build(TaskConfig(**fields, best_of=k), model.engine, examples, "x")(model).value for k in (1, 5)]
    assert values == pytest.approx([held.mean(), held.any(axis=1).mean()])
    assert values[1] > values[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 2}, "temperature is 0.0; it must be greater than 0 where samples is greater than 1"),
        ({"samples": 2, "temperature": 1.0, "best_of": 3}, r"best_of is 3; it must be at most samples \(2\)"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
    ],
)
def test_samples_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        TaskConfig(kind="reward", source="x", reward=RewardConfig(kind="exact_match"), **fields)


def test_weighted_sum(model):
    parts = [(2.0, lambda m: Feedback(1.0, 0.3)), (-0.5, lambda m: Feedback(4.0, 0.4))]
    found = WeightedSum(tuple(parts))(model)
    assert found.value == pytest.approx(0.0)
    assert found.stderr == pytest.approx(math.hypot(0.6, 0.2))
    assert WeightedSum(((1.0, lambda m: Feedback(1.0)),))(model).stderr is None


def test_scoring_compiles_once_for_each_bucket(model):
    examples = [example(i, *row) for i, row in enumerate(ROWS)]
    task = build(TaskConfig(kind="response_loss", source="x", batch_size=2), model.engine, examples, "t")
    task(model)
    before = model.engine.score._cache_size()
    changed = jax.tree.map(lambda x: x * 0.9, model.params)
    assert task(Deployed(model.engine, changed)).value != task(model).value
    assert model.engine.score._cache_size() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_feedback_must_be_finite(value):
    with pytest.raises(FeedbackError, match="finite number"):
        Feedback(value)
    with pytest.raises(FeedbackError, match="not negative"):
        Feedback(1.0, -0.1)


def test_answers_are_normalised_as_squad_does():
    assert normalise("The  Cat, an animal!") == "cat animal"
    assert exact_match("The cat.", ["dog", "cat"]) == 1.0
    assert exact_match("cats", ["cat"]) == 0.0
    # Two of three predicted words are right, two of four are found: F1 = 2 * 2 / (3 + 4).
    assert token_f1("red green blue", ["red blue white black", "x"]) == pytest.approx(4 / 7)
    assert token_f1("", ["the"]) == 1.0
    assert token_f1("", ["x"]) == 0.0
