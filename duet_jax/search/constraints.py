"""The set of allowed mixtures: bounds and group sums, a smallest positive share, and a largest number of domains.

Bounds and disjoint groups make one convex set, of which projections and linear maxima are known in closed form. A
smallest positive share and a largest number of domains do not: `support` chooses which domains take part, and gives
the bounds of the convex piece that is left.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

# What sums of bounds may miss by: rounding of decimal fractions, and no more.
ROUNDING = 1e-12

Bound = Array | np.ndarray
Filling = Callable[[Array, Array, Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """The sum of the shares of some domains lies between `minimum` and `maximum`."""

    domains: tuple[int, ...]
    minimum: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a mixture must fulfil besides being one. Hashable: a static argument of compiled functions.

    Attributes:
      minimum: least share of each domain; () means 0.
      maximum: largest share of each domain; () means 1. A domain with equal minimum and maximum is frozen.
      groups: bounds of sums. No domain is in two of them: then a group's part of a projection depends on its own
        sum alone, and the closed forms are exact. Overlapping groups would need an iteration.
      floor: each share is 0 or at least this.
      most: at most this many domains have a share above 0; None means all may.
    """

    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()
    groups: tuple[Group, ...] = ()
    floor: float = 0.0
    most: int | None = None

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        object.__setattr__(self, "groups", tuple(self.groups))

    @staticmethod
    def repetition(sizes: Sequence[int], budget: int, epochs: float) -> tuple[float, ...]:
        """Maxima with which a round of `budget` examples goes at most `epochs` times through a domain of any size.

        Raises:
          ValueError: a number is out of range, or the budget exceeds what all domains may give.
        """
        _require(min(sizes, default=0) >= 0, f"sizes are {list(sizes)}; a domain has at least 0 examples.")
        _require(budget >= 1, f"budget is {budget}; a round has at least 1 example.")
        _require(epochs > 0, f"epochs is {epochs}; it must be above 0.")
        most = epochs * sum(sizes)
        _require(most >= budget, f"{epochs:g} epochs of {sum(sizes)} examples are less than the budget, {budget}.")
        return tuple(min(1.0, epochs * size / budget) for size in sizes)

    def check(self, size: int) -> None:
        """Whether some mixture of `size` domains fulfils all.

        Raises:
          ValueError: a number is out of range, or no mixture does.
        """
        for name, values in (("minimum", self.minimum), ("maximum", self.maximum)):
            _require(len(values) in (0, size), f"{name} has {len(values)} shares; it must have one for each of {size}.")
            for domain, share in enumerate(values):
                _require(0 <= share <= 1, f"The {name} of domain {domain} is {share:g}; a share is from 0 to 1.")
        lower, upper = _box(self, size)
        for domain, (low, high) in enumerate(zip(lower, upper, strict=True)):
            _require(low <= high, f"The minimum of domain {domain}, {low:g}, is above its maximum, {high:g}.")
        _check_groups(self.groups, lower, upper)
        _check_support(self, lower, upper)


