"""What of a training's settings is compiled, and what is an argument: the rule of the optimiser and its rates."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

if TYPE_CHECKING:
    from duet_jax.config import TrainingConfig


def program_of(settings: TrainingConfig) -> TrainingConfig:
    """What of the settings is compiled: equal for trainings that share their programs, see `Trainer.retuned`."""
    lora = dataclasses.replace(settings.lora, alpha=1.0, layers=None, dropout=0.5 * (settings.lora.dropout > 0))
    online = settings.online and dataclasses.replace(settings.online, reference=None)
    return dataclasses.replace(
        settings,
        learning_rate=1.0,
        epochs=1,
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.0,
        clip_norm=1.0,
        checkpoint_every=1,
        lora=lora,
        online=online,
    )


def adam(clip_norm: Any, weight_decay: Any) -> optax.GradientTransformation:
    """AdamW's direction after clipping; the learning rate is left to the caller. Both numbers may be traced."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=_decays),
    )


def learning_rates(settings: TrainingConfig, steps: int) -> np.ndarray:
    """Learning rate of each step, float32 `[steps]`.

    A linear rise over the first `warmup_fraction` of the steps, then a constant, a line to 0 or a half cosine
    to 0. Computed on the host, so that a round with another number of steps compiles nothing.
    """
    warmup = math.ceil(settings.warmup_fraction * steps)
    number = np.arange(steps)
    rise = (number + 1) / max(warmup, 1)
    progress = (number - warmup) / max(steps - warmup, 1)
    fall = {
        "constant": np.ones(steps),
        "linear": 1 - progress,
        "cosine": (1 + np.cos(np.pi * progress)) / 2,
    }[settings.schedule]
    return (settings.learning_rate * np.where(number < warmup, rise, fall)).astype(np.float32)


def _decays(trainable: Any) -> Any:
    """True for matrices; norms and biases are not pulled to zero."""
    leaves = ("kernel", "embedding", "head", "a", "b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in leaves, trainable)
