"""Where mixtures lie in the drawings of what was tried."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.report.drawing import scaled
from duet_jax.report.tried import parallel, ternary, ternary_points

NOTHING = np.zeros((0, 3))


def everywhere(side: int = 6) -> np.ndarray:
    return np.array([(i, j, side - i - j) for i in range(side + 1) for j in range(side + 1 - i)]) / side


def test_corners_and_centre_of_the_triangle() -> None:
    corners = ternary_points(np.eye(3))
    # The first domain is at the top, the second on the left, the third on the right; all sides are 1.
    np.testing.assert_allclose(corners, [[0.5, 0.75**0.5], [0, 0], [1, 0]])
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    np.testing.assert_allclose(sides, 1)
    np.testing.assert_allclose(ternary_points(np.full((1, 3), 1 / 3))[0], corners.mean(0))
    np.testing.assert_allclose(ternary_points(np.array([[0.5, 0.5, 0.0]]))[0], (corners[0] + corners[1]) / 2)


@given(st.lists(st.floats(0.001, 1), min_size=3, max_size=3))
def test_a_share_is_the_distance_from_the_side_that_faces_its_corner(parts: list[float]) -> None:
    mixture = np.array(parts) / sum(parts)
    corners, place = ternary_points(np.eye(3)), ternary_points(mixture[None])[0]
    for own in range(3):
        start, end = corners[(own + 1) % 3], corners[(own + 2) % 3]
        along, away = end - start, place - start
        distance = abs(along[0] * away[1] - along[1] * away[0])
        assert distance / 0.75**0.5 == pytest.approx(mixture[own], abs=1e-12)


def uses(text: str) -> np.ndarray:
    """Places of markers, in the drawing's points."""
    found = re.findall(r'<use [^>]*\bx="([-.\d]+)" y="([-.\d]+)"', text)
    return np.array(found, float)


def test_dots_are_drawn_where_mixtures_are() -> None:
    mixtures = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5], [0.6, 0.4, 0]])
    waiting = np.array([[1 / 3, 1 / 3, 1 / 3], [0.1, 0.1, 0.8]])
    values = np.array([1.0, 2, 3, 5, 4])
    text = ternary(mixtures, values, 3, ("a", "b", "c"), waiting, (everywhere(), everywhere()[:, 0]))
    drawn = uses(text)
    # Those that wait, all others from the lowest score to the highest, and the star of the best.
    order = [0, 1, 2, 4, 3]
    meant = ternary_points(np.concatenate([waiting, mixtures[order], mixtures[[3]]]))
    assert len(drawn) == len(meant)
    size = drawn[4, 0] - drawn[3, 0]
    np.testing.assert_allclose((drawn[:, 0] - drawn[3, 0]) / size, meant[:, 0], atol=1e-4)
    np.testing.assert_allclose((drawn[3, 1] - drawn[:, 1]) / size, meant[:, 1], atol=1e-4)
    assert 'aria-label="mixtures that were tried, in a triangle"' in text


@pytest.mark.parametrize("count", [1, 2])
def test_a_triangle_of_few_and_equal_scores(count: int) -> None:
    mixtures = np.eye(3)[:count]
    text = ternary(mixtures, np.ones(count), 0, ("a", "b", "c"), NOTHING, (everywhere(), np.ones(28)))
    assert len(uses(text)) == count + 1


def lines(text: str, count: int) -> list[np.ndarray]:
    """The broken lines of `count` points in a drawing, in its points."""
    open_ = [path for path in re.findall(r' d="(.*?)"', text, re.DOTALL) if "z" not in path]
    paths = [re.findall(r"[ML] ([-.\d]+) ([-.\d]+)", path) for path in open_]
    return [np.array(path, float) for path in paths if len(path) == count]


def test_a_mixture_is_a_line_across_the_rows_of_its_domains() -> None:
    mixtures = np.array([[0.1, 0.2, 0.3, 0.25, 0.15], [0.5, 0, 0.25, 0.25, 0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    waiting = np.array([[0, 0.05, 0.15, 0.3, 0.5]])
    text = parallel(mixtures, np.array([3.0, 1.0, 2.0]), 0, tuple("abcde"), waiting)
    drawn = lines(text, 5)
    # The one that waits, all from the lowest score to the highest, and the best one once more.
    meant = np.concatenate([waiting, mixtures[[1, 2, 0]], mixtures[[0]]])
    assert len(drawn) == len(meant)
    for line in drawn:
        np.testing.assert_allclose(np.diff(line[:, 1]), drawn[0][1, 1] - drawn[0][0, 1], atol=1e-4)
    across = np.stack([line[:, 0] for line in drawn])
    none, half = across[meant == 0].mean(), across[meant == 0.5].mean()
    np.testing.assert_allclose((across - none) / (half - none) / 2, meant, atol=1e-4)
    # The first domain is the uppermost.
    assert drawn[0][0, 1] < drawn[0][-1, 1]


def test_names_of_many_domains_and_hostile_ones_are_text() -> None:
    names = [f"domain {number}" for number in range(33)] + ["<b>&$x$"]
    text = parallel(np.full((1, 34), 1 / 34), np.ones(1), 0, names, np.zeros((0, 34)))
    assert "domain 32" in text and "&lt;b&gt;&amp;$x$" in text and "<b>" not in text


def test_colours_are_by_the_distance_from_the_lowest_score() -> None:
    np.testing.assert_allclose(scaled(np.array([-3.0, 1.0, -1.0])), [0, 1, 0.5])
    np.testing.assert_allclose(scaled(np.array([2.0, 2.0])), 1)
