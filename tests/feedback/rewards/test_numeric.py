"""Numbers are read as a person would, from every way in which models write their answers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import RewardConfig
from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import build_reward
from duet_jax.feedback.rewards.numeric import number

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def example(response: str = "", *answers: str) -> Example:
    return Example(id="e3", prompt="p", response=response, answers=answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("So he has 3 + 4 = 7 apples.", "7"),
        ("He pays $1,234,567.50 in all.", "1234567.5"),
        ("reasoning 5 * 3 = 15\n#### 15\nQuestion: 7", "15"),
        ("#### $1,200", "1200"),
        ("#### -3", "-3"),
        ("#### Step 1: add\n#### Step 2: so 2 + 9 = 11", "11"),
        ("The answer is 12. I needed 3 steps.", "12"),
        ("The answer is 12? No, the answer is **13**.", "13"),
        ("the answer is that of step 2:\n8", "2"),
        (r"Thus $x = \boxed{5}$, as in step 3.", "5"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
        (r"1\frac{3}{4}", "7/4"),
        ("1 3/4 cups", "7/4"),
        ("1 and 3/4 cups", "7/4"),
        ("3/4", "3/4"),
        ("3 / 4", "3/4"),
        ("the ratio 0.5/2", "1/4"),
        ("-.5", "-1/2"),
        ("about 1.5e3 metres", "1500"),
        ("2.5E-2", "1/40"),
        ("50%", "50"),
        ("12 km/h", "12"),
        ("an area of 9 m^2", "9"),
        (r"9 \text{ m}^{2}", "9"),
        ("H2O and x_1 are 6", "6"),
        ("10-5", "5"),
        ("x=-5", "-5"),
        ("it is \N{MINUS SIGN}7 degrees", "-7"),
        ("(3)-2", "2"),
        ("1,2345", "2345"),
        ("[1, 2, 30]", "30"),
        ("10{,}000", "10000"),
        (r"\$5\,000", "5000"),
        ("version 1.2.3", "1.2"),
        ("at last...42", "42"),
        ("00042", "42"),
    ],
)
def test_numbers_are_found(text: str, expected: str) -> None:
    assert number(text) == Fraction(expected)


@pytest.mark.parametrize("text", ["", "none", "#### none", "x2", "forty-two", "5/0", "9" * 400, "^2", "...", "$"])
def test_no_number(text: str) -> None:
    assert number(text) is None


@given(st.fractions(), st.sampled_from(["{}", "It is {} km.", "#### {}", r"\boxed{{{}}} 7", "the answer is {}! 1"]))
def test_fractions_survive_being_written(value: Fraction, template: str) -> None:
    assert number(template.format(value)) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15, places=3))
def test_decimals_survive_commas(value) -> None:
    assert number(f"That makes {value:,} in all") == Fraction(value)


@given(st.text(alphabet="0123456789.,-/ eE^{}\\#$ xfrac"))
def test_any_text_is_read_or_not(text: str) -> None:
    assert number(text) is None or isinstance(number(text), Fraction)


def test_long_texts_take_no_long_time() -> None:
    for hostile in ("9" * 200_000, "1 " * 100_000, "1" + " " * 200_000, "1," * 100_000, "1e999999999", "####" * 50_000):
        number(hostile)


def test_the_reward() -> None:
    reward = build_reward(RewardConfig(kind="numeric"))
    assert reward(["18", "#### 18.0", "17.99", "?"], [example("so #### 18")] * 4).tolist() == [1, 1, 0, 0]
    assert reward(["1/3", "0.333"], [example("", "1/3")] * 2).tolist() == [1, 0]
    close = build_reward(RewardConfig(kind="numeric", tolerance=0.01))
    assert close(["0.333", "0.34", "-0.333"], [example("", "1/3")] * 3).tolist() == [1, 0, 0]
    assert reward(["7"], [example("x", "2 pears", "7 pears")]).tolist() == [1]


@pytest.mark.parametrize("of", [example("no number"), example("7", "3x + 4"), example("7", "2, 3"), example("7", "?")])
def test_a_reference_must_be_a_number(of: Example) -> None:
    with pytest.raises(FeedbackError, match="Example e3 has the right answer .*exactly one number"):
        build_reward(RewardConfig(kind="numeric")).check([of])


@pytest.mark.parametrize("domain", ["gsm8k", "math"])
def test_worked_solutions_earn_the_reward(domain: str) -> None:
    file = DATA / domain / "eval.jsonl"
    if not file.is_file():
        pytest.skip("needs ../shared/data")
    reward, replies, examples = build_reward(RewardConfig(kind="numeric")), [], []
    for row in map(json.loads, file.read_text().splitlines()):
        one = Example(row["id"], row["prompt"], row["response"], answers=(row["meta"]["answer"],))
        try:
            reward.check([one])
        except FeedbackError:
            continue
        replies.append(row["response"])
        examples.append(one)
    assert len(replies) > 350
    assert reward(replies, examples).tolist() == [1.0] * len(replies)
    moved = examples[1:] + examples[:1]
    assert reward(replies, moved).mean() < 0.1
