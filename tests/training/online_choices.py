"""Rules of online batch selection, what the steps of a trainer choose by them, and losses to compare that with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax.config import OnlineConfig
from duet_jax.data import Encoded, gather_batch
from duet_jax.models import llama
from duet_jax.training import online
from duet_jax.training.sft import Trainer

RHO, DAVIR = OnlineConfig(rule="rho", candidates=8), OnlineConfig(rule="davir", candidates=8)


def watched(subject: Trainer, epochs: int = 1) -> tuple[Trainer, list[online.Choice]]:
    """The same trainer, and what its steps will have chosen."""
    other = subject.retuned(dataclasses.replace(subject.settings, epochs=epochs))
    choices: list[online.Choice] = []

    def watch(*args: Any) -> tuple[Any, Any]:
        state, metrics = subject.step(*args)
        choices.append(jax.device_get(metrics.choice))
        return state, metrics

    object.__setattr__(other, "step", watch)
    return other, choices


def dense_losses(model: llama.LlamaConfig, params: llama.Params, data: Encoded) -> np.ndarray:
    """Summed losses of the responses, by softmax over whole sequences."""
    batch = gather_batch(data, np.arange(len(data)), int(max(data.lengths)), len(data), 0)

    @jax.jit
    def losses(params: llama.Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logits = llama.hidden_states(model, params, tokens)[:, :-1] @ llama.output_head(params).T
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
        return -jnp.sum(log_probs, axis=1, where=mask[:, 1:])

    return np.asarray(losses(params, batch.tokens, batch.loss_mask))
