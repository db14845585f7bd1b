"""What a training tells of itself: a line a step, and how it went."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, on the host.

    `tokens` counts the prompt and response tokens it trained on, and `flops` the model FLOPs they need. `seconds` are
    since this process began the training, `step_seconds` since the step before was finished, or since that beginning;
    `devices` took part. `score` is the mean of what online selection chose its examples by, None without it.
    """

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    step_seconds: float
    flops: float
    devices: int
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
      trainable: LoRA factors or all parameters.
      steps: number of optimiser steps.
      tokens: prompt and response tokens trained on, all epochs, padding not counted.
      loss: mean training loss per response token over the whole run, nats.
      seconds: wall time in this process; a resumed run counts from its checkpoint.
    """

    trainable: Any
    steps: int
    tokens: int
    loss: float
    seconds: float
