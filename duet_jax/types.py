"""Values that several folders pass to one another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from duet_jax.errors import FeedbackError


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What the unseen task answered about one deployed model.

    Attributes:
      value: higher is better.
      stderr: standard error of `value`, in its units, if known.
      details: further numbers worth keeping, by name.

    Raises:
      FeedbackError: a number is not finite, or the standard error is negative.
    """

    value: float
    stderr: float | None = None
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise FeedbackError(f"The feedback is {self.value}; it must be a finite number, higher is better.")
        if self.stderr is not None and not (math.isfinite(self.stderr) and self.stderr >= 0):
            raise FeedbackError(
                f"The standard error of the feedback is {self.stderr}; it must be finite and not negative."
            )
