"""Token log-probabilities and cross-entropy straight from hidden states, without `[tokens, vocab]` logits.

The vocabulary projection is most of a small model's memory and a fifth of its arithmetic. Here tokens without
weight are sorted out first, the rest go through the vocabulary `chunk` at a time, and the loss computes its own
gradients in the same pass (they are linear in the weights, which are known), so nothing is computed twice.

Plain JAX by default on all platforms. `linear_cross_entropy_pallas` holds kernels for TPUs and counts the arithmetic
of both; no TPU has run them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.dispatch import Implementation, runs_kernel
from jax import Array


def _kernels() -> Any:
    """The module of the kernels, where they are asked for: Pallas takes long to import."""
    from duet_jax.kernels import linear_cross_entropy_pallas

    return linear_cross_entropy_pallas


def dot(x: Array, y: Array, axes: tuple[int, int], dtype: Any) -> Array:
    """Contract one axis of each of two matrices, factors in `dtype`, float32 out."""
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _weighted_first(hidden: Array, labels: Array, weights: Array, chunk: int) -> tuple:
    """Rows with weight in front, padded to whole chunks; also their order and the number of chunks in use."""
    padding = -hidden.shape[0] % chunk
    order = jnp.argsort(weights == 0, stable=True)
    hidden, labels, weights = (
        jnp.pad(x[order], [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, labels, weights)
    )
    used = jnp.count_nonzero(weights)
    return hidden, labels, weights, order, (used + chunk - 1) // chunk


def _chunk_log_probs(hidden: Array, head: Array, labels: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """Label log-probabilities `[chunk]`, logits `[chunk, vocab]` and their log-sum-exp `[chunk]`."""
    logits = dot(hidden, head, (1, 1), dtype)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return chosen - log_normaliser, logits, log_normaliser


def token_log_probs(
    hidden: Array,
    head: Array,
    labels: Array,
    mask: Array,
    *,
    chunk: int = 256,
    compute_dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
) -> Array:
    """Log-probability of each label; forward only, not differentiable.

    Args:
      hidden: `[N, D]` final hidden states.
      head: `[V, D]` output rows.
      labels: int32 `[N]`.
      mask: bool `[N]`; rows that are False are not computed.
      chunk: rows that meet the vocabulary at a time; `chunk * V` float32 values is the working memory. A kernel
        chooses both itself.
      compute_dtype: dtype of the factors; products accumulate in float32.
      implementation: None for the default, plain JAX.

    Returns:
      float32 `[N]`, 0 where `mask` is False.
    """
    count = hidden.shape[0]
    kernel = runs_kernel(implementation)
    chunk = _kernels().block_of_tokens(*hidden.shape, compute_dtype) if kernel else chunk
    hidden, labels, weights, order, chunks = _weighted_first(hidden, labels, mask.astype(jnp.float32), chunk)

    def body(i: Array, out: Array) -> Array:
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        log_probs, _, _ = _chunk_log_probs(rows(hidden), head, rows(labels), compute_dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, log_probs * rows(weights), i * chunk, 0)

    if kernel:
        factors = hidden.astype(compute_dtype), head.astype(compute_dtype)
        ordered = weights * _kernels().token_statistics(*factors, labels, weights, chunks * chunk)[0]
    else:
        ordered = jax.lax.fori_loop(0, chunks, body, jnp.zeros(hidden.shape[0], jnp.float32))
    return jnp.zeros(count, jnp.float32).at[order].set(ordered[:count])


def response_log_probs(hidden: Array, head: Array, tokens: Array, mask: Array, compute_dtype: Any) -> Array:
    """Summed log-probability of the scored tokens of each sequence, float32 `[B]`; forward only.

    Args:
      hidden: `[B, T, D]` final hidden states.
      head: `[V, D]` output rows.
      tokens: int32 `[B, T]`.
      mask: bool `[B, T]`, the tokens that are scored; the first of a sequence never is.
      compute_dtype: as for `token_log_probs`.
    """
    log_probs = token_log_probs(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]),
        head,
        tokens[:, 1:].reshape(-1),
        mask[:, 1:].reshape(-1),
        compute_dtype=compute_dtype,
    )
    return jnp.sum(log_probs.reshape(mask[:, 1:].shape), axis=1)


def token_predictions(
    hidden: Array, head: Array, labels: Array, mask: Array, *, chunk: int = 256, compute_dtype: Any = jnp.float32
) -> tuple[Array, Array]:
    """Log-probability of each label, and whether no other token is likelier; forward only, in plain JAX.

    Args:
      hidden, head, labels, mask, chunk, compute_dtype: as for `token_log_probs`.

    Returns:
      float32 `[N]`, 0 where `mask` is False, and bool `[N]`, True there. Of equally likely tokens the first counts.
    """
    count = hidden.shape[0]
    hidden, labels, weights, order, chunks = _weighted_first(hidden, labels, mask.astype(jnp.float32), chunk)

    def body(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        log_probs, logits, _ = _chunk_log_probs(rows(hidden), head, rows(labels), compute_dtype)
        best = (jnp.argmax(logits, axis=-1) == rows(labels)) | (rows(weights) == 0)
        return put(found[0], log_probs * rows(weights)), put(found[1], best)

    nothing = jnp.zeros(hidden.shape[0], jnp.float32), jnp.ones(hidden.shape[0], jnp.bool_)
    log_probs, best = (x[:count] for x in jax.lax.fori_loop(0, chunks, body, nothing))
    return jnp.zeros(count, jnp.float32).at[order].set(log_probs), jnp.ones(count, jnp.bool_).at[order].set(best)


def token_error_norms(
    hidden: Array, head: Array, labels: Array, mask: Array, *, chunk: int = 256, compute_dtype: Any = jnp.float32
) -> Array:
    """Euclidean norm of each token's predicted distribution less the one-hot of its label; forward only, plain JAX.

    Args:
      hidden, head, labels, mask, chunk, compute_dtype: as for `token_log_probs`.

    Returns:
      float32 `[N]` in [0, sqrt(2)], 0 where `mask` is False.
    """
    count = hidden.shape[0]
    hidden, labels, weights, order, chunks = _weighted_first(hidden, labels, mask.astype(jnp.float32), chunk)

    def body(i: Array, out: Array) -> Array:
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        _, logits, log_normaliser = _chunk_log_probs(rows(hidden), head, rows(labels), compute_dtype)
        # 1 - p of the label is the sum of the others, which does not cancel as sum p^2 - 2 p + 1 does near p = 1.
        is_label = jnp.arange(head.shape[0])[None, :] == rows(labels)[:, None]
        others = jnp.where(is_label, 0.0, jnp.exp(logits - log_normaliser[:, None]))
        norms = jnp.sqrt(jnp.square(jnp.sum(others, axis=1)) + jnp.sum(jnp.square(others), axis=1))
        return jax.lax.dynamic_update_slice_in_dim(out, norms * rows(weights), i * chunk, 0)

    ordered = jax.lax.fori_loop(0, chunks, body, jnp.zeros(hidden.shape[0], jnp.float32))
    return jnp.zeros(count, jnp.float32).at[order].set(ordered[:count])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array,
    chunk: int = 256,
    compute_dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
) -> Array:
    """`-sum_t weights[t] * log softmax(hidden[t] @ head.T)[labels[t]]`.

    Differentiable in `hidden` and `head` (not in `weights`). The gradients are made in the forward pass, chunk
    by chunk: 2 products of size `chunk x D x V` when only `hidden` needs one, 3 when `head` does too.

    Args:
      hidden: `[N, D]`.
      head: `[V, D]`.
      labels: int32 `[N]`.
      weights: float32 `[N]`; rows of weight 0 cost nothing.
      chunk: rows that meet the vocabulary at a time.
      compute_dtype: dtype of the factors; products accumulate in float32.
      implementation: None for the default, plain JAX.

    Returns:
      float32 scalar.
    """
    log_probs = token_log_probs(
        hidden, head, labels, weights != 0, chunk=chunk, compute_dtype=compute_dtype, implementation=implementation
    )
    return -jnp.sum(weights * log_probs)


def losses_and_gradients(
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array,
    chunk: int,
    compute_dtype: Any,
    *,
    of_head: bool,
    implementation: Implementation | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Each token's weighted loss, and the gradients of their sum, in one pass over the logits.

    Args:
      hidden, head, labels, weights, chunk, compute_dtype, implementation: as for `linear_cross_entropy`.
      of_head: whether the head's gradient is wanted.

    Returns:
      Losses float32 `[N]`, log-sum-exps of the logits float32 `[N]` (any number in rows of weight 0), the gradient
      `[N, D]` of `hidden` in its dtype, and that of the head, float32 `[V, D]`, or a scalar 0.
    """
    count = hidden.shape[0]
    kernel = runs_kernel(implementation)
    chunk = _kernels().block_of_tokens(*hidden.shape, compute_dtype) if kernel else chunk
    *rows, order, chunks = _weighted_first(hidden, labels, weights, chunk)
    compute = _by_kernel if kernel else _by_chunks
    *found, of_head_found = compute(rows[0], head, rows[1], rows[2], chunk, chunks, compute_dtype, of_head)
    losses, normalisers, hidden_gradient = (jnp.zeros_like(x[:count]).at[order].set(x[:count]) for x in found)
    return losses, normalisers, hidden_gradient, of_head_found


