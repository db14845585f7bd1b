"""What becomes of examples: thresholds (C5), the state machine (C6, C7), positions (C10) and planted noise (C9)."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.config import ClearConfig, ConfidenceConfig
from duet_jax.curation.correction import OPTIONS as BETTER
from duet_jax.curation.correction import Verdicts, correctable, decide, judge, prefers
from duet_jax.curation.decisions import Action, Filter, actions, auto_correct, auto_filter
from duet_jax.data import Example
from tests.curation.respondents import PREFERENCE, QUESTIONS, ByHeart

CONFIG = ConfidenceConfig(samples=0, **QUESTIONS)


def kept(*confidence: float, **options: Any) -> int:
    return int(auto_filter(np.array(confidence), [(i, "y") for i in range(len(confidence))], **options).kept.sum())


def test_c5_the_median_is_exceeded() -> None:
    assert kept(0.1, 0.2, 0.3, 0.4) == 2
    assert kept(0.1, 0.2, 0.3) == 1
    assert kept(0.5, 0.5, 0.5, 0.9) == 1
    found = auto_filter(np.full(3, 0.3), [(i, "y") for i in range(3)])
    assert found.kept.all() and found.level == ("all",)
    # Where ">=" would keep more: the threshold is absolute, and what lies at it is dropped.
    assert kept(0.1, 0.2, 0.3, threshold=0.2) == 1 and kept(0.1, 0.2, 0.3, threshold=0.19) == 2
    assert kept(0.5, 0.5, threshold=0.5) == 0


def test_domains_have_their_own_quantile() -> None:
    confidence = np.array([0.1, 0.2, 0.8, 0.9, 0.5, 0.5])
    pairs = [(i, "y") for i in range(6)]
    assert auto_filter(confidence, pairs).kept.tolist() == [False, False, True, True, False, False]
    found = auto_filter(confidence, pairs, groups=["a", "a", "b", "b", "c", "c"])
    assert found.kept.tolist() == [False, True, False, True, True, True]
    np.testing.assert_allclose(found.thresholds, [0.15, 0.15, 0.85, 0.85, 0.5, 0.5])
    assert found.level == ("c",)


def test_of_conflicting_targets_the_most_confident_stays() -> None:
    pairs = [("x", "1"), ("x", "2"), ("x", "2"), ("y", "1"), ("z", "1")]
    found = auto_filter(np.array([0.6, 0.7, 0.4, 0.5, 0.1]), pairs, threshold=0.3)
    assert found.kept.tolist() == [False, True, True, True, False]
    assert found.beaten.tolist() == [True, False, False, False, False]
    # A target at or below its own threshold takes nobody's place.
    found = auto_filter(
        np.array([0.6, 0.9, 0.5, 0.1]), [("x", "1"), ("y", "1"), ("x", "2"), ("z", "1")], groups=[*"aabb"]
    )
    np.testing.assert_allclose(found.thresholds, [0.75, 0.75, 0.3, 0.3])
    assert found.kept.tolist() == [False, True, True, False] and not found.beaten.any()
    # The first of equals.
    assert auto_filter(np.full(2, 0.5), [("x", "1"), ("x", "2")], threshold=0.3).kept.tolist() == [True, False]


def test_what_has_no_confidence_is_not_kept() -> None:
    found = auto_filter(np.array([np.nan, 0.5, 0.7, np.nan]), [("x", "1"), ("x", "2"), ("y", "1"), ("z", "1")])
    assert found.kept.tolist() == [False, False, True, False] and found.thresholds[1] == 0.6
    groups = ["a", "b", "b", "a"]
    found = auto_filter(np.array([np.nan, 0.5, 0.7, np.nan]), [(i, "1") for i in range(4)], groups=groups)
    assert found.kept.tolist() == [False, False, True, False] and found.level == ()
    # A number beats none, wherever it stands.
    pairs = [("x", "1"), ("x", "2"), ("x", "3")]
    assert auto_filter(np.array([np.nan, 0.5, np.nan]), pairs, threshold=0.1).kept.tolist() == [False, True, False]


def test_c6_the_state_machine() -> None:
    for keep, better, sure in itertools.product([False, True], [False, True], [0.7, 0.8, 0.9]):
        accepted = auto_correct(np.array([better]), np.array([sure]), 0.8)
        expected = Action.CORRECT if better and sure == 0.9 else Action.KEEP if keep else Action.DROP
        assert actions(np.array([keep]), accepted) == [expected]
    assert not auto_correct(np.array([True]), np.array([np.nan]), 0.8)[0]


def test_decisions_hold_every_number() -> None:
    examples = [Example(f"e{i}", f"x{i}", "y") for i in range(3)]
    filtered = auto_filter(np.array([0.1, 0.6, 0.7]), [(e.prompt, e.response) for e in examples])
    letters = np.zeros((3, 3))
    verdicts = Verdicts(letters, letters, np.array([True, True, False]), np.array([0.9, 0.8, np.nan]))
    found = decide(examples, [0.1, 0.6, 0.7], filtered, proposals=["a", "b", "y"], verdicts=verdicts)  # type: ignore[arg-type]
    assert [one.action for one in found] == ["correct", "drop", "keep"]
    assert found[0][:5] == ("e0", Action.CORRECT, 0.1, 0.6, False)
    assert found[0][5:] == ("a", True, 0.9, 0.8) and np.isnan(found[2].acceptance)
    alone = decide(examples, np.array([0.1, 0.6, 0.7]), filtered)
    assert [one.action for one in alone] == ["drop", "drop", "keep"] and alone[0].proposal is None


Numbers = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=12)


@given(Numbers, st.tuples(st.floats(0, 1), st.floats(0, 1)), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_c7_thresholds_are_monotone(rows: list, gammas: tuple, etas: tuple) -> None:
    confidence, sure, better = map(np.array, zip(*rows, strict=True))
    pairs = [(i % 5, str(i % 3)) for i in range(len(rows))]
    low, high = (auto_correct(better, sure, eta) for eta in sorted(etas))
    assert not (high & ~low).any()
    for name in ("threshold", "quantile"):
        less, more = (auto_filter(confidence, pairs, **{name: gamma}).kept for gamma in sorted(gammas))
        assert not (more & ~less).any()


@dataclasses.dataclass
class Judge(ByHeart):
    """Is not quite sure, and writes nothing."""

    sure: float = 0.95
    sure_better: float = 0.9

    def answers(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is to be written")


def test_c10_both_positions_must_agree(tmp_path: Path) -> None:
    examples = [Example(f"e{i}", f"x{i}", "old") for i in range(40)]
    found = judge(
        Judge({}, option=BETTER[0]),
        examples,
        ["new"] * 40,
        CONFIG,
        tmp_path,
        acceptance="probability",
        template=PREFERENCE,
    )
    assert not found.better.any()
    assert not auto_correct(found.better, found.acceptance, 0.0).any()
    # Without the guard: all where the proposal always comes first, half where its place is drawn.
    first, second = prefers(found.first), prefers(found.second)
    assert first.all() and not second.any()
    drawn = np.arange(40) % 2 == 0
    assert np.where(drawn, first, second).mean() == 0.5
    # A liking for a letter is for no answer, whatever it is for.
    for letter in "ABC":
        found = judge(
            Judge({}, letter=letter),
            examples,
            ["new"] * 40,
            CONFIG,
            tmp_path / letter,
            acceptance="probability",
            template=PREFERENCE,
        )
        np.testing.assert_allclose([found.first, found.second], 1 / 3)


@pytest.mark.parametrize("acceptance", ["probability", "confidence"])
def test_a_judge_that_knows_accepts_what_is_right(tmp_path: Path, acceptance: Any) -> None:
    examples = [Example(f"e{i}", f"x{i}", target) for i, target in enumerate(["old", "new", "old", "old", "old"])]
    proposals = ["new", "old", "The old.", " ", "odd"]
    critic = Judge({f"x{i}": "new" for i in range(5)})
    found = judge(critic, examples, proposals, CONFIG, tmp_path, acceptance=acceptance, template=PREFERENCE)
    assert found.better.tolist() == [True, False, False, False, False]
    # Nothing is asked about proposals that are empty or the target itself.
    assert np.isnan(found.first[[2, 3]]).all() and not any("x2" in text or "x3" in text for text in critic.asked)
    np.testing.assert_allclose(found.first[[0, 1]], [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]])
    np.testing.assert_allclose(found.first, found.second)
    if acceptance == "probability":
        assert found.acceptance[0] == pytest.approx(0.9)
    else:
        # Reflection alone, as there are no samples: .95 correct and half of .025 not sure.
        assert found.acceptance[0] == pytest.approx(0.95 + 0.5 * 0.025) and np.isnan(found.acceptance[1:]).all()
    asked = len(critic.asked)
    judge(critic, examples, proposals, CONFIG, tmp_path, acceptance=acceptance, template=PREFERENCE)
    assert len(critic.asked) == asked


def test_what_is_too_long_for_the_judge_is_not_corrected(tmp_path: Path) -> None:
    examples = [Example("short", "x0", "old"), Example("long", "y" * 90, "old"), Example("longer", "z" * 300, "old")]
    right: dict[Any, str] = {example.prompt: "new" for example in examples}
    # The questions about the verdict on the second one are too long, and the question for the judge of the third.
    critic = Judge(right, longest=220)
    arguments: Any = {"template": PREFERENCE}
    found = judge(critic, examples, ["new", "new", "n" * 40], CONFIG, tmp_path, **arguments)
    assert found.better.tolist() == [True, True, False] and np.isnan(found.first).any(axis=1).tolist() == [0, 0, 1]
    assert np.isnan(found.acceptance).tolist() == [False, True, True]
    alone = judge(critic, examples[1:2], ["new"], CONFIG, tmp_path, **arguments)
    assert alone.better.all() and np.isnan(alone.acceptance).all()
    # That is known beforehand, with as much room as a proposal may need.
    config = ClearConfig(confidence=CONFIG, preference_template=PREFERENCE, max_new_tokens=30)
    assert correctable(critic, examples, config).tolist() == [True, False, False]
    judged = dataclasses.replace(config, acceptance="probability")
    assert correctable(critic, examples, judged).tolist() == [True, True, False]


def test_c9_planted_noise_end_to_end(tmp_path: Path) -> None:
    """A fifth is wrong; a confidence that mistakes one in ten, and a proposer that is right nine times in ten."""
    count, rng = 500, np.random.default_rng(0)
    noisy = np.arange(count) % 5 == 0
    right = {f"x{i}": f"w{i}" for i in range(count)}
    examples = [Example(f"e{i}", f"x{i}", "wrong" if noisy[i] else f"w{i}") for i in range(count)]
    mistaken = rng.random(count) < 0.1
    confidence = np.where(noisy == mistaken, 0.9, 0.1)
    filtered: Filter = auto_filter(confidence, [(e.prompt, e.response) for e in examples], threshold=0.5)
    rate = noisy[filtered.kept].mean()
    missed, share = mistaken[noisy].mean(), (noisy == mistaken).mean()
    assert rate == pytest.approx(0.2 * missed / share) and rate < 0.05 < noisy.mean()
    proposals = [f"w{i}" if rng.random() < 0.9 else "odd" for i in range(count)]
    verdicts = judge(
        Judge(right),
        examples,
        proposals,
        CONFIG,
        tmp_path,
        acceptance="probability",
        template=PREFERENCE,
    )
    decisions = decide(examples, confidence, filtered, proposals=proposals, verdicts=verdicts)
    corrected = np.array([one.action == Action.CORRECT for one in decisions])
    dropped = np.array([one.action == Action.DROP for one in decisions])
    # Precision and recall of corrections, against the clean targets, and of what is dropped.
    assert all(proposals[i] == f"w{i}" for i in np.flatnonzero(corrected)) and not (corrected & ~noisy).any()
    proposed = np.array([proposal != "odd" for proposal in proposals])
    assert corrected[noisy].mean() == pytest.approx(proposed[noisy].mean())
    assert dropped[noisy].mean() == pytest.approx((~filtered.kept & ~proposed)[noisy].mean())
    targets = [
        one.proposal if one.action == Action.CORRECT else e.response for one, e in zip(decisions, examples, strict=True)
    ]
    stays = ~dropped
    still_wrong = np.mean([targets[i] != f"w{i}" for i in np.flatnonzero(stays)])
    assert still_wrong < rate and stays.sum() > filtered.kept.sum()
