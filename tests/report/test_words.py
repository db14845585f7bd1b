"""Numbers in words, and what they add up to."""

from __future__ import annotations

import numpy as np
import pytest

from duet_jax.report import words
from duet_jax.report.costs import cost, spans
from duet_jax.trial import Trial

NBSP = "\N{NO-BREAK SPACE}"


def test_a_number_has_the_digits_that_its_error_leaves() -> None:
    assert words.to(-1.15843, 0.0241) == "-1.158" and words.to(1234.5, 30.0) == "1234"
    assert words.interval(0.0, 1.0) == "-2.0 to 2.0" and words.interval(10.0, 0.051) == "9.900 to 10.100"
    assert words.to(0.5, 0.0) == "0.5000"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"),
        (1.234, "1.23 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61.7, "1 min 2 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_a_time_is_said_in_two_units(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_the_verdict_is_that_of_the_interval() -> None:
    assert words.verdict((0.0, 0.0)).startswith("Equal shares of all domains are the best")
    assert words.verdict((1.97, 1.0)).startswith("It is better than equal shares")
    assert f"has a chance of 97{NBSP}%" in words.verdict((1.95, 1.0))
    assert f"has a chance of 50{NBSP}%" in words.verdict((0.0, 1.0))
    assert words.verdict((-3.0, 1.0)).startswith("It is not shown to be better")


def test_a_direction_is_read_from_an_effect() -> None:
    shares = np.linspace(0, 1, 21)
    sure, unsure = np.full(21, 0.01), np.full(21, 1.0)
    assert words.direction(shares, shares, sure) == "more is better"
    assert words.direction(shares, -shares, sure) == "less is better"
    assert words.direction(shares, -((shares - 0.4) ** 2), sure) == f"best near 40{NBSP}%"
    assert words.direction(shares, shares, unsure) == "no clear effect"
    # A little is not less and less.
    assert words.direction(shares, -((shares - 0.05) ** 2), sure) == f"best near 5{NBSP}%"
    # Of a domain that may have a fifth to two fifths, more is up to what is allowed.
    assert words.direction(0.2 + shares / 5, shares, sure) == "more is better"
    assert words.direction(np.full(21, 0.3), np.ones(21), sure) == "no clear effect"


def trial(number: int, **fields: object) -> Trial:
    return Trial(number, "pending", "proposed", {"a": 1.0}, {"a": 8}, **fields)


def test_the_cost_is_the_sum_of_all_trainings() -> None:
    day = "2026-01-0{}T00:00:{}.000+00:00"
    trials = [
        trial(
            0,
            training={"seconds": 10.0, "tokens": 100},
            times={"proposed": day.format(1, "00"), "trained": day.format(1, "20"), "told": day.format(1, "50")},
        ),
        trial(1, training={"seconds": 5.0, "tokens": 50}, times={"failed": day.format(2, "00")}),
        trial(2),
    ]
    assert spans(trials[0]) == {"training": 20.0, "scoring": 30.0} and spans(trials[1]) == {}
    metrics = [{"trial": 0, "step": 1, "devices": 1}, {"trial": 0, "step": 2, "devices": 4}]
    found = cost(trials, metrics)
    assert (found.trainings, found.tokens, found.seconds, found.elapsed) == (2, 150, 15.0, 86400.0)
    # How many devices trained the second one, nobody knows.
    assert found.device_seconds is None and found.devices == 4 and found.waiting == 30.0
    whole = cost(trials, [*metrics, {"trial": 1, "step": 1, "devices": 2}])
    assert whole.device_seconds == 10.0 * 4 + 5.0 * 2
    nothing = cost([], [])
    assert (nothing.trainings, nothing.device_seconds, nothing.devices, nothing.elapsed) == (0, 0.0, None, 0.0)


def test_every_kind_of_selector_and_task_has_words() -> None:
    from typing import get_args, get_type_hints

    from duet_jax import config
    from duet_jax._selector_config import SelectorConfig

    hints = get_type_hints(SelectorConfig)
    assert set(get_args(hints["kind"])) == set(words.UTILITIES)
    assert set(get_args(hints["rule"])) == set(words.RULES)
    kinds = set(get_args(get_type_hints(config.TaskConfig)["kind"]))
    assert kinds == set(words._SCORES) | {"people"}
    assert words.score(config.TaskConfig(kind="people")).endswith("from 1 to 5 stars")
