"""Reward models and judges: their numbers are those of one text at a time, computed the long way."""

from __future__ import annotations

import dataclasses
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duet_jax import models
from duet_jax.config import RewardConfig
from duet_jax.data import Encoded, Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import FeedbackError, ModelError
from duet_jax.feedback.rewards import build_reward
from duet_jax.feedback.rewards.judge import BAD, COMPARE, GOOD, GRADE
from duet_jax.feedback.rewards.readout import Readout, compiled
from duet_jax.models import llama
from tests.small import shape

TOKENIZER = CharacterTokenizer(string.printable[:95] + "\n")
CONFIG = shape(TOKENIZER)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def save(folder, *, scale: float = 20.0, config: llama.LlamaConfig = CONFIG, tokenizer=TOKENIZER, chat: bool = False):
    params = llama.init(config, key=jax.random.key(0))
    params["embedding"] = params["embedding"] * scale
    models.save(models.Model(config, params, tokenizer, "random", ""), folder)
    if chat:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def save_reward_model(folder, score: np.ndarray | None = None, **options):
    save(folder, **options)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    score = np.linspace(-1, 1, 16, dtype=np.float32)[None] if score is None else score
    save_file({**tensors, "score.weight": score}, folder / "model.safetensors")
    return folder


@jax.jit
def padded_states(params, ids):
    return llama.hidden_states(CONFIG, params, ids)


