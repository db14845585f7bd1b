"""Training settings that are searched together with the mixture, and the fidelity of a trial.

Each setting has coordinates from 0 to 1, which the surrogate sees beside the mixture: a number has one, a choice of
two has one, of more one for each value, and a subset one for each of its members.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax._checks import distinct

# Values of a wide range of integers that are tried beside those that climbing finds.
GRID = 16


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, whole if `integer`; on a logarithmic scale if `log`."""

    name: str
    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        whole = not self.integer or (float(self.low).is_integer() and float(self.high).is_integer())
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high and whole):
            kind = "whole numbers" if self.integer else "numbers"
            raise ValueError(f"{self.name} goes from {self.low} to {self.high}; these must be finite {kind} in order.")
        if self.log and self.low <= 0:
            raise ValueError(f"{self.name} begins at {self.low}; on a logarithmic scale it must begin above 0.")

    @property
    def width(self) -> int:
        return 1

    def encode(self, value: Any) -> list[float]:
        number = None if isinstance(value, bool) or not isinstance(value, int | float | np.number) else float(value)
        # What was decoded may have left the range by rounding.
        room = 1e-9 * (self.high - self.low)
        fits = number is not None and self.low - room <= number <= self.high + room
        if number is None or not fits or (self.integer and not number.is_integer()):
            kind = "a whole number" if self.integer else "a number"
            raise ValueError(f"{self.name} is {value!r}; it must be {kind} from {self.low:g} to {self.high:g}.")
        low, high = self._ends()
        scaled = math.log(number) if self.log else number
        return [min(max((scaled - low) / (high - low), 0.0), 1.0)]

    def decode(self, coordinates: np.ndarray) -> int | float:
        low, high = self._ends()
        scaled = low + (high - low) * float(coordinates[0])
        value = math.exp(scaled) if self.log else scaled
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value

    def snap(self, coordinates: Array) -> Array:
        """The nearest allowed coordinates of `[..., 1]`."""
        if not self.integer:
            return coordinates
        low, high = self._ends()
        scaled = low + (high - low) * coordinates
        value = jnp.round(jnp.exp(scaled) if self.log else scaled)
        return ((jnp.log(value) if self.log else value) - low) / (high - low)

    @property
    def grid(self) -> np.ndarray:
        """Coordinates `[n, 1]` that are tried one by one: all of few whole numbers, some of many, none of others."""
        if not self.integer:
            return np.zeros((0, 1))
        values = np.arange(self.low, self.high + 1)
        if len(values) > GRID:
            values = np.unique([self.decode(np.array([x])) for x in np.linspace(0, 1, GRID)])
        return np.array([self.encode(value) for value in values.tolist()])

    def _ends(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, such as (True, False) or ("cosine", "linear"); no value is nearer to another."""

    name: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check_values(self.name, self.values, 2)

    @property
    def width(self) -> int:
        return 1 if len(self.values) == 2 else len(self.values)

    def encode(self, value: Any) -> list[float]:
        matches = [type(known) is type(value) and known == value for known in self.values]
        if not any(matches):
            raise ValueError(f"{self.name} is {value!r}; it must be one of {_listed(self.values)}.")
        return self.grid[matches.index(True)].tolist()

    def decode(self, coordinates: np.ndarray) -> Any:
        return self.values[int(np.argmin(np.sum((self.grid - coordinates) ** 2, axis=1)))]

    def snap(self, coordinates: Array) -> Array:
        return coordinates

    @property
    def grid(self) -> np.ndarray:
        """Coordinates `[n, width]` of the values; any two are 1 apart."""
        if len(self.values) == 2:
            return np.array([[0.0], [1.0]])
        return np.eye(len(self.values)) / math.sqrt(2)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Any of several members, at least `least` of them, such as the modules that get adapters."""

    name: str
    members: tuple[str, ...]
    least: int = 1

    def __post_init__(self) -> None:
        _check_values(self.name, self.members, 1)
        if not 0 <= self.least <= len(self.members):
            raise ValueError(f"{self.name} needs at least {self.least} of {len(self.members)} members.")

    @property
    def width(self) -> int:
        return len(self.members)

    def encode(self, value: Any) -> list[float]:
        chosen = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
        if not set(chosen) <= set(self.members) or len(set(chosen)) < self.least:
            raise ValueError(f"{self.name} is {value!r}; it must be at least {self.least} of {_listed(self.members)}.")
        return [float(member in chosen) for member in self.members]

    def decode(self, coordinates: np.ndarray) -> tuple[str, ...]:
        return tuple(member for member, chosen in zip(self.members, coordinates, strict=True) if chosen > 0.5)

    def snap(self, coordinates: Array) -> Array:
        return coordinates


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How much a trial is given, such as steps or examples: less is cheaper, and says less about the most.

    Attributes:
      name: of the setting.
      levels: ascending, above 0; what is searched for is the best at the last one, the target.
      costs: of a trial at each level, in any unit; by default proportional to the levels.
    """

    name: str
    levels: tuple[float, ...]
    costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if len(self.levels) < 2 or not ascending or self.levels[0] <= 0 or not math.isfinite(self.levels[-1]):
            levels = list(self.levels)
            raise ValueError(f"{self.name} has the levels {levels}; they must be at least 2, ascending from above 0.")
        if self.costs and (len(self.costs) != len(self.levels) or not min(self.costs) > 0):
            raise ValueError(f"{self.name} has the costs {list(self.costs)}; there must be one above 0 for each level.")

    @property
    def width(self) -> int:
        return 1

    @property
    def grid(self) -> np.ndarray:
        """Coordinates `[levels]`: logarithms, because what is missing falls as a power of what is given."""
        logs = np.log(self.levels)
        return (logs - logs[0]) / (logs[-1] - logs[0])

    def encode(self, value: Any) -> list[float]:
        if isinstance(value, bool) or value not in self.levels:
            raise ValueError(f"{self.name} is {value!r}; it must be one of {_listed(self.levels)}.")
        return [float(self.grid[self.levels.index(value)])]

    def decode(self, coordinates: np.ndarray) -> float:
        return self.levels[int(np.argmin(np.abs(self.grid - coordinates[0])))]

    @property
    def relative_costs(self) -> np.ndarray:
        """Cost of each level, 1 at the target."""
        costs = np.array(self.costs or self.levels, np.float64)
        return costs / costs[-1]


Setting = Number | Choice | Subset


@dataclasses.dataclass(frozen=True)
class Space:
    """All settings that are searched, and their coordinates side by side; the fidelity's comes last.

    Attributes:
      settings: in order.
      fidelity: of the trials, or None if all are alike.
    """

    settings: tuple[Setting, ...] = ()
    fidelity: Fidelity | None = None

    def __post_init__(self) -> None:
        if self._parts:
            distinct("settings", [part.name for part in self._parts])

    @property
    def _parts(self) -> tuple[Setting | Fidelity, ...]:
        return self.settings if self.fidelity is None else (*self.settings, self.fidelity)

    @cached_property
    def width(self) -> int:
        """Number of coordinates, e."""
        return sum(part.width for part in self._parts)

    def _slices(self) -> list[tuple[Setting | Fidelity, slice]]:
        ends = np.cumsum([0, *(part.width for part in self._parts)]).tolist()
        return [(part, slice(a, b)) for part, a, b in zip(self._parts, ends, ends[1:], strict=False)]

    def encode(self, values: Mapping[str, Any] | None) -> np.ndarray:
        """Coordinates float64 `[e]` of settings by name. A fidelity that is not named is the target.

        Raises:
          ValueError: a setting is missing, unknown or out of range.
        """
        given = dict(values or {})
        if self.fidelity is not None:
            given.setdefault(self.fidelity.name, self.fidelity.levels[-1])
        names = [part.name for part in self._parts]
        if sorted(given) != sorted(names):
            raise ValueError(f"The settings are {_listed(values or ()) or 'none'}, not {_listed(names) or 'none'}.")
        return np.array([x for part in self._parts for x in part.encode(given[part.name])])

    def decode(self, coordinates: np.ndarray) -> dict[str, Any]:
        """Settings by name of coordinates `[e]`."""
        return {part.name: part.decode(coordinates[where]) for part, where in self._slices()}

    def middle(self) -> np.ndarray:
        """A modest configuration `[e]`: numbers in the middle, first values, all members, the target fidelity."""
        columns: list[float] = []
        for part in self.settings:
            if isinstance(part, Number):
                columns += part.encode(part.decode(np.array([0.5])))
            elif isinstance(part, Choice):
                columns += part.grid[0].tolist()
            else:
                columns += [1.0] * part.width
        return np.array([*columns, *([] if self.fidelity is None else [1.0])])

    def draws(self, key: Array, count: int) -> Array:
        """Random configurations `[count, e]` at the target fidelity."""
        columns = []
        for i, part in enumerate(self.settings):
            numbers = jax.random.uniform(jax.random.fold_in(key, i), (count, part.width))
            if isinstance(part, Number):
                columns.append(part.snap(numbers))
            elif isinstance(part, Choice):
                which = jnp.floor(numbers[:, 0] * len(part.values)).astype(int)
                columns.append(jnp.asarray(part.grid, numbers.dtype)[jnp.minimum(which, len(part.values) - 1)])
            else:
                # Those with the smallest numbers are members in any case.
                order = jnp.argsort(jnp.argsort(numbers, axis=1), axis=1)
                columns.append(((numbers < 0.5) | (order < part.least)).astype(numbers.dtype))
        if self.fidelity is not None:
            columns.append(jnp.ones((count, 1)))
        return jnp.concatenate(columns, axis=1)

    def at_target(self, coordinates: Array) -> Array:
        """Configurations `[..., e]` at the target fidelity."""
        if self.fidelity is None:
            return coordinates
        return jnp.concatenate([coordinates[..., :-1], jnp.ones_like(coordinates[..., -1:])], axis=-1)

    def snap(self, coordinates: Array) -> Array:
        """The nearest allowed whole numbers of configurations `[..., e]` between them."""
        columns = [
            coordinates[..., where] if isinstance(part, Fidelity) else part.snap(coordinates[..., where])
            for part, where in self._slices()
        ]
        return jnp.concatenate(columns, axis=-1)

    @cached_property
    def real(self) -> np.ndarray:
        """bool `[e]`: coordinates that may have any value."""
        return self._columns(lambda part: isinstance(part, Number) and not part.integer)

    @cached_property
    def ordered(self) -> np.ndarray:
        """bool `[e]`: coordinates between whose values one may think of others, to climb there before snapping."""
        return self._columns(lambda part: isinstance(part, Number))

    def _columns(self, rule: Any) -> np.ndarray:
        return np.array([rule(part) for part in self._parts for _ in range(part.width)], bool)

    @cached_property
    def _moves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Changes of one setting: which columns are set, to what, and which are flipped, each `[v, e]`."""
        chosen, values, flipped = [], [], []
        for part, where in self._slices():
            if isinstance(part, Fidelity):
                continue
            if isinstance(part, Subset):
                rows = np.zeros((part.width, self.width))
                rows[:, where] = np.eye(part.width)
                flipped.append(rows)
                chosen.append(np.zeros_like(rows))
                values.append(np.zeros_like(rows))
            else:
                rows = np.zeros((len(part.grid), self.width))
                rows[:, where] = part.grid
                values.append(rows)
                mask = np.zeros_like(rows)
                mask[:, where] = 1.0
                chosen.append(mask)
                flipped.append(np.zeros_like(rows))
        if not chosen:
            return (np.zeros((0, self.width)),) * 3
        return np.concatenate(chosen), np.concatenate(values), np.concatenate(flipped)

    def neighbours(self, coordinates: Array) -> Array:
        """Configurations `[m, v + 1, e]`: each of `[m, e]`, then what it becomes by changing one discrete setting."""
        chosen, values, flipped = (jnp.asarray(x, coordinates.dtype) for x in self._moves)
        old = coordinates[:, None, :]
        changed = jnp.where(chosen > 0, values, jnp.where(flipped > 0, 1.0 - old, old))
        # A move that leaves a subset with too few members is none.
        allowed = jnp.ones(changed.shape[:2], bool)
        for part, where in self._slices():
            if isinstance(part, Subset):
                allowed &= jnp.sum(changed[..., where], axis=-1) > part.least - 0.5
        return jnp.concatenate([old, jnp.where(allowed[..., None], changed, old)], axis=1)


def _check_values(name: str, values: tuple[Any, ...], least: int) -> None:
    try:
        different = len(set(map(repr, values))) == len(values) and hash(values) is not None
    except TypeError:
        different = False
    if not isinstance(values, tuple) or len(values) < least or not different:
        raise ValueError(f"{name} has the values {values!r}; these must be a tuple of at least {least}, all different.")


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
