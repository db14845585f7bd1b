"""Decisions of CLEAR by a respondent that knows: corrections, the state machine (C6), positions (C10), iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duet_jax.curation import audit
from duet_jax.curation.correction import OPTIONS as BETTER
from duet_jax.curation.decisions import Action
from duet_jax.data import Example
from duet_jax.errors import DataError
from tests.curation.respondents import ByHeart
from tests.curation.settling import NOISY, RIGHT, settled


def test_planted_noise_is_corrected_where_the_proposal_is_right(tmp_path: Path) -> None:
    proposals = ["odd" if i == 5 else "" if i == 10 else f"w{i}" for i in range(20)]
    oracle = ByHeart(RIGHT)
    found, trained = settled(tmp_path, oracle, [proposals])
    expected = ["drop" if i in (5, 10) else "correct" if i % 5 == 0 else "keep" for i in range(20)]
    assert [decision.action for decision in found.decisions] == expected
    assert trained == [[example for example in NOISY if example.response != "odd"]]
    assert [found.decisions[0].proposal, found.decisions[0].acceptance] == ["w0", 1.0]
    # Only what differs and is not empty is judged, in both positions and three orders of options: here of x0 and x15.
    assert sorted(oracle.judged) == [
        text for text in ("x0#odd#w0", "x0#w0#odd", "x15#odd#w15", "x15#w15#odd") for _ in range(3)
    ]
    rows = audit.rows(NOISY, ["a"] * 20, found)
    assert rows[0]["first_proposal"] == rows[0]["second_proposal"] == 1.0 and rows[1]["first_proposal"] is None
    assert [rows[i]["response"] for i in (0, 1, 5)] == ["w0", "w1", None]


def test_c6_the_whole_state_machine(tmp_path: Path) -> None:
    """Every combination of a target above the threshold, a proposal that is better, and a verdict that is sure."""
    right = {"x0": "y", "x1": "y", "x2": "y", "x3": "y"}
    examples = [Example("a", "x0", "y"), Example("b", "x1", "n"), Example("c", "x2", "y"), Example("d", "x3", "n")]
    proposals = [["z", "y", "y", "z"]]
    # The acceptance is the probability of the verdict, and must be greater than eta, not equal to it.
    changes: dict[str, Any] = {"acceptance": "probability", "samples": 0}
    below, _ = settled(tmp_path, ByHeart(right, sure=0.9, sure_better=0.9), proposals, examples, eta=0.89, **changes)
    assert [decision.action for decision in below.decisions] == ["keep", "correct", "keep", "drop"]
    sure = below.decisions[1].acceptance
    assert sure == pytest.approx(0.9)
    at, _ = settled(tmp_path, ByHeart(right, sure=0.9, sure_better=0.9), proposals, examples, eta=sure, **changes)
    assert [decision.action for decision in at.decisions] == ["keep", "drop", "keep", "drop"]
    assert at.decisions[1].better and at.decisions[1].acceptance == sure
    # A target above the threshold is corrected just as well.
    low, _ = settled(
        tmp_path, ByHeart(right, sure=0.9, sure_better=0.9), proposals, examples, eta=0.89, threshold=0.01, **changes
    )
    assert [decision.action for decision in low.decisions] == ["keep", "correct", "keep", "keep"]


def test_c10_a_judge_of_one_letter_corrects_nothing(tmp_path: Path) -> None:
    for letter in "ABC":
        oracle = ByHeart(RIGHT, letter=letter)
        found, _ = settled(tmp_path / letter, oracle, [["new"] * 20], eta=0.0, acceptance="probability")
        assert len(oracle.judged) == 3 * 40 and not any(decision.better for decision in found.decisions)
        assert {decision.action for decision in found.decisions} == {Action.KEEP, Action.DROP}


def test_a_second_iteration_begins_with_what_the_first_left(tmp_path: Path) -> None:
    first = ["bad" if i in (5, 10) else f"w{i}" for i in range(20)]
    second = ["bad" if i in (0, 5) else f"w{i}" for i in range(20)]
    found, trained = settled(tmp_path, ByHeart(RIGHT), [first, second], iterations=2)
    assert [(e.id, e.response) for e in trained[1]] == [(f"e{i}", f"w{i}") for i in range(20) if i not in (5, 10)]
    assert [found.decisions[i].action for i in (0, 1, 5, 10, 15)] == ["correct", "keep", "drop", "correct", "correct"]
    # What the first iteration corrected stays, though nothing better was found in the second.
    assert [int(found.deciding[i]) for i in (0, 1, 5, 10, 15)] == [0, 1, 1, 1, 0]
    row = audit.rows(NOISY, ["a"] * 20, found)[0]
    assert row["proposal"] == "w0" and [one["proposal"] for one in row["rounds"]] == ["w0", "bad"]


def test_a_prompt_has_one_target_in_the_end(tmp_path: Path) -> None:
    examples = [Example("a", "x0", "w0"), Example("b", "x0", "odd"), Example("c", "x0", "w0"), Example("d", "x1", "n")]
    # Another answer than the kept one is right of b alone: the judge is asked about "odd" and "w0" apart.
    oracle = ByHeart({"x0": "w0", "x1": "w1"})
    found, _ = settled(tmp_path, oracle, [["w0", "w0", "w0", "w1"]], examples)
    assert [decision.action for decision in found.decisions] == ["keep", "correct", "keep", "correct"]

    class Fond(ByHeart):
        def better(self, asked: str) -> str:
            _, first, second = asked.split("#")
            return BETTER[2] if "w0" in (first, second) else BETTER[0] if first == "new" else BETTER[1]

    fond = Fond({"x0": "w0", "x1": "w1"})
    found, _ = settled(tmp_path / "fond", fond, [["new"] * 4], examples)
    # "new" is better than "odd", but not than "w0", which stays.
    assert [decision.action for decision in found.decisions] == ["keep", "drop", "keep", "correct"]
    assert found.decisions[1].beaten and found.decisions[1].better


def test_equal_confidences_and_no_samples(tmp_path: Path) -> None:
    clean = [Example(f"e{i}", f"x{i}", f"w{i}") for i in range(4)]
    found, _ = settled(tmp_path, ByHeart(RIGHT), [], clean, samples=0, correct=False, threshold=None)
    assert found.level == ("a",) and {decision.action for decision in found.decisions} == {Action.KEEP}
    assert not found.rounds and audit.rows(clean, ["a"] * 4, found)[0]["eta"] is None
    wrong = [Example(f"e{i}", f"x{i}", "odd") for i in range(4)]
    with pytest.raises(DataError, match=r"No target has a confidence above its threshold \(0.5\)"):
        settled(tmp_path, ByHeart(RIGHT), [], wrong)
