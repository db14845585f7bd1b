"""Differentiable log-probabilities of labels, for losses that weigh them by functions of themselves.

`linear_cross_entropy` knows what each token counts and makes its gradients in the forward pass. A preference loss knows
it only when both responses of a pair are summed up. But all that is missing then is one factor a token. So while the
head is frozen, as under LoRA, the forward pass makes the gradient of each token's log-probability for its hidden state
(2 products of `chunk x D x V`) and the backward pass scales it: nothing is computed twice. When the head is trained its
gradient adds tokens up, so the factors come first: 1 product forward and 3 backward, one more than with known weights.
A second pass through the layers, in place of either, would cost a third of the whole step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.linear_cross_entropy import losses_and_gradients, token_log_probs
from jax import Array


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_log_probs(
    hidden: Array, head: Array, labels: Array, mask: Array, chunk: int = 256, compute_dtype: Any = jnp.float32
) -> Array:
    """`log softmax(hidden[t] @ head.T)[labels[t]]` of each row, differentiable in `hidden` and `head`.

    Args:
      hidden: `[N, D]`.
      head: `[V, D]`.
      labels: int32 `[N]`.
      mask: bool `[N]`; rows that are False cost nothing.
      chunk: rows that meet the vocabulary at a time.
      compute_dtype: dtype of the factors; products accumulate in float32.

    Returns:
      float32 `[N]`, 0 where `mask` is False.
    """
    return token_log_probs(hidden, head, labels, mask, chunk=chunk, compute_dtype=compute_dtype)


def _forward(hidden: Any, head: Any, labels: Any, mask: Any, chunk: int, compute_dtype: Any) -> tuple[Array, tuple]:
    arguments = hidden.value, head.value, labels.value
    if head.perturbed:
        found = token_log_probs(*arguments, mask.value, chunk=chunk, compute_dtype=compute_dtype)
        return found, (None, (*arguments, mask.value))
    weights = mask.value.astype(jnp.float32)
    losses, _, gradient, _ = losses_and_gradients(*arguments, weights, chunk, compute_dtype, of_head=False)
    return -losses, (gradient, None)


def _backward(chunk: int, compute_dtype: Any, kept: tuple, factors: Array) -> tuple:
    gradient, arguments = kept
    if gradient is not None:
        return (-factors[:, None] * gradient).astype(gradient.dtype), None, None, None
    hidden, head, labels, mask = arguments
    weights = jnp.where(mask, -factors, 0.0)
    _, _, gradient, of_head = losses_and_gradients(hidden, head, labels, weights, chunk, compute_dtype, of_head=True)
    return gradient, of_head.astype(head.dtype), None, None


linear_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)
