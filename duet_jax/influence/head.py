"""Losses of whole sequences from hidden states, with a tap on the LM head.

Logits are made only for labels that count, a chunk of tokens or a block of the vocabulary at a time: the logits of
one example are larger than everything else that is known of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.influence.projections import Blocks, product
from duet_jax.influence.tap import Context, Rule
from duet_jax.kernels.linear_cross_entropy import dot, losses_and_gradients, token_log_probs


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sequence_losses(
    rule: Rule | None,
    chunk: int,
    compute_dtype: Any,
    accumulator: Any,
    context: Context | None,
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array,
) -> Array:
    """`-sum_t weights[b, t] log softmax(hidden[b, t] @ head.T)[labels[b, t]]` of each sequence b.

    Differentiable in `hidden`, and in `accumulator`: its derivative is what `rule` makes of the head's gradients,
    `[V, D]` for each sequence.

    Args:
      rule: None for no tap; then `accumulator` and `context` are None as well.
      chunk: tokens that meet the vocabulary at a time.
      compute_dtype: dtype of the factors; products accumulate in float32.
      accumulator: tree of `rule.zeros`.
      context: of the head.
      hidden: `[B, T, D]`.
      head: `[V, D]`.
      labels: int32 `[B, T]`.
      weights: float32 `[B, T]`; tokens of weight 0 cost nothing.

    Returns:
      float32 `[B]`.
    """
    del rule, accumulator, context
    flat = hidden.reshape(-1, hidden.shape[-1])
    log_probs = token_log_probs(
        flat, head, labels.reshape(-1), weights.reshape(-1) != 0, chunk=chunk, compute_dtype=compute_dtype
    )
    return -jnp.sum(weights * log_probs.reshape(weights.shape), axis=1)


def _forward(
    rule: Rule | None,
    chunk: int,
    compute_dtype: Any,
    accumulator: Any,
    context: Context | None,
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array,
) -> tuple[Array, tuple]:
    """Losses and their gradients in one pass over the logits: a cotangent only scales a sequence's gradient."""
    del accumulator
    shape = weights.shape
    losses, normalisers, gradients, _ = losses_and_gradients(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        labels.reshape(-1),
        weights.reshape(-1),
        chunk,
        compute_dtype,
        of_head=False,
    )
    kept = None if rule is None else (context, hidden, head, labels, weights, normalisers.reshape(shape))
    return jnp.sum(losses.reshape(shape), axis=1), (gradients.reshape(hidden.shape), kept)


def _backward(rule: Rule | None, chunk: int, compute_dtype: Any, kept: tuple, cotangent: Array) -> tuple:
    gradients, of_head = kept
    found = None
    if rule is not None:
        context, hidden, head, labels, weights, normalisers = of_head
        source = _head_gradients(chunk, compute_dtype, hidden, head, labels, weights * cotangent[:, None], normalisers)
        found = rule.of_blocks("head", context, head.shape[0], head.shape[1], hidden.shape[0], source)
    hidden_gradient = (gradients * cotangent[:, None, None]).astype(gradients.dtype)
    return found, None, hidden_gradient, None, None, None


def _head_gradients(
    chunk: int, dtype: Any, hidden: Array, head: Array, labels: Array, weights: Array, normalisers: Array
) -> Callable[[Blocks], Callable[[Any], Array]]:
    """Each sequence's gradient of rows of the head: logits of a block of the vocabulary are made again."""
    length = weights.shape[1]
    chunk = min(chunk, length)
    # Sequences have different numbers of labels; sorted to the front, the loop over tokens ends after the longest.
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def in_order(array: Array) -> Array:
        index = order.reshape(*order.shape, *[1] * (array.ndim - 2))
        moved = jnp.take_along_axis(array, index, axis=1)
        return jnp.pad(moved, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (array.ndim - 2))

    # The normaliser of a token without weight was not computed; infinite, it makes its error 0.
    normalisers = jnp.where(weights == 0, jnp.inf, normalisers)
    parts = tuple(in_order(x) for x in (hidden.astype(dtype), labels, weights, normalisers))
    used = (jnp.max(jnp.count_nonzero(weights, axis=1)) + chunk - 1) // chunk

    def source(plan: Blocks) -> Callable[[Any], Array]:
        padded = plan.pad(head, 0)

        def block(first: Any) -> Array:
            here = plan.take(padded, first, 0).astype(dtype)
            tokens = first + jnp.arange(plan.size)

            def add(i: Array, total: Array) -> Array:
                x, label, weight, normaliser = (
                    jax.lax.dynamic_slice_in_dim(part, i * chunk, chunk, 1) for part in parts
                )
                logits = dot(x, here, (2, 1), dtype)
                error = jnp.exp(logits - normaliser[..., None]) - (tokens == label[..., None])
                error = jnp.where(tokens < plan.rows, error * weight[..., None], 0.0)
                return total + product(error.astype(dtype), x)

            zeros = jnp.zeros((hidden.shape[0], plan.size, plan.cols), jnp.float32)
            return jax.lax.fori_loop(0, used, add, zeros)

        return block

    return source


sequence_losses.defvjp(_forward, _backward)