def hidden(folder, text: str, *, bos: bool) -> np.ndarray:
    """Final hidden states of one text by itself."""
    model = models.load(folder)
    ids = ([1] if bos else []) + model.tokenizer.encode(text)
    row = np.zeros((1, CONFIG.max_length), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(padded_states(model.params, row)[0, : len(ids)])


REPLIES = ["fine", "a longer reply, of " + "many words " * 9, "", "fine", "no", "x" * 90, "?"]
EXAMPLES = [Example(f"e{i}", f"question {i * '.'}", "the reference") for i in range(7)]


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_scores_the_last_token(tmp_path, chat) -> None:
    lm = save(tmp_path / "lm", chat=chat)
    folder = save_reward_model(tmp_path / "rm", chat=chat)
    reward = build_reward(RewardConfig(kind="reward_model", model=str(folder), batch_size=3))
    assert (reward.low, reward.high, reward.needs_label) == (-np.inf, np.inf, False)
    score = np.linspace(-1, 1, 16)
    expected = []
    for reply, example in zip(REPLIES, EXAMPLES, strict=True):
        if chat:
            text = f"<user>{example.prompt}<eos><assistant>{reply}<eos>"
            expected.append(hidden(lm, text, bos=False)[-1] @ score)
        else:
            expected.append(hidden(lm, f"{example.prompt}\n{reply}", bos=True)[-1] @ score)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(reward(REPLIES, EXAMPLES), expected, atol=2e-5)


def test_padding_is_passed_over_where_it_is_the_end_of_text_too(tmp_path) -> None:
    lm = save(tmp_path / "lm", chat=True)
    folder = save_reward_model(tmp_path / "rm", chat=True)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pad_token_id": 2}))
    reward = build_reward(RewardConfig(kind="reward_model", model=str(folder), batch_size=3))
    text = "<user>question <eos><assistant>fine<eos>"
    expected = hidden(lm, text, bos=False)[-2] @ np.linspace(-1, 1, 16)
    assert reward(["fine"], EXAMPLES[:1])[0] == pytest.approx(expected, abs=2e-5)


def test_reward_models_that_are_none(tmp_path) -> None:
    def built(folder):
        return build_reward(RewardConfig(kind="reward_model", model=str(folder), batch_size=3))

    with pytest.raises(ModelError, match="There is no reward model at"):
        built(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="the tensor score.weight is not there; it must have the shape"):
        built(save(tmp_path / "lm"))
    with pytest.raises(ModelError, match=r"the tensor score.weight has shape \[2, 16\]"):
        built(save_reward_model(tmp_path / "two", np.zeros((2, 16), np.float32)))
    few = dataclasses.replace(CONFIG, vocab_size=50)
    with pytest.raises(ModelError, match="they do not belong together"):
        built(save_reward_model(tmp_path / "few", config=few))


def test_what_is_too_long_is_refused_not_cut(tmp_path) -> None:
    folder = save_reward_model(tmp_path / "rm")
    reward = build_reward(RewardConfig(kind="reward_model", model=str(folder), batch_size=3))
    example = Example("e7", "q", "r")
    reward(["x" * (512 - 3)], [example])
    with pytest.raises(FeedbackError, match="Example e7 and its reply are 513 tokens .* at most 512"):
        reward(["x" * (512 - 2)], [example])


def probability(folder, question: str, letter: str) -> float:
    logits = hidden(folder, question + "\n", bos=True)[-1] @ np.asarray(models.load(folder).params["embedding"]).T
    a, b = (logits[TOKENIZER.encode(x)[0]] for x in "AB")
    return float({"A": 1, "B": -1}[letter] * (a - b))


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge") / "model")


def test_a_judge_compares_in_both_orders(judge_folder) -> None:
    reward = build_reward(RewardConfig(kind="judge", model=str(judge_folder), batch_size=3))
    assert (reward.low, reward.high, reward.needs_label) == (0.0, 1.0, True)
    expected = []
    for reply, example in zip(REPLIES, EXAMPLES, strict=True):
        first = COMPARE.format(prompt=example.prompt, first=reply, second=example.response)
        second = COMPARE.format(prompt=example.prompt, first=example.response, second=reply)
        both = probability(judge_folder, first, "A"), probability(judge_folder, second, "B")
        expected.append(np.mean([sigmoid(x) for x in both]))
    np.testing.assert_allclose(reward(REPLIES, EXAMPLES), expected, atol=2e-5)
    assert np.std(expected) > 1e-3


def test_a_judge_grades_alone_with_both_meanings_of_the_letters(judge_folder) -> None:
    reward = build_reward(RewardConfig(kind="judge", model=str(judge_folder), reference=False, batch_size=3))
    assert not reward.needs_label
    unlabelled = dataclasses.replace(EXAMPLES[2], response="")
    first, second = (
        GRADE.format(prompt=unlabelled.prompt, reply="fine", first=a, second=b) for a, b in ((GOOD, BAD), (BAD, GOOD))
    )
    both = probability(judge_folder, first, "A"), probability(judge_folder, second, "B")
    expected = np.mean([sigmoid(x) for x in both])
    assert reward(["fine"], [unlabelled])[0] == pytest.approx(expected, abs=2e-5)


def test_judging_is_fair(judge_folder) -> None:
    reward = build_reward(RewardConfig(kind="judge", model=str(judge_folder), batch_size=3))
    one = reward(["this one"], [Example("e", "q", "that one")])[0]
    other = reward(["that one"], [Example("e", "q", "this one")])[0]
    assert one + other == pytest.approx(1, abs=1e-6) and abs(one - 0.5) > 1e-4
    assert reward(["that one"], [Example("e", "q", "that one")])[0] == pytest.approx(0.5, abs=1e-6)


def test_a_judge_that_always_says_a_says_nothing(tmp_path) -> None:
    # Without layers its verdict follows from the last character of the question alone.
    folder = save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    blind = {k: np.zeros_like(v) if "proj" in k else v for k, v in tensors.items()}
    save_file(blind, folder / "model.safetensors")
    assert abs(probability(folder, "anything", "A")) > 0.1
    values = build_reward(RewardConfig(kind="judge", model=str(folder), batch_size=3))(REPLIES, EXAMPLES)
    np.testing.assert_allclose(values, 0.5, atol=1e-6)


def test_a_judge_needs_the_letters(tmp_path) -> None:
    folder = save(tmp_path / "model", tokenizer=CharacterTokenizer("abc\n"))
    with pytest.raises(ModelError, match="cannot judge: its tokenizer writes the letters A and B"):
        build_reward(RewardConfig(kind="judge", model=str(folder), batch_size=3))


def test_identities_tell_models_and_questions_apart(judge_folder, tmp_path) -> None:
    other = save(tmp_path / "other", scale=21.0)
    chat = save(tmp_path / "chat", chat=True)
    configs = [
        RewardConfig(kind="judge", model=str(judge_folder)),
        RewardConfig(kind="judge", model=str(judge_folder), reference=False),
        RewardConfig(kind="judge", model=str(judge_folder), dtype="bfloat16"),
        RewardConfig(kind="judge", model=str(other)),
        RewardConfig(kind="judge", model=str(chat)),
        RewardConfig(kind="reward_model", model=str(save_reward_model(tmp_path / "rm"))),
        RewardConfig(kind="reward_model", model=str(save_reward_model(tmp_path / "rm2", np.ones((1, 16), np.float32)))),
    ]
    assert len({build_reward(config).identity for config in configs}) == len(configs)
    moved = save(tmp_path / "the same elsewhere")
    assert (
        build_reward(RewardConfig(kind="judge", model=str(moved))).identity
        == build_reward(RewardConfig(kind="judge", model=str(judge_folder))).identity
    )


def test_judged_replies_are_kept(judge_folder, tmp_path, monkeypatch) -> None:
    config = RewardConfig(kind="judge", model=str(judge_folder), batch_size=3)
    found = build_reward(config, tmp_path)(REPLIES, EXAMPLES)
    again = build_reward(config, tmp_path)
    monkeypatch.setattr(Readout, "__call__", lambda *_: pytest.fail("asked again"))
    assert again(REPLIES, EXAMPLES).tolist() == found.tolist()


def test_reading_compiles_once_for_each_length(judge_folder) -> None:
    compiled.cache_clear()
    model = models.load(judge_folder)
    readout = Readout(model, model.params["embedding"][:2], 3, jnp.float32)

    def read(lengths: list[int]) -> np.ndarray:
        tokens = tuple(np.full(length, 7, np.int32) for length in lengths)
        return readout(Encoded(tokens, np.array(lengths, np.int32), ("e",) * len(lengths)), [n - 1 for n in lengths])

    assert read([5, 300, 64, 65, 1, 260]).shape == (6, 2)
    assert compiled(model.config, jnp.float32)._cache_size() == 2  # of 64 and 512 tokens
    again = Readout(models.load(judge_folder), readout.rows + 1, 3, jnp.float32)
    again(Encoded((np.full(40, 7, np.int32),), np.array([40], np.int32), ("e",)), [3])
    read([511, 400, 300, 512, 64])
    assert compiled(model.config, jnp.float32)._cache_size() == 2
    assert read([]).shape == (0, 2)