def _by_chunks(
    hidden: Array, head: Array, labels: Array, weights: Array, chunk: int, chunks: Array, dtype: Any, of_head: bool
) -> tuple[Array, Array, Array, Array]:
    """What `losses_and_gradients` returns of the first `chunks` chunks."""

    def body(i: Array, carry: tuple) -> tuple:
        losses, normalisers, hidden_gradient, head_gradient = carry
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        x, label, weight = rows(hidden), rows(labels), rows(weights)
        log_probs, logits, log_normaliser = _chunk_log_probs(x, head, label, dtype)
        error = jnp.exp(logits - log_normaliser[:, None])
        error = error - (jnp.arange(head.shape[0])[None, :] == label[:, None])
        error = (error * weight[:, None]).astype(dtype)
        x_gradient = dot(error, head, (1, 0), dtype)
        if of_head:
            head_gradient += dot(error, x, (0, 0), dtype)
        found = put(losses, -weight * log_probs), put(normalisers, log_normaliser)
        return *found, put(hidden_gradient, x_gradient.astype(hidden.dtype)), head_gradient

    zeros = jnp.zeros(hidden.shape[0], jnp.float32)
    empty = jnp.zeros(head.shape if of_head else (), jnp.float32)
    return jax.lax.fori_loop(0, chunks, body, (zeros, zeros, jnp.zeros_like(hidden), empty))


