"""What every reward promises: one checked number for each reply, in order, whatever the function behind it does."""

from __future__ import annotations

import importlib
import math
import sqlite3
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import RewardConfig
from duet_jax.data import Example
from duet_jax.errors import ConfigError, FeedbackError
from duet_jax.feedback.rewards import Reward, build_reward, cached, of_parts
from duet_jax.feedback.rewards.cache import everything


def example(number: int = 0, response: str = "yes", **fields) -> Example:
    return Example(id=f"e{number}", prompt="p", response=response, **fields)


def reward(function, *, low=0.0, high=1.0, needs_label=False, identity="one") -> Reward:
    return Reward("mine", low, high, needs_label, identity, function)


def lengths(replies, examples):
    return [len(reply) / 100 for reply in replies]


def test_values_are_float64_in_order() -> None:
    values = reward(lengths)(["a", "bbb", ""], [example(i) for i in range(3)])
    assert values.dtype == np.float64 and values.tolist() == [0.01, 0.03, 0.0]
    assert reward(lengths)([], []).shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1, None, "high", [0.5, 0.5]])
def test_a_value_out_of_range_is_named_with_its_example(value) -> None:
    with pytest.raises(FeedbackError, match=r"The reward mine gave .* reply to example e1; .* in \[0.0, 1.0\]"):
        reward(lambda replies, examples: [0.5, value])(["a", "b"], [example(0), example(1)])


def test_an_unbounded_range_still_refuses_infinity() -> None:
    unbounded = reward(lambda replies, examples: [float(reply) for reply in replies], low=-math.inf, high=math.inf)
    assert unbounded(["-1e9"], [example()]).tolist() == [-1e9]
    with pytest.raises(FeedbackError, match="must give a finite number"):
        unbounded(["inf"], [example()])


def test_each_set_of_examples_has_its_own_reward() -> None:
    """Also where ids, and whole examples, are equal."""
    first, second = [example(0), example(1)], [example(0), example(2, response="")]
    exact = build_reward(RewardConfig(kind="exact_match"))
    both = of_parts([(exact, first), (reward(lengths, high=2.0), second)])
    asked = [second[0], first[1], first[0], second[1]]
    assert both(["yes", "yes", "no", "abcd"], asked).tolist() == [0.03, 1.0, 0.0, 0.04]
    assert (both.low, both.high, both.name) == (0.0, 2.0, "exact_match and mine")
    other = of_parts([(exact, first[:1]), (reward(lengths, high=2.0), second)])
    assert other.identity != both.identity


def test_counts_must_agree() -> None:
    with pytest.raises(FeedbackError, match="2 replies and 1 examples"):
        reward(lengths)(["a", "b"], [example()])
    with pytest.raises(FeedbackError, match="gave 1 values for 2 replies"):
        reward(lambda replies, examples: [0.0])(["a", "b"], [example(), example()])


def test_a_label_is_required_only_where_it_is_read() -> None:
    unlabelled = [example(0), example(7, response="")]
    with pytest.raises(FeedbackError, match="example e7 has neither a response nor answers"):
        reward(lengths, needs_label=True).check(unlabelled)
    reward(lengths, needs_label=True).check([example(7, response="", answers=("x",))])
    reward(lengths).check(unlabelled)


def test_the_range_must_be_one() -> None:
    with pytest.raises(FeedbackError, match="low must be less than high"):
        reward(lengths, low=1.0, high=1.0)


