"""Near duplicates: of each group of examples that are almost the same, the first is kept.

Two examples are compared by the sets of their token 5-grams: the Jaccard similarity is the number of 5-grams that
both have over the number that either has. Prompts count as well as responses: two questions with the answer "yes"
are two examples, and so are two different answers to a short question.

The search is exact, without comparing all pairs (prefix filtering: Bayardo, Ma and Srikant, WWW 2007; Xiao et al.,
WWW 2008). Order all 5-grams from rare to frequent. Of two sets with a similarity of at least t, of which one has s
elements, at least ceil(t s) are common; so among the first s - ceil(t s) + 1 of each there is a common one, and only
sets that meet in an index of these are compared. Memory is linear in the number of tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.selection.pool import Pool

GRAM = 5


def near_duplicates(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """1 for examples that are kept, -inf for those almost equal to one that is kept before them, of any domain.

    What a chat template writes into every example makes short ones more alike.

    Args:
      pool: what is scored.
      selector: of kind "near_duplicates"; from its `threshold` on, examples are one.
      folder: not used.

    Returns:
      float64 `[examples]` of each domain.
    """
    kept = first_of_each(shingles(join(pool.train)), selector.threshold)
    found = []
    for name, part in zip(pool.names, np.split(kept, np.cumsum([len(x) for x in pool.train])[:-1]), strict=True):
        pool.say(f"near_duplicates, {name}: {np.sum(~part)} of {len(part)} examples repeat an earlier one")
        found.append(np.where(part, 1.0, -np.inf))
    return found


def shingles(data: Encoded) -> list[np.ndarray]:
    """The set of 5-grams of each example, by numbers from the rarest on, ascending: int64 `[s]`, s >= 1.

    Equal 5-grams have equal numbers, and others have others: nothing is hashed. They are numbered by doubling (Karp,
    Miller and Rosenberg, STOC 1972). An example of fewer than five tokens is one 5-gram, filled up.

    Args:
      data: examples, at least one.
    """
    lengths = np.maximum(data.lengths, GRAM).astype(np.int64)
    ends = np.cumsum(lengths)
    stream = np.zeros(ends[-1], np.int64)
    for end, length, tokens in zip(ends, lengths, data.tokens, strict=True):
        # 0 is what short examples are filled up with.
        stream[end - length : end - length + len(tokens)] = np.asarray(tokens, np.int64) + 1
    pairs = _number(stream[:-1], stream[1:])
    fours = _number(pairs[:-2], pairs[2:])
    fives = _number(fours[:-1], stream[GRAM - 1 :])
    owner = np.repeat(np.arange(len(data)), lengths)[: len(fives)]
    inside = np.arange(len(fives)) + GRAM <= ends[owner]
    kinds = int(fives.max()) + 1
    entries = np.unique(owner[inside] * kinds + fives[inside])
    owner, grams = entries // kinds, entries % kinds
    rank = np.empty(kinds, np.int64)
    rank[np.argsort(np.bincount(grams, minlength=kinds), kind="stable")] = np.arange(kinds)
    entries = np.sort(owner * kinds + rank[grams])
    return np.split(entries % kinds, np.searchsorted(entries // kinds, np.arange(1, len(data))))


def first_of_each(sets: list[np.ndarray], threshold: float) -> np.ndarray:
    """Which sets are not similar to one before them that is kept itself, bool `[n]`.

    So every set that is not kept is similar to one that is, and no two that are kept are similar to each other.

    Args:
      sets: distinct numbers int64 `[s]`, s >= 1, ascending; the rarer a number the smaller, for speed.
      threshold: Jaccard similarity from which two sets are similar, in (0, 1].
    """
    kept = np.zeros(len(sets), np.bool_)
    index: defaultdict[int, list[int]] = defaultdict(list)
    for i, one in enumerate(sets):
        prefix = one[: len(one) - math.ceil(threshold * len(one) - 1e-9) + 1].tolist()
        met = {j for number in prefix for j in index.get(number, ())}
        kept[i] = not any(_similarity(one, sets[j], threshold) >= threshold for j in met)
        if kept[i]:
            for number in prefix:
                index[number].append(i)
    return kept


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Numbers from 0 of pairs of numbers, equal ones where the pairs are equal."""
    return np.unique(first * (int(second.max()) + 1) + second, return_inverse=True)[1]


def _similarity(one: np.ndarray, other: np.ndarray, threshold: float) -> float:
    """The Jaccard similarity of two sets; 0 without counting where their sizes alone keep it below the threshold."""
    small, large = sorted((len(one), len(other)))
    if small / large < threshold:
        return 0.0
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
