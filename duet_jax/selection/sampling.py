"""From utilities and a count to the examples of one round."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.errors import DataError

Rule = Literal["weighted", "top_k", "remove_lowest"]


def sample(
    utilities: np.ndarray,
    count: int,
    *,
    rule: Rule,
    fraction: float = 0.0,
    rng: np.random.Generator,
) -> np.ndarray:
    """Chooses the examples of a domain for one round, without replacement.

    - `weighted`: one after another, each with probability proportional to its utility among those not
      yet chosen. Examples of utility 0 are chosen, uniformly, only after all others.
    - `top_k`: those of highest utility.
    - `remove_lowest`: uniformly among all but the `fraction` of lowest utility.

    Those of utility -inf are never chosen; they are not there for any rule. Equal utilities are told apart by `rng`.
    If more are asked for than there are, epochs over all of them repeat, and the rule decides about the last, partial
    one.

    Args:
      utilities: [n], finite or -inf; for `weighted` at least 0 where finite.
      count: how many to choose.
      rule: see above.
      fraction: of the examples that `remove_lowest` removes, rounded down, in [0, 1); other rules
        ignore it.
      rng: source of randomness; the result is a pure function of the arguments.

    Returns:
      Indices int64 [count], one epoch after another, in random order within each.

    Raises:
      DataError: a utility that the rule cannot use.
      ValueError: unknown rule, a count or fraction out of range, or nothing to choose from.
    """
    utilities = np.asarray(utilities, np.float64)
    _check_utilities(utilities, rule)
    eligible = np.flatnonzero(utilities > -np.inf)
    if count < 0 or (count > 0 and eligible.size == 0):
        raise ValueError(f"cannot choose {count} of {eligible.size} examples")
    if count == 0:
        return np.zeros(0, np.int64)
    ranked = eligible[_ranked(utilities[eligible], rule, rng)]
    pool = ranked[: pool_size(eligible.size, rule=rule, fraction=fraction)]
    if rule == "remove_lowest":
        pool = rng.permutation(pool)
    epochs, rest = divmod(count, len(pool))
    parts = [rng.permutation(pool) for _ in range(epochs)]
    return np.concatenate([*parts, rng.permutation(pool[:rest])]).astype(np.int64)


def choose(selector: SelectorConfig, utilities: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """What `sample` chooses by a selector's rule, int64 [count].

    Scores of a model may be negative: for `weighted` the lowest of them is subtracted, as the code of DUET (arXiv
    2502.00270) does; its Algorithm 2 as printed is no distribution. Those of "length_matched" are made to be weights.
    """
    if selector.scores and selector.rule == "weighted" and selector.kind != "length_matched":
        utilities = utilities - min(utilities[utilities > -np.inf], default=0.0)
    return sample(utilities, count, rule=selector.rule, fraction=selector.fraction, rng=rng)


def floor_share(share: float, number: int) -> int:
    """A share of so many examples, rounded down.

    >>> floor_share(0.05, 270_679), floor_share(0.29, 100)  # 0.29 * 100 is 28.999999999999996 in floating point
    (13533, 29)
    """
    return int(share * number + 1e-9)


def pool_size(available: int, *, rule: Rule, fraction: float = 0.0) -> int:
    """How many of `available` examples a rule chooses from; at least 1 of 1 or more.

    Raises:
      ValueError: unknown rule or a fraction outside [0, 1).
    """
    if rule not in get_args(Rule):
        raise ValueError(f"there is no rule '{rule}'; the rules are {', '.join(get_args(Rule))}")
    if rule != "remove_lowest":
        return available
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the fraction to remove must be in [0, 1), not {fraction}")
    return max(available - floor_share(fraction, available), min(available, 1))


def plan(name: str, available: int, wanted: int) -> str:
    """Says what a domain's count means for its examples.

    >>> plan("gsm8k", 120, 300)
    'gsm8k: 300 wanted of 120 examples: each 2 or 3 times'
    >>> plan("gsm8k", 120, 100)
    'gsm8k: 100 of 120 examples, each once'

    Args:
      name: of the domain.
      available: examples to choose from, see `pool_size`.
      wanted: the domain's count.
    """
    if wanted == 0:
        return f"{name}: none of {available} examples"
    if wanted <= available:
        return f"{name}: {wanted} of {available} examples, each once"
    if available == 0:
        return f"{name}: {wanted} wanted, but there are no examples"
    epochs, rest = divmod(wanted, available)
    times = f"{epochs} or {epochs + 1}" if rest else f"{epochs}"
    return f"{name}: {wanted} wanted of {available} examples: each {times} times"


def _check_utilities(utilities: np.ndarray, rule: Rule) -> None:
    if utilities.ndim != 1:
        raise ValueError(f"utilities must be one number an example, not of shape {utilities.shape}")
    allowed = np.isfinite(utilities) | (utilities == -np.inf)
    wrong = ~allowed | ((rule == "weighted") & (utilities < 0) & np.isfinite(utilities))
    if wrong.any():
        first = int(wrong.argmax())
        kind = "finite and at least 0" if rule == "weighted" else "finite"
        raise DataError(
            f"the rule '{rule}' needs utilities that are {kind}, but example {first} has {utilities[first]}"
        )


def _ranked(utilities: np.ndarray, rule: Rule, rng: np.random.Generator) -> np.ndarray:
    """Indices in order of preference.

    Sorting log-utilities plus Gumbel noise IS successive sampling in proportion to utility (Yellott
    1977; Efraimidis and Spirakis 2006 with keys u^(1/w)).
    """
    tie_break = rng.random(len(utilities))
    score = utilities
    if rule == "weighted":
        with np.errstate(divide="ignore"):
            score = np.log(utilities) + rng.gumbel(size=len(utilities))
    return np.lexsort((tie_break, -score))