def _require(holds: bool | np.bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _box(constraints: Constraints, size: int) -> tuple[np.ndarray, np.ndarray]:
    lower = np.array(constraints.minimum) if constraints.minimum else np.zeros(size)
    upper = np.array(constraints.maximum) if constraints.maximum else np.ones(size)
    return lower, upper


def _check_groups(groups: tuple[Group, ...], lower: np.ndarray, upper: np.ndarray) -> None:
    size, owner = len(lower), dict[int, int]()
    for number, group in enumerate(groups):
        members, low, high = list(group.domains), group.minimum, group.maximum
        _require(bool(members), f"Group {number} has no domains.")
        _require(len(set(members)) == len(members), f"Group {number} names a domain twice: {members}.")
        for domain in members:
            _require(0 <= domain < size, f"Group {number} names domain {domain}; there are 0 to {size - 1}.")
            other = owner.setdefault(domain, number)
            _require(other == number, f"Domain {domain} is in groups {other} and {number}; it may be in one only.")
        message = f"Group {number} has minimum {low:g} and maximum {high:g}; they must be from 0 to 1, in this order."
        _require(0 <= low <= high <= 1, message)
        least, reach = lower[members].sum(), upper[members].sum()
        _require(reach >= low - ROUNDING, f"Group {number} needs {low:g}, but its domains' maxima sum to {reach:.12g}.")
        _require(least <= high + ROUNDING, f"Group {number} may have {high:g}, but its minima sum to {least:.12g}.")
    least, _, reach, _ = _totals(np.ones(size, bool), lower, upper, groups)
    _require(least <= 1 + ROUNDING, f"The minima of groups and domains sum to {least:.12g}, which is above 1.")
    _require(reach >= 1 - ROUNDING, f"The maxima of groups and domains sum to {reach:.12g}, which is below 1.")


def _check_support(constraints: Constraints, lower: np.ndarray, upper: np.ndarray) -> None:
    floor, most, size = constraints.floor, constraints.most, len(lower)
    _require(0 <= floor <= 1, f"floor is {floor:g}; it must be from 0 to 1.")
    _require(most is None or most >= 1, f"most is {most}; a mixture has at least 1 domain.")
    always = np.flatnonzero(lower > 0)
    for domain in always:
        message = f"Domain {domain} needs a share, but its maximum, {upper[domain]:g}, is below the floor, {floor:g}."
        _require(upper[domain] >= floor, message)
    _require(len(always) <= (most or size), f"{len(always)} domains need a share, but at most {most} may have one.")
    limits = [f"a floor of {floor:g}"] * (floor > 0) + [f"at most {most} domains"] * (most is not None)
    reserve = np.isin(np.arange(size), _reserve(constraints, size))
    message = f"With {' and '.join(limits)}, no choice of domains was found that meets all bounds."
    _require(not limits or _feasible(reserve, constraints, ROUNDING), message)


def bounds(constraints: Constraints, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest share of each domain, each float64 `[size]`, whatever the others'.

    They are NumPy's, so that `project` sees before compilation whether there are any. A domain that takes part for
    certain has at least the floor, and one that cannot reach it has none.
    """
    lower, upper = _box(constraints, size)
    if constraints.floor:
        lower = np.where(lower > 0, np.maximum(lower, constraints.floor), 0.0)
        upper = np.where(upper >= constraints.floor, upper, 0.0)
    return lower, upper


def project(weights: Array, lower: Bound, upper: Bound, groups: tuple[Group, ...]) -> Array:
    """The allowed mixture nearest to `weights` in Kullback-Leibler divergence.

    It is `clip(scale * weights, lower, upper)`, with one scale for all but the groups whose sum is at a bound, each
    of which has its own. Domains of weight 0 have their least share, unless all others together reach no mixture:
    then these are at their bounds, and the domains of weight 0 share what is missing as if their weights were equal.
    Allowed weights of sum 1 come back as they are, but for rounding.

    Args:
      weights: `[..., d]`, finite, not negative; not all 0 if there are no bounds.
      lower, upper: `[d]` or `[..., d]`, of `bounds` or `support`.
      groups: of the constraints.
    """
    given = isinstance(lower, np.ndarray) and isinstance(upper, np.ndarray)
    if given and not groups and np.all(lower <= 0) and np.all(upper >= 1):
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    return _fill(_scaled, weights, lower, upper, groups)


def extreme(slope: Array, lower: Bound, upper: Bound, groups: tuple[Group, ...]) -> Array:
    """The allowed mixture with the largest inner product with `slope`, finite, `[..., d]`; of equals, an early one."""
    return _fill(_poured, slope, lower, upper, groups)


def gap(slope: Array, mixture: Array, lower: Bound, upper: Bound, groups: tuple[Group, ...]) -> Array:
    """How much a step within the set can gain to first order, `[...]`: the gap of Frank and Wolfe, at least 0.

    For a concave function with gradient `slope` at `mixture`, its maximum is at most this much higher.
    """
    change = extreme(slope, lower, upper, groups) - mixture
    return jnp.maximum(jnp.sum(slope * change, axis=-1), 0.0)


def _fill(filling: Filling, values: Array, lower: Bound, upper: Bound, groups: tuple[Group, ...]) -> Array:
    """Fills domains from `lower` towards `upper` until they hold 1, in an order that `values` set.

    Within a group the order is the same whatever its sum. What it holds at its least and at its largest sum therefore
    bounds each domain, and with these bounds the group needs no more attention.
    """
    lower = jnp.broadcast_to(jnp.asarray(lower, values.dtype), values.shape)
    upper = jnp.broadcast_to(jnp.asarray(upper, values.dtype), values.shape)
    if groups:
        size = values.shape[-1]
        width = max(len(group.domains) for group in groups)
        # Rows of groups, padded to one width by a domain `size` that can hold nothing.
        rows = np.full((len(groups), width), size)
        for row, group in zip(rows, groups, strict=True):
            row[: len(group.domains)] = group.domains
        stacked = jnp.stack([values, lower, upper])
        padded = jnp.concatenate([stacked, jnp.zeros_like(stacked[..., :1])], axis=-1)[..., rows]
        sums = np.array([(group.minimum, group.maximum) for group in groups]).T.reshape(
            2, *[1] * (values.ndim - 1), len(groups), 1
        )
        held = filling(padded[0], padded[1], padded[2], jnp.asarray(sums, values.dtype))
        inside = np.isin(np.arange(size), rows)
        place = np.array([np.argmax(rows.ravel() == domain) for domain in range(size)])
        held = held.reshape(2, *values.shape[:-1], rows.size)[..., place]
        lower, upper = jnp.where(inside, held[0], lower), jnp.where(inside, held[1], upper)
    return filling(values, lower, upper, 1.0)


def _scaled(weights: Array, lower: Array, upper: Array, total: Any) -> Array:
    """`clip(scale * weights, lower, upper)` of sum `total`; the scale is exact, from the kinks of the sum."""
    kind = jnp.finfo(weights.dtype)
    relative = weights / jnp.maximum(jnp.max(weights, axis=-1, keepdims=True), kind.tiny)
    # Weights this small count as 0: quotients by larger ones cannot overflow.
    positive = relative > kind.tiny**0.5
    reach = jnp.sum(jnp.where(positive, upper, lower), axis=-1, keepdims=True)
    stuck = reach < total - 8 * kind.eps
    lower = jnp.where(stuck & positive, upper, lower)
    relative = jnp.where(stuck, ~positive, jnp.where(positive, relative, 0.0))
    divisor = jnp.where(relative > 0, relative, 1.0)
    start, stop = jnp.where(relative > 0, lower, 0.0) / divisor, jnp.where(relative > 0, upper, 0.0) / divisor

    kinks = jnp.concatenate(jnp.broadcast_arrays(start, stop), axis=-1)
    at_kinks = kinks[..., :, None] * relative[..., None, :]
    missing = total - jnp.sum(jnp.clip(at_kinks, lower[..., None, :], upper[..., None, :]), axis=-1)
    kink = jnp.max(jnp.where(missing >= 0, kinks, 0.0), axis=-1, keepdims=True)
    rest = jnp.min(jnp.where(missing >= 0, missing, jnp.inf), axis=-1, keepdims=True)
    # From the last kink that is not too far, those move on that have started and not stopped.
    moving = jnp.sum(jnp.where((start <= kink) & (kink < stop), relative, 0.0), axis=-1, keepdims=True)
    known = (moving > 0) & jnp.isfinite(rest)
    scale = kink + jnp.where(known, rest / jnp.where(known, moving, 1.0), 0.0)
    return jnp.clip(scale * relative, lower, upper)


def _poured(slope: Array, lower: Array, upper: Array, total: Any) -> Array:
    """Domains filled up one after another, those of largest slope first, until they hold `total`."""
    room = upper - lower
    ahead = jnp.sum(jnp.where(_before(slope), room[..., None, :], 0.0), axis=-1)
    return lower + jnp.clip(total - jnp.sum(lower, axis=-1, keepdims=True) - ahead, 0.0, room)


def _before(values: Array) -> Array:
    """Whether the second domain comes before the first by decreasing value, bool `[..., d, d]`."""
    first, second = values[..., :, None], values[..., None, :]
    index = np.arange(values.shape[-1])
    return (second > first) | ((second == first) & (index < index[:, None]))


def _totals(chosen: Any, lower: Any, upper: Any, groups: tuple[Group, ...]) -> tuple[Any, Any, Any, Any]:
    """What the domains `chosen`, bool `[..., d]`, can hold, each `[...]`, for NumPy and JAX alike.

    The least sum, by how much groups exceed their maxima, the largest sum, by how much groups miss their minima.
    """
    member = np.zeros((len(groups), chosen.shape[-1]), lower.dtype)
    for row, group in zip(member, groups, strict=True):
        row[list(group.domains)] = 1.0
    minima, maxima = np.array([(g.minimum, g.maximum) for g in groups], lower.dtype).reshape(-1, 2).T
    member, alone = member.T, 1 - member.sum(0)
    low, high = chosen * lower, chosen * upper
    each_low, each_high = low @ member, high @ member
    least = (low * alone).sum(-1) + each_low.clip(min=minima).sum(-1)
    reach = (high * alone).sum(-1) + each_high.clip(max=maxima).sum(-1)
    return least, (each_low - maxima).clip(min=0).sum(-1), reach, (minima - each_high).clip(min=0).sum(-1)


def _taking_part(constraints: Constraints, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of each domain if it takes part; the largest share is 0 if it cannot."""
    lower, upper = bounds(constraints, size)
    return np.where(upper > 0, np.maximum(lower, constraints.floor), 0.0), upper


def _feasible(chosen: Any, constraints: Constraints, slack: float, dtype: Any = np.float64) -> Any:
    """Whether the domains `chosen`, bool `[..., d]`, can make an allowed mixture without the others, `[...]`."""
    lower, upper = (part.astype(dtype) for part in _taking_part(constraints, chosen.shape[-1]))
    least, over, reach, short = _totals(chosen, lower, upper, constraints.groups)
    return (least <= 1 + slack) & (over <= slack) & (reach >= 1 - slack) & (short <= slack)


def _limit(constraints: Constraints, size: int) -> int:
    """How many domains can take part at most, as far as floor and `most` say."""
    limit = size if constraints.most is None else min(constraints.most, size)
    if constraints.floor:
        lower, _ = bounds(constraints, size)
        others = math.floor((1 - lower.sum()) / constraints.floor + 1e-9)
        limit = min(limit, int(np.sum(lower > 0)) + max(others, 0))
    return limit


@functools.lru_cache
def _reserve(constraints: Constraints, size: int) -> tuple[int, ...]:
    """Few domains that can make an allowed mixture on their own, the most important first.

    Those that must take part, then one at a time whichever brings groups nearer to their minima, or else adds most.
    Without groups, or without a floor, this finds a choice whenever there is one.
    """
    lower, upper = _taking_part(constraints, size)
    order = np.flatnonzero(bounds(constraints, size)[0] > 0).tolist()
    while len(order) < _limit(constraints, size):
        chosen = np.isin(np.arange(size), order)
        if _feasible(chosen, constraints, ROUNDING):
            break
        least, over, reach, short = _totals(chosen | np.eye(size, dtype=bool), lower, upper, constraints.groups)
        possible = ~chosen & (upper > 0) & (least <= 1 + ROUNDING) & (over <= ROUNDING)
        if not possible.any():
            break
        order.append(int(np.lexsort((-reach, short, ~possible))[0]))
    return tuple(order)


def support(mixture: Array, constraints: Constraints) -> tuple[Bound, Bound]:
    """Chooses the domains that take part, and gives the bounds of the allowed mixtures of these domains alone.

    Domains with a minimum take part, and of the others those with the largest shares: as many as reach the floor and
    `most` allows. Where these cannot make an allowed mixture, more of the largest are taken, and then fewer together
    with domains that can.

    Returns:
      Least and largest shares, each `[..., d]`: from the larger of minimum and floor to the maximum, or 0 and 0.
    """
    size = mixture.shape[-1]
    if not constraints.floor and constraints.most is None:
        lower, upper = bounds(constraints, size)
        return np.broadcast_to(lower, mixture.shape), np.broadcast_to(upper, mixture.shape)
    lower, upper = _taking_part(constraints, size)
    always, able, limit = bounds(constraints, size)[0] > 0, upper > 0, _limit(constraints, size)
    rank = jnp.sum(_before(jnp.where(always, 2 + mixture, jnp.where(able, mixture, -1.0))), axis=-1)[..., None, :]
    # A uniform mixture may be below a floor of 1 / d by rounding.
    large = able & (mixture > 0) & (mixture >= constraints.floor * (1 - 1e-5))
    wanted = jnp.clip(jnp.sum(large | always, axis=-1, keepdims=True), 1, limit)

    counts = np.arange(1, limit + 1)
    largest = (rank < counts[:, None]) & able
    # The largest few and the reserve, while there is room; the last has the reserve alone, which always suffices.
    few = np.arange(limit - 1, -1, -1)[:, None]
    reserve = np.eye(size)[list(_reserve(constraints, size))]
    absent = (rank >= few)[..., reserve.argmax(1)]
    added = absent & (jnp.cumsum(absent, axis=-1) <= limit - few)
    mixed = ((rank < few) & able) | (added.astype(mixture.dtype) @ reserve.astype(mixture.dtype) > 0)

    choices = jnp.concatenate([largest, mixed], axis=-2)
    good = _feasible(choices, constraints, 64 * float(jnp.finfo(mixture.dtype).eps), mixture.dtype)
    enough = jnp.concatenate([counts >= wanted, jnp.ones_like(good[..., limit:])], axis=-1)
    best = jnp.argmax((good & enough) | (np.arange(2 * limit) == 2 * limit - 1), axis=-1)
    chosen = jnp.take_along_axis(choices, best[..., None, None], axis=-2)[..., 0, :]
    return jnp.where(chosen, lower.astype(mixture.dtype), 0.0), jnp.where(chosen, upper.astype(mixture.dtype), 0.0)


def contains(mixture: Array, constraints: Constraints, size: int, tolerance: float = 1e-9) -> Array:
    """Whether mixtures `[..., size]` fulfil all constraints and sum to 1, to a tolerance in shares, bool `[...]`."""
    lower, upper = _box(constraints, size)
    inside = jnp.all((mixture >= lower - tolerance) & (mixture <= upper + tolerance), axis=-1)
    inside &= jnp.abs(jnp.sum(mixture, axis=-1) - 1) <= tolerance
    for group in constraints.groups:
        total = jnp.sum(mixture[..., np.array(group.domains)], axis=-1)
        inside &= (total >= group.minimum - tolerance) & (total <= group.maximum + tolerance)
    inside &= jnp.all((mixture <= tolerance) | (mixture >= constraints.floor - tolerance), axis=-1)
    if constraints.most is not None:
        inside &= jnp.sum(mixture > tolerance, axis=-1) <= constraints.most
    return inside


def round_counts(mixture: np.ndarray, budget: int, constraints: Constraints) -> np.ndarray:
    """Splits a budget by a mixture by largest remainders, within the constraints as far as whole numbers allow.

    Where they do not, as with three maxima of 1/3 and a budget of 100, a bound is passed by less than one example
    rather than the budget missed. A share of 0 has no examples. What the mixture itself violates, stays violated.

    Returns:
      int64 `[d]`, of sum `budget`.
    """
    shares = np.asarray(mixture, np.float64)
    exact = shares / shares.sum() * budget
    lower, upper = (part * budget for part in _taking_part(constraints, len(shares)))
    # Whole bounds; 0.29 * 100 is 28.999999999999996 in floating point, and 29 are meant.
    low = np.where(shares > 0, np.minimum(np.ceil(lower - 1e-6), np.ceil(exact)), 0)
    high = np.maximum(np.floor(upper + 1e-6), np.floor(exact))
    whole = np.maximum(np.floor(exact), low).astype(np.int64)
    members = [np.isin(np.arange(len(shares)), group.domains) for group in constraints.groups]
    pairs = [(group, exact[inside].sum()) for group, inside in zip(constraints.groups, members, strict=True)]
    least = [min(math.ceil(g.minimum * budget - 1e-6), math.ceil(s)) for g, s in pairs]
    most = [max(math.floor(g.maximum * budget + 1e-6), math.floor(s)) for g, s in pairs]

    def move(inside: np.ndarray, steps: int) -> None:
        sign = 1 if steps > 0 else -1
        for _ in range(abs(steps)):
            urgency = sign * (exact - whole) - 10 * (whole >= high if steps > 0 else whole <= low)
            for member, smallest, largest in zip(members, least, most, strict=True):
                held = whole[member].sum()
                urgency -= 10 * (member & (held >= largest if steps > 0 else held <= smallest))
            whole[np.argmax(np.where(inside & (shares > 0), urgency, -np.inf))] += sign

    for member, smallest, largest in zip(members, least, most, strict=True):
        held = whole[member].sum()
        move(member, int(np.clip(held, smallest, max(smallest, largest)) - held))
    move(shares > 0, budget - int(whole.sum()))
    return whole
