"""A liking for a letter cancels where every option stands once at each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.curation.choices import LETTERS, ask, lines, orders, probabilities
from duet_jax.data import Example

SHARES = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


def test_every_option_stands_once_at_each_letter() -> None:
    assert orders(2) == ((0, 1), (1, 0)) and orders(3) == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert [lines(("Yes", "No"), order) for order in orders(2)] == ["A: Yes\nB: No", "A: No\nB: Yes"]


def test_closed_form() -> None:
    # Of A and B alone: .8 and .2, then .5 and .5. The first option stands at A, then at B.
    letters = np.array([[0.4, 0.1, 0.5], [0.3, 0.3, 0.4]])
    np.testing.assert_allclose(probabilities(letters), [(0.8 + 0.5) / 2, (0.2 + 0.5) / 2])


@pytest.mark.parametrize("count", [2, 3])
@given(liking=SHARES, worth=SHARES, share=st.floats(0, 1))
def test_a_liking_for_a_letter_cancels(count: int, liking: list[float], worth: list[float], share: float) -> None:
    """A model that mixes a liking for letters with what it thinks of the options."""
    fond = np.array(liking[:count]) / sum(liking[:count])
    thought = np.array(worth[:count]) / sum(worth[:count])
    letters = np.zeros((count, 3))
    for row, order in zip(letters, orders(count), strict=True):
        row[:count] = share * fond + (1 - share) * thought[list(order)]
    np.testing.assert_allclose(probabilities(letters), share / count + (1 - share) * thought, atol=1e-12)


def test_questions_that_do_not_fit_have_no_numbers() -> None:
    class Sayer:
        longest = 5

        def sizes(self, examples: Sequence[Example]) -> list[int]:
            return [len(str(example.prompt)) for example in examples]

        def read(
            self, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str], *scored: Sequence
        ) -> tuple[np.ndarray, np.ndarray]:
            assert not any(scored)
            assert [str(one.prompt) for one in questions] in (["ab", "ba", "abc", "bca"], [])
            assert list(groups) == [4, 4, 6, 6][: len(questions)]
            assert tuple(words) == LETTERS
            return np.tile([0.5, 0.3, 0.2], (len(questions), 1)), np.zeros((0, 2))

    texts = [["ab", "ba"], ["abc", "bca", "cab, too long"]]
    asked = [[Example("e", text, "") for text in own] for own in texts]
    (two, three), _ = ask(Sayer(), asked, [4, 6])  # type: ignore[arg-type]
    np.testing.assert_allclose(two, [0.5, 0.5])
    assert np.isnan(three).all() and len(three) == 3
    assert ask(Sayer(), [], [])[0] == []  # type: ignore[arg-type]
