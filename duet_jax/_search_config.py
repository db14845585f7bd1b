"""The part of a configuration that says what is searched, and how."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from duet_jax._checks import FieldError, at_least, distinct, join, require
from duet_jax._decode import decode

SettingField = Literal[
    "training.learning_rate",
    "training.epochs",
    "training.batch_size",
    "training.schedule",
    "training.warmup_fraction",
    "training.weight_decay",
    "training.clip_norm",
    "training.lora.rank",
    "training.lora.alpha",
    "training.lora.dropout",
    "training.lora.targets",
    "training.lora.layers",
]
Training = TypeVar("Training")


@dataclass(frozen=True, kw_only=True)
class SettingConfig:
    """A field of which every trial has its own value: a number from a range, one of some values, or some members.

    Each value of batch size, rank and targets that is tried is a compiled program of its own: a few values are kinder
    than a range. All other fields are arguments of one program, but for dropout, of which 0 is another than the rest.

    Attributes:
      field: dotted path.
      low, high: ends of the range; its numbers are whole if the field's are.
      log: whether equal factors count as equal steps.
      values: of which a trial has one.
      members: of a list, of which a trial has any,
      least: but at least so many.
    """

    field: SettingField
    low: float | None = None
    high: float | None = None
    log: bool = False
    values: tuple[Any, ...] = ()
    members: tuple[Any, ...] = ()
    least: int = 1

    def __post_init__(self) -> None:
        ranged = self.low is not None or self.high is not None
        if ranged + bool(self.values) + bool(self.members) != 1:
            raise FieldError("field", f"is {self.field!r}; it needs one of low and high, values, and members.")
        if ranged:
            if self.low is None or self.high is None:
                raise FieldError("low" if self.low is None else "high", "is missing; a range has both ends.")
            require(self.low < self.high, "high", self.high, f"greater than low ({self.low:g})")
            require(self.low > 0 or not self.log, "low", self.low, "greater than 0 on a logarithmic scale")
        for name, idle in (("log", self.log and not ranged), ("least", self.least != 1 and not self.members)):
            if idle:
                other = "low and high" if name == "log" else "members"
                raise FieldError(name, f"has no meaning without {other}; leave it out.")
        fits = not self.members or 0 <= self.least <= len(self.members)
        require(fits, "least", self.least, f"from 0 to the number of members ({len(self.members)})")

    def typed(self, training: Any) -> SettingConfig:
        """The same with values of the field's type.

        Raises:
          FieldError: the field cannot have one of them, or has no meaning in `training`.
        """
        if self.field.startswith("training.lora.") and training.method != "lora":
            raise FieldError("field", f"is {self.field!r}, which has no meaning for the method {training.method!r}.")
        hint = _hint(type(training), self.field)
        kind = _without_none(hint)
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
        for end in ("low", "high") if self.low is not None else ():
            if kind not in (int, float):
                raise FieldError("field", f"is {self.field!r}, which is no number; give values in place of a range.")
            whole = kind is float or float(getattr(self, end)).is_integer()
            require(whole, end, getattr(self, end), f"a whole number, as {self.field} is")
        if self.members and item is None:
            raise FieldError("field", f"is {self.field!r}, which is no list; give values in place of members.")
        values = tuple(decode(hint, x, f"values.{i}") for i, x in enumerate(self.values))
        members = tuple(decode(item, x, f"members.{i}") for i, x in enumerate(self.members))
        for name, items in (("values", values), ("members", members)):
            if items:
                distinct(name, items)
        require(len(values) != 1, "values", list(self.values), "a list of at least two")
        found = dataclasses.replace(self, values=values, members=members)
        for value in found._extremes(kind):
            try:
                configured(training, {self.field: value})
            except FieldError as error:
                told = f"is {self.field!r}, which cannot be {value!r}: {error.path} {error.reason}"
                raise FieldError("field", told) from None
        return found

    def _extremes(self, kind: Any) -> Iterator[Any]:
        """If any value that a trial may have is invalid, one of these is."""
        yield from self.values
        if self.members:
            yield from (self.members, self.members[: self.least])
        if self.low is not None and self.high is not None:
            # Which whole numbers divide another one, the ends do not tell.
            yield from range(int(self.low), int(self.high) + 1) if kind is int else (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """How much a trial is given: less is cheaper, and says less about the most.

    Attributes:
      field: examples or epochs of a trial.
      levels: ascending; the last is the field's own value, and what is searched for is the best at that one.
      costs: of a trial at each level, in any unit; empty: proportional to the levels.
    """

    field: Literal["budget", "training.epochs"]
    levels: tuple[int, ...]
    costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        good = len(self.levels) > 1 and ascending and self.levels[0] >= 1
        require(good, "levels", list(self.levels), "at least two whole numbers, ascending from at least 1")
        priced = not self.costs or (len(self.costs) == len(self.levels) and min(self.costs) > 0)
        require(priced, "costs", list(self.costs), "a number greater than 0 for each level")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Bounds of the sum of the shares of some domains."""

    domains: tuple[str, ...]
    minimum: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        distinct("domains", self.domains)
        require(0 <= self.minimum <= 1, "minimum", self.minimum, "a share, from 0 to 1")
        require(self.minimum <= self.maximum <= 1, "maximum", self.maximum, "from the minimum to 1")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The outer search.

    Attributes:
      acquisition: upper confidence bound, log expected improvement, or Thompson sampling.
      beta: standard deviations that the upper confidence bound adds to the mean.
      schedule: how beta changes from round to round.
      floor: the share of a domain is 0 or at least this.
      most: at most this many domains take part in a mixture.
      initial: rounds before the surrogate is asked: the uniform mixture, then random ones.
      settings: fields that are searched together with the mixture; their values elsewhere are not used.
      fidelity: of the trials; None: all are alike.
      groups: of domains, each domain in one at most.
      repetition: no domain gives the budget more than this many times the examples that the selector leaves to choose
        from. Where it scores them first, `duet ask` needs a `duet run` before it.
      prior: a mixture by domain name, 0 where none is given, towards which proposals are pulled.
      penalty: how many standard deviations of the feedback a proposal gives up per nat of divergence from it.
    """

    acquisition: Literal["ucb", "log_ei", "thompson"] = "ucb"
    beta: float = 2.0
    schedule: Literal["constant", "growing", "falling"] = "constant"
    floor: float = 0.02
    most: int | None = None
    initial: int = 3
    settings: tuple[SettingConfig, ...] = ()
    fidelity: FidelityConfig | None = None
    groups: tuple[GroupConfig, ...] = ()
    repetition: float | None = None
    prior: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    penalty: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, self, "beta", "penalty")
        require(0 <= self.floor < 1, "floor", self.floor, "in [0, 1)")
        at_least(1, self, "initial")
        require(self.most is None or self.most >= 1, "most", self.most, "at least 1")
        require(self.repetition is None or self.repetition > 0, "repetition", self.repetition, "greater than 0")
        for name, share in self.prior.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            require(number and 0 <= share <= 1, join("prior", name), share, "a share, from 0 to 1")
        total = math.fsum(self.prior.values())
        require(not self.prior or abs(total - 1) <= 1e-6, "prior", f"shares that sum to {total:.6g}", "shares of sum 1")
        if bool(self.prior) != (self.penalty > 0):
            missing, other = ("prior", "penalty") if self.penalty else ("penalty", "prior")
            raise FieldError(missing, f"is missing; search.{other} has no meaning without it.")
        fields = [setting.field for setting in self.settings]
        for i, field in enumerate(fields):
            if field in fields[:i]:
                raise FieldError(f"settings.{i}.field", f"is {field!r} a second time; a field is searched once.")
        if self.fidelity is not None and self.fidelity.field in fields:
            raise FieldError(
                "fidelity.field", f"is {self.fidelity.field!r}, which is among the settings; leave it out."
            )

    def resolved(self, domains: Sequence[str], budget: int, training: Any) -> SearchConfig:
        """The same with settings of their fields' types.

        Raises:
          FieldError: a field, relative to this one, that does not fit the domains, the budget or the training.
        """
        owner: dict[str, int] = {}
        for i, group in enumerate(self.groups):
            for j, name in enumerate(group.domains):
                require(name in domains, f"groups.{i}.domains.{j}", name, f"one of {', '.join(domains)}")
                if owner.setdefault(name, i) != i:
                    raise FieldError(f"groups.{i}.domains.{j}", f"is {name!r}, which is in groups.{owner[name]} too.")
        for name in self.prior:
            require(name in domains, "prior", name, f"shares of {', '.join(domains)}")
        if self.fidelity is not None:
            field, levels = self.fidelity.field, list(self.fidelity.levels)
            own = budget if field == "budget" else training.epochs
            require(levels[-1] == own, "fidelity.levels", levels, f"a list that ends with {field} ({own})")
        settings = []
        for i, setting in enumerate(self.settings):
            try:
                settings.append(setting.typed(training))
            except FieldError as error:
                raise error.inside(f"settings.{i}") from None
        return dataclasses.replace(self, settings=tuple(settings))


def configured(training: Training, settings: Mapping[str, Any]) -> Training:
    """A training configuration with the fields replaced of which a trial has its own values, by dotted path."""
    for field, value in settings.items():
        if field.startswith("training."):
            training = _replaced(training, field.split(".")[1:], value)
    return training


def is_whole(setting: SettingConfig, training: Any) -> bool:
    """Whether the numbers of a setting's field are whole."""
    return _without_none(_hint(type(training), setting.field)) is int


def _hint(cls: Any, field: str) -> Any:
    """Type of a field by dotted path, whose first word stands for `cls`."""
    for name in field.split(".")[1:]:
        cls = typing.get_type_hints(cls)[name]
    return cls


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    (inner,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    return inner


def _replaced(config: Any, names: Sequence[str], value: Any) -> Any:
    inner = _replaced(getattr(config, names[0]), names[1:], value) if names[1:] else value
    return dataclasses.replace(config, **{names[0]: inner})
