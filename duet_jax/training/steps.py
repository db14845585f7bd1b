"""What every training here shares: its state, gradients in micro-batches, the update, and the loop over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from duet_jax.data import plan_batches
from duet_jax.distributed.place import constrain, spread
from duet_jax.distributed.processes import Stopped, deferring, stopping
from duet_jax.models import llama
from duet_jax.models.lora import Lora
from duet_jax.training.optimiser import adam


class TrainState(NamedTuple):
    """What a step changes: LoRA factors or all parameters, float32, and the optimiser's moments."""

    trainable: Any
    optimiser: optax.OptState


class Dials(NamedTuple):
    """Settings that a step takes as numbers: none of their values is a program of its own.

    Attributes:
      clip_norm, weight_decay: scalars.
      scale: float32 `[layers]`, of the adapters' products, 0 in layers without adapters; None if all is trained.
      dropout: probability that an input of an adapter is dropped.
    """

    clip_norm: Any
    weight_decay: Any
    scale: Any
    dropout: Any


def network(trainable: Any, base: llama.Params | None, dials: Dials) -> tuple[llama.Params, Lora | None]:
    """Parameters and adapters (or None), of which one is trained."""
    return (trainable, None) if base is None else (base, Lora(trainable, dials.scale, dials.dropout))


def plan_epochs(
    lengths: np.ndarray, buckets: Sequence[int], batch_size: int, epochs: int, seed: int
) -> list[tuple[int, np.ndarray]]:
    """The batches of all epochs in order, as (bucket length, rows); a pure function of its input."""
    generators = (np.random.default_rng([seed, epoch]) for epoch in range(epochs))
    return [batch for rng in generators for batch in plan_batches(lengths, buckets, batch_size, rng=rng)]


def accumulate(
    differentiate: Callable[..., tuple[Any, Any]],
    trainable: Any,
    arrays: tuple[Array, ...],
    key: Array,
    size: int,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Values and the sum of the gradients of `size` rows at a time.

    Args:
      differentiate: `(trainable, *rows of the arrays, key) -> (values, gradient)`.
      trainable: what is differentiated for.
      arrays: `[rows, ...]` each, rows a multiple of `size`.
      key: split over the micro-batches.
      size: rows of a micro-batch.
      mesh: every micro-batch is spread over all its devices, gradients lie as what they are of; None for one device.

    Returns:
      The values with a leading axis of micro-batches, and the gradient.
    """
    rows = arrays[0].shape[0]
    if size == rows:
        values, gradient = differentiate(trainable, *spread(mesh, arrays), key)
        return jax.tree.map(lambda x: x[None], values), gradient

    def add(total: Any, part: tuple) -> tuple[Any, Any]:
        values, gradient = differentiate(trainable, *part)
        return jax.tree.map(jnp.add, total, gradient), values

    parts = spread(mesh, tuple(x.reshape(rows // size, size, *x.shape[1:]) for x in arrays), at=1)
    start = constrain(mesh, jax.tree.map(jnp.zeros_like, trainable))
    gradient, values = jax.lax.scan(add, start, (*parts, jax.random.split(key, rows // size)))
    return values, gradient


def update(state: TrainState, gradient: Any, dials: Dials, rate: Array) -> tuple[TrainState, Array]:
    """The state after one step of clipped AdamW, and the gradient's norm before clipping."""
    norm = optax.tree.norm(gradient)
    rule = adam(dials.clip_norm, dials.weight_decay)
    change, optimiser = rule.update(gradient, state.optimiser, state.trainable)
    trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, change)
    return TrainState(trainable, optimiser), norm


def drive(
    state: TrainState,
    done: int,
    steps: int,
    every: int,
    *,
    advance: Callable[[int, TrainState], tuple[TrainState, Any]],
    finish: Callable[[int, Any], None],
    after: Callable[[int, TrainState], None],
    save: Callable[[int, TrainState], None] | None,
) -> TrainState:
    """Takes the steps that are missing; the device never waits for the host to read a step's metrics.

    Told to stop, it ends after the step it is at, which then has a checkpoint like the last one.

    Args:
      state: after `done` of `steps` steps.
      every: steps between checkpoints; there is one after the last step, too.
      advance: dispatches the step of a number, from 0; gives the new state and metrics on the device.
      finish: reads the metrics of the step of that number, when the next one is under way or before a checkpoint.
      after: is given the number of steps done and the state, which the next step takes over.
      save: writes a checkpoint of the same; None: there are none.

    Raises:
      Stopped: by SIGTERM, see `distributed.processes`.
    """
    last: tuple[int, Any] | None = None
    with deferring():
        for number in range(done, steps):
            state, metrics = advance(number, state)
            if last is not None:
                finish(*last)
            last = number, metrics
            after(number + 1, state)
            stop = stopping()
            if stop or number + 1 == steps or (save is not None and (number + 1) % every == 0):
                finish(*last)
                last = None
                if save is not None:
                    save(number + 1, state)
            if stop:
                raise Stopped
    return state
