"""The part of a configuration that says how good a reply is."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, require

RewardKind = Literal[
    "exact_match",
    "token_f1",
    "rouge_l",
    "regex",
    "length",
    "numeric",
    "multiple_choice",
    "unit_tests",
    "reward_model",
    "judge",
    "python",
]

# The fields that a kind of reward uses besides `kind`; any other must be left at its default.
_MODEL = {"model", "dtype", "batch_size"}
_FIELDS: dict[str, set[str]] = {
    "exact_match": set(),
    "token_f1": set(),
    "rouge_l": set(),
    "regex": {"pattern", "where"},
    "length": {"unit", "minimum", "maximum"},
    "numeric": {"tolerance"},
    "multiple_choice": set(),
    "unit_tests": {"seconds", "memory_mb", "unsafe"},
    "reward_model": _MODEL,
    "judge": _MODEL | {"reference"},
    "python": {"function", "low", "high", "needs_label", "workers"},
}
_NEEDS = {"regex": "pattern", "reward_model": "model", "judge": "model", "python": "function"}


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How good a reply is; higher is better. Built by `duet_jax.feedback.rewards.build_reward`.

    Attributes:
      kind: what is rewarded.
      pattern: regular expression of Python's `re`; (?i), (?s) and the like at its beginning set flags.
      where: whether it must match the whole reply, or anywhere in it.
      unit, minimum, maximum: the length that a reply should have; `maximum` None: no matter how long.
      tolerance: of a number, as a share of the right one.
      seconds, memory_mb: processor time and memory that a reply's program may use; it may take five times as long.
      unsafe: runs programs also where this machine cannot isolate them.
      model: folder of a reward model; of a judge, as `model.source`.
      dtype: of the model's matrix products.
      batch_size: replies in a forward pass.
      reference: whether a judge compares a reply with the example's response, or grades it alone.
      function: "module:callable" that is called with a reply and its example and returns a number.
      low, high: the range that these numbers lie in; None: no bound.
      needs_label: whether the function reads the example's response or answers.
      workers: threads that call the function; more than 1 pays where it waits for something, such as a server.
    """

    kind: RewardKind
    pattern: str | None = None
    where: Literal["whole", "anywhere"] = "whole"
    unit: Literal["words", "characters"] = "words"
    minimum: int = 0
    maximum: int | None = None
    tolerance: float = 0.0
    seconds: int = 3
    memory_mb: int = 512
    unsafe: bool = False
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 8
    reference: bool = True
    function: str | None = None
    low: float | None = None
    high: float | None = None
    needs_label: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        used = _FIELDS[self.kind] | {"kind"}
        for each in dataclasses.fields(self):
            if each.name not in used and getattr(self, each.name) != each.default:
                raise FieldError(each.name, f"has no meaning for a reward of kind {self.kind!r}; leave it out.")
        needed = _NEEDS.get(self.kind)
        if needed is not None and not getattr(self, needed):
            raise FieldError(needed, f"is missing; a reward of kind {self.kind!r} needs it.")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise FieldError("pattern", f"is {self.pattern!r}, no regular expression: {error}.") from None
        if self.function is not None:
            named = re.fullmatch(r"[\w.]+:\w+", self.function) is not None
            require(named, "function", self.function, "of the form module:callable")
        if self.kind == "length":
            bounded = self.minimum > 0 or self.maximum is not None
            require(bounded, "minimum", self.minimum, "greater than 0 where there is no maximum")
        at_least(0, self, "minimum", "tolerance")
        if self.maximum is not None:
            at_least(max(self.minimum, 1), self, "maximum")
        at_least(1, self, "seconds", "batch_size", "workers")
        at_least(64, self, "memory_mb")  # Python itself needs about half of it
        if self.low is not None and self.high is not None:
            require(self.low < self.high, "high", self.high, f"greater than low ({self.low})")