def _by_kernel(
    hidden: Array, head: Array, labels: Array, weights: Array, chunk: int, chunks: Array, dtype: Any, of_head: bool
) -> tuple[Array, Array, Array, Array]:
    """The same from the kernels."""
    x, rows, used = hidden.astype(dtype), head.astype(dtype), chunks * chunk
    compute = partial(_kernels().token_statistics, gradient_dtype=hidden.dtype)
    log_probs, normalisers, gradient = compute(x, rows, labels, weights, used)
    of_rows = jnp.zeros(())
    if of_head:
        of_rows = _kernels().head_gradient(x, rows, labels, weights, normalisers, used)
    return -weights * log_probs, normalisers, gradient, of_rows


def _forward(
    hidden: Any,
    head: Any,
    labels: Any,
    weights: Any,
    chunk: int,
    compute_dtype: Any,
    implementation: Implementation | None,
) -> tuple[Array, tuple]:
    losses, _, hidden_gradient, head_gradient = losses_and_gradients(
        hidden.value,
        head.value,
        labels.value,
        weights.value,
        chunk,
        compute_dtype,
        of_head=head.perturbed,
        implementation=implementation,
    )
    # A zero-size array carries the head's dtype to the backward rule, which may hold only arrays.
    like_head = jnp.zeros(0, head.value.dtype)
    return jnp.sum(losses), (hidden_gradient, head_gradient if head.perturbed else None, like_head)


def _backward(
    chunk: int, compute_dtype: Any, implementation: Implementation | None, gradients: tuple, output_gradient: Array
) -> tuple:
    del chunk, compute_dtype, implementation
    hidden_gradient, head_gradient, like_head = gradients
    head_out = None if head_gradient is None else (output_gradient * head_gradient).astype(like_head.dtype)
    return (output_gradient * hidden_gradient).astype(hidden_gradient.dtype), head_out, None, None


linear_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
