"""Choices are read from letters and from words, and from neither where both are unclear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duet_jax.config import RewardConfig
from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import build_reward
from duet_jax.feedback.rewards.choice import chosen

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
CITIES = ("York", "New York", "Paris", "a dog")
A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("(B)", B),
        ("B", B),
        ("b", B),
        ("B.", B),
        ("B) because of that", B),
        ("  **C**\n", C),
        ("(d) it is", D),
        ("The answer is B", B),
        ("The answer is: (b).", B),
        ("The answer is b.", B),
        ("The correct answer is B because A is wrong.", B),
        ("Answer: C", C),
        ("**Answer:** C", C),
        ("I chose (A) first, but the answer is (C).", C),
        ("The answer is A. No: the answer is D.", D),
        ("the answer is option C", C),
        (r"So the answer is $\boxed{C}$.", C),
        (r"Hence \boxed{C}", C),
        ("Paris", C),
        ("I think it must be Paris.", C),
        ("It is New York", B),
        ("New York, not York", B),
        ("York", A),
        ("The answer is Paris, not New York.", None),
        ("New York or Paris?", None),
        ("We rule out (A) and (B), so it is (C)", C),
        ("A dog barks", D),
        ("The answer is a dog", D),
        ("The answer is E", None),
        ("(Z)", None),
        ("", None),
        ("Parisian", None),
        ("none of them", None),
    ],
)
def test_what_is_chosen(reply: str, expected: int | None) -> None:
    assert chosen(reply, CITIES) == expected


def test_numbers_as_choices_are_whole_words() -> None:
    assert chosen("There are 12 of them.", ("1", "2", "12")) == 2
    assert chosen("There are 12 or 2 of them.", ("1", "2", "12")) is None


def example(**fields) -> Example:
    return Example(id="e5", prompt="p", response="York", **fields)


def test_the_reward() -> None:
    reward = build_reward(RewardConfig(kind="multiple_choice"))
    question = example(choices=CITIES, answer_index=1)
    assert reward(["B", "(A)", "New York", "no idea"], [question] * 4).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("fields", [{}, {"choices": ("x",), "answer_index": 0}, {"choices": CITIES}])
def test_a_question_needs_choices(fields) -> None:
    with pytest.raises(FeedbackError, match="Example e5 is no multiple-choice question"):
        build_reward(RewardConfig(kind="multiple_choice")).check([example(**fields)])


@pytest.mark.parametrize("domain", ["arc", "aqua_cot", "commonsense_qa", "openbookqa", "boolq", "piqa"])
def test_responses_of_real_questions_earn_the_reward(domain: str) -> None:
    file = DATA / domain / "eval.jsonl"
    if not file.is_file():
        pytest.skip("needs ../shared/data")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row.get("choices")]
    assert len(rows) > 200
    for row in rows:
        assert chosen(row["response"], row["choices"]) == row["answer_index"], row["id"]
        for i, _ in enumerate(row["choices"]):
            assert chosen(f"The answer is ({'ABCDEFGH'[i]}).", row["choices"]) == i
