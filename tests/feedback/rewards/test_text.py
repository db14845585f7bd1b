"""Rewards of text alone, against the package rouge-score, the textbook's table and closed forms."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import RewardConfig
from duet_jax.data import Example
from duet_jax.feedback.rewards import build_reward
from duet_jax.feedback.rewards.text import best_rouge_l, common_subsequence

# rouge-score 0.1.2: RougeScorer(["rougeL"], use_stemmer=False).score(accepted, reply)["rougeL"].fmeasure
ROUGE_SCORE = [
    ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334),
    ("The quick brown fox", "quick fox, the brown!", 0.5),
    ("", "something", 0),
    ("something", "", 0),
    ("?!", "?!", 0),
    ("a b c d e f g", "g f e d c b a", 0.14285714285714285),
    ("It's 3.5 km, isn't it?", "it s 3 5 km", 0.7692307692307693),
    ("naïve café au lait", "naive cafe au lait", 0.4444444444444445),
    ("police killed the gunman", "police kill the gunman", 0.75),
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("x1 y2\nz3\tx1", "x1 z3 x1 y2 x1", 0.6666666666666665),
    ("running runs ran", "run running", 0.4),
    ("one", "one one one", 0.5),
    ("don_t stop", "don t stop now", 0.8571428571428571),
]


def example(response: str, *answers: str) -> Example:
    return Example(id="e", prompt="p", response=response, answers=answers)


def value(config: RewardConfig, reply: str, of: Example) -> float:
    return build_reward(config)([reply], [of])[0]


@pytest.mark.parametrize(("reply", "accepted", "expected"), ROUGE_SCORE)
def test_rouge_l_is_that_of_rouge_score(reply: str, accepted: str, expected: float) -> None:
    assert best_rouge_l(reply, [accepted]) == pytest.approx(expected, abs=1e-12)


def test_the_best_of_several_references_counts() -> None:
    # rouge-score 0.1.2, score_multi
    assert best_rouge_l("the cat here", ["run run", "the cat is here", "cat"]) == pytest.approx(0.8571428571428571)


@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    row = [0] * (len(other) + 1)
    for left in one:
        before, row = row, [0]
        for j, right in enumerate(other):
            row.append(before[j] + 1 if left == right else max(before[j + 1], row[j]))
    assert common_subsequence(one, other) == row[-1]


def test_answers_come_before_the_response() -> None:
    config = RewardConfig(kind="exact_match")
    assert value(config, "The cat!", example("a long explanation", "dog", "cat")) == 1
    assert value(config, "a long explanation", example("a long explanation", "dog", "cat")) == 0
    assert value(config, "long explanation.", example("A long explanation")) == 1
    assert value(RewardConfig(kind="token_f1"), "red green blue", example("red blue white black")) == 4 / 7
    assert value(RewardConfig(kind="rouge_l"), "a b", example("zzz", "a b", "c")) == 1


@pytest.mark.parametrize(
    ("pattern", "where", "reply", "expected"),
    [
        (r"[A-D]", "whole", "  B\n", 1),
        (r"[A-D]", "whole", "B.", 0),
        (r"[A-D]", "anywhere", "well, B.", 1),
        (r"[A-D]", "anywhere", "well", 0),
        (r"(?s)<think>.*</think>.+", "whole", "<think>a\nb</think> 4", 1),
        (r"<think>.*</think>.+", "whole", "<think>a\nb</think> 4", 0),
        (r"a|ab", "whole", "ab", 1),
    ],
)
def test_patterns(pattern, where, reply, expected) -> None:
    config = RewardConfig(kind="regex", pattern=pattern, where=where)
    assert value(config, reply, example("")) == expected
    assert not build_reward(config).needs_label


@pytest.mark.parametrize(
    ("fields", "reply", "expected"),
    [
        ({"minimum": 2, "maximum": 4}, "one", 1 / 2),
        ({"minimum": 2, "maximum": 4}, "one two", 1),
        ({"minimum": 2, "maximum": 4}, " one  two\nthree four ", 1),
        ({"minimum": 2, "maximum": 4}, "1 2 3 4 5 6 7 8", 1 / 2),
        ({"minimum": 2, "maximum": 4}, "", 0),
        ({"maximum": 3, "unit": "characters"}, "été", 1),
        ({"maximum": 3, "unit": "characters"}, "été étée", 3 / 8),
        ({"minimum": 10, "unit": "characters"}, "x" * 999, 1),
    ],
)
def test_lengths(fields, reply, expected) -> None:
    assert value(RewardConfig(kind="length", **fields), reply, example("")) == pytest.approx(expected)


@given(st.text(max_size=40), st.text(max_size=40))
def test_all_of_them_are_in_range_and_full_for_the_reference(reply: str, accepted: str) -> None:
    for kind in ("exact_match", "token_f1", "rouge_l"):
        reward = build_reward(RewardConfig(kind=kind))
        assert 0 <= reward([reply], [example("x", accepted)])[0] <= 1
        if kind != "rouge_l" or re.search("[a-z0-9]", accepted.lower()):
            assert reward([accepted], [example("x", accepted)])[0] == 1
