"""Rewards as configurations name them, and the task that measures a model by one."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax.config import RewardConfig, TaskConfig
from duet_jax.data import Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import ConfigError, FeedbackError
from duet_jax.feedback import Deployed, Engine, build
from duet_jax.feedback.rewards import build_reward
from duet_jax.feedback.rewards.sandbox import isolation
from duet_jax.models import llama
from tests.small import shape


def decoded(**fields) -> RewardConfig:
    tree = {
        "name": "x",
        "budget": 4,
        "rounds": 1,
        "model": {"scratch": {}},
        "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
        "training": {"learning_rate": 0.001},
        "task": {"kind": "reward", "source": "t.jsonl", "reward": fields},
    }
    found = configs.from_dict(tree).task.reward
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "exactmatch"}, "task.reward.kind is 'exactmatch'; it must be one of .*did you mean 'exact_match'?"),
        ({}, "task.reward.kind is missing"),
        ({"kind": "regex"}, "task.reward.pattern is missing; a reward of kind 'regex' needs it."),
        ({"kind": "regex", "pattern": "(a"}, r"task.reward.pattern is '\(a', no regular expression: missing \)"),
        ({"kind": "regex", "pattern": "a", "where": "end"}, "task.reward.where is 'end'; it must be one of"),
        ({"kind": "rouge_l", "pattern": "a"}, "task.reward.pattern has no meaning for a reward of kind 'rouge_l'"),
        ({"kind": "judge"}, "task.reward.model is missing"),
        ({"kind": "reward_model", "model": "x", "reference": False}, "task.reward.reference has no meaning"),
        ({"kind": "python", "function": "no colon"}, "task.reward.function is 'no colon'; .* module:callable"),
        ({"kind": "python", "function": "a:b", "low": 1, "high": 0}, "task.reward.high is 0.0; .* greater than low"),
        ({"kind": "python", "function": "a:b", "workers": 0}, "task.reward.workers is 0; it must be at least 1"),
        ({"kind": "length"}, "task.reward.minimum is 0; .* greater than 0 where there is no maximum"),
        ({"kind": "length", "minimum": 5, "maximum": 4}, "task.reward.maximum is 4; it must be at least 5"),
        ({"kind": "length", "maximum": 0}, "task.reward.maximum is 0; it must be at least 1"),
        ({"kind": "length", "minimum": -1, "maximum": 4}, "task.reward.minimum is -1; it must be at least 0"),
        ({"kind": "numeric", "tolerance": -0.1}, "task.reward.tolerance is -0.1; it must be at least 0"),
        ({"kind": "unit_tests", "seconds": 0}, "task.reward.seconds is 0; it must be at least 1"),
        ({"kind": "unit_tests", "memory_mb": 8}, "task.reward.memory_mb is 8; it must be at least 64"),
    ],
)
def test_mistakes_name_the_field(fields, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        decoded(**fields)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("task.reward=null", "task.reward is missing; a task of kind 'reward' needs it."),
        ("task.source=null", "task.source is missing; a task of kind 'reward' needs it."),
        ("task.stop=['']", "task.stop is .*; it must be a list of texts that are not empty."),
        ("task.kind=exact_match", "task.reward has no meaning for a task of kind 'exact_match'"),
    ],
)
def test_mistakes_in_the_task(assignment, sentence) -> None:
    text = """
name: x
budget: 4
rounds: 1
model: {scratch: {}}
data: {domains: [{name: a, source: a.jsonl}, {name: b, source: b.jsonl}]}
training: {learning_rate: 0.001}
task: {kind: reward, source: t.jsonl, reward: {kind: length, maximum: 9}}
"""
    assert configs.loads(text).task.reward == RewardConfig(kind="length", maximum=9)
    assert configs.loads(configs.dump(configs.loads(text))) == configs.loads(text)
    with pytest.raises(ConfigError, match=sentence):
        configs.loads(text, [assignment])


def test_unit_tests_are_run_once(tmp_path) -> None:
    if isolation() is None:
        pytest.skip("this machine cannot isolate programs")
    example = Example("e1", "Write add.", "", meta={"test_list": ["assert add(2, 3) == 5"]})
    reward = build_reward(RewardConfig(kind="unit_tests"), tmp_path)
    assert (reward.low, reward.high, reward.needs_label) == (0.0, 1.0, False)
    replies = ["def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"]
    assert reward(replies, [example] * 2).tolist() == [1.0, 0.0]
    again = build_reward(RewardConfig(kind="unit_tests"), tmp_path)
    assert again(replies[::-1], [example] * 2).tolist() == [0.0, 1.0]
    assert build_reward(RewardConfig(kind="unit_tests", seconds=2)).identity != again.identity
    with pytest.raises(FeedbackError, match="Example e2 has no unit tests"):
        reward.check([Example("e2", "p", "r")])


TOKENIZER = CharacterTokenizer("abcdefgh ?\n")
CONFIG = shape(TOKENIZER, max_length=2048)


@pytest.fixture(scope="module")
def model() -> Deployed:
    params = llama.init(CONFIG, key=jax.random.key(0))
    params["embedding"] = params["embedding"] * 30
    base = types.SimpleNamespace(config=CONFIG, params=params, tokenizer=TOKENIZER)
    return Deployed(Engine(base, False, (8, 16, 24)), params)


EXAMPLES = [Example(str(i), prompt, "abc") for i, prompt in enumerate(["ab?", "", "a b c d e f", "h?", "e?"])]


def task(**fields) -> TaskConfig:
    reward = RewardConfig(kind="length", unit="characters", minimum=12)
    return TaskConfig(
        **{"kind": "reward", "source": "x", "batch_size": 3, "max_new_tokens": 8, "reward": reward, **fields}
    )


def test_a_task_is_the_mean_reward_of_greedy_replies(model) -> None:
    built = build(task(), model.engine, EXAMPLES, "task")
    found = built(model)
    replies = model.answer(model.engine.encode_prompts(EXAMPLES), 8, 3)
    expected = np.array([len(reply) / 12 for reply in replies])
    assert expected.std() > 0
    assert found.value == pytest.approx(expected.mean())
    assert found.stderr == pytest.approx(expected.std(ddof=1) / np.sqrt(5))
    assert found.details == {"length": pytest.approx(expected.mean())}


def test_stop_strings_end_replies(model) -> None:
    replies = model.answer(model.engine.encode_prompts(EXAMPLES), 8, 3)
    stop = max(replies, key=len)[2]
    expected = np.mean([len(reply.partition(stop)[0]) / 12 for reply in replies])
    found = build(task(stop=(stop,)), model.engine, EXAMPLES, "task")(model)
    assert found.value == pytest.approx(expected)
    assert found.value < build(task(), model.engine, EXAMPLES, "task")(model).value


def test_examples_are_checked_before_anything_is_trained(model) -> None:
    unlabelled = [*EXAMPLES, Example("u", "a", "")]
    with pytest.raises(FeedbackError, match="example u has neither a response nor answers"):
        build(task(reward=RewardConfig(kind="rouge_l")), model.engine, unlabelled, "task")
    with pytest.raises(FeedbackError, match="Example 0 is no multiple-choice question"):
        build(task(reward=RewardConfig(kind="multiple_choice")), model.engine, EXAMPLES, "task")
    build(task(response=None), model.engine, unlabelled, "task")


def test_a_reward_may_be_part_of_a_sum() -> None:
    whole = TaskConfig(kind="sum", tasks=(configs.WeightedTask(weight=0.5, task=task()),))
    assert whole.tasks[0].task.reward is not None
