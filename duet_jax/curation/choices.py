"""Questions that are answered with a letter, where a liking for a letter cancels: each option stands at each of them.

A model that takes one letter more often than others, whatever stands at it, would answer all questions alike. So a
question is asked once for each place of its options in turn, and what counts is the mean probability of each option
over the letters that it stood at: the cyclic permutations of Zheng et al. 2024 (arXiv 2309.03882).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duet_jax.curation.respondent import Respondent, fits
from duet_jax.data import Example

LETTERS = ("A", "B", "C")


def orders(count: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the options by letter, in as many ways: each option stands once at each letter."""
    return tuple(tuple((letter + turn) % count for letter in range(count)) for turn in range(count))


def lines(options: Sequence[str], order: Sequence[int]) -> str:
    """The options with their letters, a line each."""
    return "\n".join(f"{letter}: {options[number]}" for letter, number in zip(LETTERS, order, strict=False))


def probabilities(letters: np.ndarray) -> np.ndarray:
    """Probabilities of n options, float64 `[n]`.

    Args:
      letters: probabilities of `LETTERS` after a question in each of the n `orders`, `[n, len(LETTERS)]`. Those at
        which no option stands are left out.
    """
    count = len(letters)
    own = letters[:, :count] / letters[:, :count].sum(axis=1, keepdims=True)
    found = np.zeros(count)
    for order, row in zip(orders(count), own, strict=True):
        found[list(order)] += row / count
    return found


def ask(
    respondent: Respondent,
    questions: Sequence[Sequence[Example]],
    groups: Sequence[int],
    scored: Sequence[Example] = (),
    owners: Sequence[int] = (),
) -> tuple[list[np.ndarray], np.ndarray]:
    """What a model says to questions, and how probable it finds responses, where they begin alike.

    Args:
      respondent: the model.
      questions: each of them in all orders of its options.
      groups: a number for each; those with the same one begin alike.
      scored, owners: m examples, and their groups.

    Returns:
      Probabilities of the options of each question, float64 `[options]`, NaN where it is longer than the model takes;
      and float64 `[m, 2]`, see `Respondent.read`.
    """
    flat = [one for own in questions for one in own]
    places = [group for group, own in zip(groups, questions, strict=True) for _ in own]
    rows = np.flatnonzero(fits(respondent, flat)).tolist()
    found, log_probs = respondent.read(
        [flat[row] for row in rows], [places[row] for row in rows], LETTERS, scored, owners
    )
    letters = np.full((len(flat), len(LETTERS)), np.nan)
    letters[rows] = found
    own = np.split(letters, np.cumsum([len(own) for own in questions], dtype=int)[:-1]) if questions else []
    return [probabilities(one) for one in own], log_probs