FUNCTIONS = """
import threading
import time

def overlap(reply, example):
    if reply == "slow":
        time.sleep(0.05)
    return len(set(reply) & set(example.response)) / 10

def fails(reply, example):
    return {"yes": 1.0}[reply]

both = threading.Barrier(2, timeout=5)

def meets(reply, example):
    both.wait()
    return 1.0
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards_of_test", raising=False)
    return tmp_path / "my_rewards_of_test.py"


def python(name: str, **fields) -> Reward:
    return build_reward(RewardConfig(kind="python", function=f"my_rewards_of_test:{name}", **fields))


def test_a_function_is_called_with_reply_and_example(functions) -> None:
    mine = python("overlap", low=0.0, high=1.0)
    assert mine.needs_label and (mine.low, mine.high) == (0.0, 1.0)
    assert mine(["yo", "slow", "s"], [example(i) for i in range(3)]).tolist() == [0.1, 0.1, 0.1]
    assert python("overlap", workers=3)(["slow", "y", "ye"], [example()] * 3).tolist() == [0.1, 0.1, 0.2]
    assert python("overlap").low == -math.inf


def test_workers_call_the_function_at_once(functions) -> None:
    # Each of two calls waits for the other: one after the other they would never end.
    assert python("meets", workers=2)(["a", "b"], [example(), example()]).tolist() == [1.0, 1.0]


def test_an_error_of_the_function_names_the_example(functions) -> None:
    with pytest.raises(FeedbackError, match="fails failed for a reply to example e1: KeyError: 'no'") as caught:
        python("fails")(["yes", "no"], [example(0), example(1)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_is_not_there(functions) -> None:
    with pytest.raises(ConfigError, match="reward.function: the module 'my_rewards_of_test' has no function 'none'"):
        python("none")
    with pytest.raises(ConfigError, match="reward.function: the module 'no_such_module' cannot be imported"):
        build_reward(RewardConfig(kind="python", function="no_such_module:f"))


class Counting:
    """A reward function that remembers what it was asked, and may be killed."""

    def __init__(self, dies_at: int | None = None):
        self.asked: list[str] = []
        self.dies_at = dies_at

    def __call__(self, replies, examples):
        for reply in replies:
            if len(self.asked) == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(reply)
        return lengths(replies, examples)


def test_what_a_batch_repeats_is_computed_once() -> None:
    counting = Counting()
    replies = ["a", "bb", "a", "ccc", "bb"]
    values = cached(reward(counting), None)(replies, [example(i) for i in range(5)])
    assert values.tolist() == [0.01, 0.02, 0.01, 0.03, 0.02]
    assert counting.asked == ["a", "bb", "ccc"]


def test_a_cache_answers_what_it_was_asked_before(tmp_path) -> None:
    first, second, third = Counting(), Counting(), Counting()
    cached(reward(first), tmp_path / "new" / "folder")(["a", "bb"], [example()] * 2)
    assert cached(reward(second), tmp_path / "new" / "folder")(["bb", "c"], [example()] * 2).tolist() == [0.02, 0.01]
    assert second.asked == ["c"]
    cached(reward(third, identity="another"), tmp_path / "new" / "folder")(["a"], [example()])
    assert third.asked == ["a"]
    assert len(list((tmp_path / "new" / "folder").glob("*.sqlite"))) == 2


def test_values_come_back_exactly(tmp_path) -> None:
    numbers = [math.pi, 1e-310, -1 / 3, 2**53 + 0.0, 0.1 + 0.2]
    odd = reward(lambda replies, examples: [numbers[int(r)] for r in replies], low=-math.inf, high=math.inf)
    replies = [str(i) for i in range(5)]
    cached(odd, tmp_path)(replies, [example()] * 5)
    refusing = reward(lambda *_: pytest.fail("asked again"), low=-math.inf, high=math.inf)
    found = cached(refusing, tmp_path)(replies, [example()] * 5)
    assert found.tobytes() == np.array(numbers).tobytes()


def test_the_cache_reads_of_an_example_what_the_reward_reads(tmp_path) -> None:
    same_text = [example(1, meta={"k": np.arange(2000)}), example(2, meta={"k": np.arange(2000)})]
    other = example(1, meta={"k": np.r_[np.arange(1999), 7]})
    counting = Counting()
    values = cached(reward(counting), tmp_path)(["a"] * 3, [*same_text, other])
    assert len(counting.asked) == 2 and len(values) == 3
    with_id = Counting()
    cached(reward(with_id), None, reads=everything)(["a"] * 3, [*same_text, other])
    assert len(with_id.asked) == 3


def test_killed_in_the_middle_keeps_what_was_computed(tmp_path) -> None:
    replies = ["x" * i for i in range(10)]
    examples = [example(i) for i in range(10)]
    killed = Counting(dies_at=7)
    with pytest.raises(KeyboardInterrupt):
        cached(reward(killed), tmp_path, part=3)(replies, examples)
    resumed = Counting()
    values = cached(reward(resumed), tmp_path, part=3)(replies, examples)
    assert resumed.asked == replies[6:]
    assert values.tolist() == reward(lengths)(replies, examples).tolist()


def test_a_refused_value_is_not_kept(tmp_path) -> None:
    with pytest.raises(FeedbackError, match="gave 7"):
        cached(reward(lambda replies, examples: [7.0] * len(replies)), tmp_path)(["a"], [example()])
    counting = Counting()
    cached(reward(counting), tmp_path)(["a"], [example()])
    assert counting.asked == ["a"]


def test_several_writers_share_one_cache(tmp_path) -> None:
    replies = [f"{i:03}" + "x" * (i % 7) for i in range(120)]
    found, failed = {}, []

    def work(number: int) -> None:
        try:
            part = replies[number::2] + replies[:40]
            found[number] = cached(reward(lengths), tmp_path, part=5)(part, [example()] * len(part)).tolist()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number in range(2):
        assert found[number] == [len(r) / 100 for r in replies[number::2] + replies[:40]]
    (file,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT count(*) FROM reward").fetchone() == (120,)


def test_a_damaged_cache_is_named(tmp_path) -> None:
    cached(reward(lengths), tmp_path)(["a"], [example()])
    (file,) = tmp_path.glob("*.sqlite")
    file.write_bytes(b"no database" * 1000)
    with pytest.raises(FeedbackError, match=rf"{file.name} cannot be used .* delete this file"):
        cached(reward(lengths), tmp_path)(["a"], [example()])


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 2)), max_size=30))
def test_a_cached_reward_is_the_reward(pairs) -> None:
    def function(replies, examples):
        return [len(r) / 10 + int(e.response) / 100 for r, e in zip(replies, examples, strict=True)]

    plain = reward(function)
    replies, examples = [r for r, _ in pairs], [example(i, response=str(k)) for i, (_, k) in enumerate(pairs)]
    assert cached(plain, None, part=4)(replies, examples).tolist() == plain(replies, examples).tolist()


def test_a_changed_function_is_asked_again(functions) -> None:
    before = python("overlap").identity
    assert python("overlap").identity == before
    functions.write_text(FUNCTIONS + "\nCHANGED = True\n")
    del sys.modules["my_rewards_of_test"]
    importlib.invalidate_caches()
    assert python("overlap").identity != before
