"""Losses of preference optimisation as functions of log-probabilities, and what is measured of a model by them.

Everywhere `log_probs` and `reference` are `[n, 2]`, nats: summed log-probabilities of the chosen (0) and the rejected
(1) responses of n pairs with their ends of text, under the model and under the reference.

The three losses are functions of implicit rewards, beta times the log-ratio to the reference; of DavIR-DPO beta times
the log-ratio over |log pi_ref| (arXiv 2310.13008, section on DPO). One nat of log-ratio is then worth
beta / |log pi_ref|: a beta that is to be as strong as DPO's must be larger by the mean of |log pi_ref|.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from duet_jax.config import PreferenceLoss


def rewards(config: PreferenceLoss, log_probs: Array | np.ndarray, reference: Array | np.ndarray) -> Array:
    """Implicit rewards of the responses, float32 `[n, 2]`."""
    ratios = jnp.asarray(log_probs) - jnp.asarray(reference)
    if config.kind == "davir_dpo":
        ratios = ratios / jnp.maximum(jnp.abs(reference), config.eps)
    return config.beta * ratios


def losses(config: PreferenceLoss, log_probs: Array | np.ndarray, reference: Array | np.ndarray) -> Array:
    """Loss of each pair, float32 `[n]`; see `PreferenceLoss`."""
    found = rewards(config, log_probs, reference)
    margins = found[:, 0] - found[:, 1]
    if config.kind == "ipo":
        return jnp.square(margins / config.beta - 1 / (2 * config.beta))
    return jax.nn.softplus(-margins)


def effective_beta(config: PreferenceLoss, reference: np.ndarray) -> float:
    """Reward of a nat of log-ratio, of "davir_dpo" at the mean |log pi_ref| of all responses."""
    if config.kind != "davir_dpo":
        return config.beta
    return config.beta / max(float(np.abs(reference).mean()), config.eps)


def measure(
    config: PreferenceLoss, log_probs: np.ndarray, reference: np.ndarray, tokens: np.ndarray
) -> dict[str, float | None]:
    """How a model does on pairs, as means over them.

    Args:
      config: the loss.
      log_probs, reference: see above; at least one pair.
      tokens: int64 `[n, 2]`, scored tokens of the responses.

    Returns:
      loss;
      chosen_reward, rejected_reward and their difference, the margin, in units of the implicit reward;
      accuracy, the share of pairs whose chosen response has the greater reward;
      reward_length, Pearson's correlation of reward and length over all responses, and
      margin_length, that of the differences of a pair's two; None where one of both is constant.
    """
    found = np.asarray(rewards(config, log_probs, reference), np.float64)
    margins = found[:, 0] - found[:, 1]
    return {
        "loss": float(np.asarray(losses(config, log_probs, reference), np.float64).mean()),
        "margin": float(margins.mean()),
        "accuracy": float((margins > 0).mean()),
        "chosen_reward": float(found[:, 0].mean()),
        "rejected_reward": float(found[:, 1].mean()),
        "reward_length": correlation(found.ravel(), tokens.ravel()),
        "margin_length": correlation(margins, tokens[:, 0] - tokens[:, 1]),
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays `[n]`; None where there is none."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
