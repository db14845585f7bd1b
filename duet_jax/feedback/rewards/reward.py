"""What a reward is: a checked function of replies and the examples that they answer."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from duet_jax.data import Example
from duet_jax.errors import FeedbackError

Function = Callable[[Sequence[str], Sequence[Example]], Sequence[float]]


def accept(example: Example) -> None:
    """The `requires` of a reward that any example will do for."""


def references(example: Example) -> tuple[str, ...]:
    """The texts that a reply is compared with: the accepted answers, or else the response."""
    return example.answers or (example.response,)


def code_digest(*modules: ModuleType) -> str:
    """A hash of modules' source, hexadecimal: values that were kept are not those of other code."""
    sources = b"\0".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(sources).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Reward:
    """How good replies are; higher is better. It need not be differentiable.

    Attributes:
      name: for messages.
      low, high: the range that its values are declared to lie in, ends included; may be infinite.
      needs_label: whether it compares replies with the example's answers or response, which then must be there.
      identity: text of all that decides its values; part of every cache key.
      function: replies and their examples in, one finite number for each out, in their order.
      requires: raises a DuetError about an example that the reward cannot be computed for; what it returns is not used.
    """

    name: str
    low: float
    high: float
    needs_label: bool
    identity: str
    function: Function
    requires: Callable[[Example], object] = accept

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise FeedbackError(
                f"The reward {self.name} has the range [{self.low}, {self.high}]; low must be less than high."
            )

    def check(self, examples: Sequence[Example]) -> None:
        """Whether replies to these examples can be judged: worth knowing before any reply is written.

        Raises:
          FeedbackError: an example lacks a label that this reward needs.
          DuetError: an example lacks something else, by `requires`.
        """
        for example in examples:
            if self.needs_label and not (example.response or example.answers):
                raise FeedbackError(
                    f"The reward {self.name} compares replies with the right answer, but example {example.id} has "
                    f"neither a response nor answers; give it one, or use a reward that needs no label."
                )
            self.requires(example)

    def __call__(self, replies: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """Values of replies, float64 `[n]`.

        Args:
          replies: n texts.
          examples: what each of them answers, n.

        Raises:
          FeedbackError: the numbers of replies, examples and values differ, or a value is no finite number in the
            declared range.
          DuetError: an example is not as `check` wants it.
        """
        if len(replies) != len(examples):
            raise FeedbackError(
                f"The reward {self.name} was given {len(replies)} replies and {len(examples)} examples; "
                f"it needs one example for each reply."
            )
        self.check(examples)
        values = self.function(replies, examples)
        if len(values) != len(replies):
            raise FeedbackError(
                f"The reward {self.name} gave {len(values)} values for {len(replies)} replies; it must give one each."
            )
        return np.array([self._number(value, example) for value, example in zip(values, examples, strict=True)], float)

    def _number(self, value: float, example: Example) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and self.low <= number <= self.high):
            raise FeedbackError(
                f"The reward {self.name} gave {value!r} for a reply to example {example.id}; "
                f"it must give a finite number in [{self.low}, {self.high}]."
            )
        return number


def of_parts(parts: Sequence[tuple[Reward, Sequence[Example]]]) -> Reward:
    """One reward for several sets of examples that have each their own; it knows no other examples than these.

    Args:
      parts: rewards, and the examples that each is for, which are known as objects: ids are unique within a set alone.
    """
    owners = {id(example): number for number, (_, examples) in enumerate(parts) for example in examples}

    def function(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        owner = np.array([owners[id(example)] for example in examples])
        found = np.empty(len(replies))
        for number, (reward, _) in enumerate(parts):
            rows = np.flatnonzero(owner == number).tolist()
            if rows:
                found[rows] = reward([replies[row] for row in rows], [examples[row] for row in rows])
        return found.tolist()

    return Reward(
        name=" and ".join(dict.fromkeys(reward.name for reward, _ in parts)),
        low=min(reward.low for reward, _ in parts),
        high=max(reward.high for reward, _ in parts),
        needs_label=False,  # Those that do say so themselves.
        identity="; ".join(f"{len(examples)} by {reward.identity}" for reward, examples in parts),
        function=function,
    )
