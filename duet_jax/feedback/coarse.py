"""Makes feedback worse on purpose: noisier, and rounded to a few stars, as a deployed system would hear it."""

from __future__ import annotations

import dataclasses

import numpy as np

from duet_jax.types import Feedback


@dataclasses.dataclass(frozen=True)
class Coarse:
    """The setting of DUET (arXiv 2502.00270, section 1): a search hears little of what a task measured.

    Attributes:
      noise: standard deviation of Gaussian noise that is added first, in the task's units.
      stars: number of grades, 1 the worst; None does not round.
      low: value of one star. Values below count as one star.
      high: value of the highest grade. Values above count as it.
    """

    noise: float = 0.0
    stars: int | None = None
    low: float = 0.0
    high: float = 1.0

    def __call__(self, feedback: Feedback, seed: int) -> Feedback:
        """The worse feedback; the same seed gives the same noise. What was measured stays in `details`.

        Stars have no standard error: the rounding error is not a sampling error.
        """
        if self.noise == 0 and self.stars is None:
            return feedback
        value, stderr = feedback.value, feedback.stderr
        if self.noise:
            value += self.noise * float(np.random.default_rng(seed).standard_normal())
            stderr = float(np.hypot(stderr or 0.0, self.noise))
        if self.stars is not None:
            share = (value - self.low) / (self.high - self.low)
            value = float(np.clip(np.rint(1 + share * (self.stars - 1)), 1, self.stars))
            stderr = None
        return Feedback(value, stderr, {**feedback.details, "measured": feedback.value})
