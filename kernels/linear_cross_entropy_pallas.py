"""Pallas kernels of `linear_cross_entropy`: the vocabulary streams by, logits stay in the vector memory of a TPU.

A block of tokens meets the rows of the head one block after the other, as queries meet keys in attention: the largest
logit so far, the sum of exponentials and, where the gradient of the hidden states is wanted, the sum of the head's
rows weighted with them are kept and rescaled (Milakov & Gimelshein 2018; Dao et al. 2022). The label's own row stays
out of the sums, so that the gradient of a token that is predicted almost surely is not a difference of large numbers.

Arithmetic for N tokens and a head `[V, D]`: `2 N D V` operations of the matrix unit for log-probabilities, `4 N D V`
with the gradient of `hidden`, as in plain JAX, and `4 N D V` more for that of the head, where plain JAX takes 2. The
head is read once for each block of R tokens, `bytes(head) N / R` bytes: with R of 512 or more (up to D = 4096 in
bfloat16) the kernel is bound by the matrix unit. Plain JAX passes over a chunk's logits several times, about 16 bytes
each, and adds float32 gradients of the whole head for every chunk.

Not the default anywhere, as no TPU has run them. They compile for TPU v5e, v5p and v6e (libtpu 0.0.42 and 0.0.50).
The compiler's estimates, for kernels without stalls, in million cycles (v5e, 2048 tokens, bfloat16; plain JAX with its
256 tokens at a time):

  | head | | kernel | plain JAX |
  | 49,152 x 576 | log-probabilities | 1.3 | 3.2 |
  | | and gradient of hidden | 2.0 | 4.1 |
  | | and of the head | 3.8 | 8.7 |
  | 128,256 x 4096 | and gradient of hidden | 30 | 62 |
  | | and of the head | 57 | 177 |

tokamax has such an operation too; it needs Python 3.12, computes the head's gradient even where the head is frozen,
and cannot be compiled on a machine without a TPU (0.0.17).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_BYTES = 4 << 20  # most bytes of a block of hidden states, or of the head
VMEM_BYTES = 56 << 20  # vector memory that a kernel may take; TPUs from v5e on have at least 64 MiB


def block_of_tokens(count: int, size: int, dtype: Any) -> int:
    """Tokens that meet the head at a time, for hidden states `[count, size]` of a dtype."""
    return min(_rows(size, dtype, 1024), -(-count // 16) * 16)


def _rows(size: int, dtype: Any, largest: int) -> int:
    fitting = BLOCK_BYTES // (size * jnp.dtype(dtype).itemsize)
    return max(128, min(largest, fitting // 128 * 128))


def token_statistics(
    hidden: Array, head: Array, labels: Array, weights: Array, used: Array, *, gradient_dtype: Any = None
) -> tuple[Array, ...]:
    """Log-probabilities of labels and log-sum-exps of logits, and the gradient of the weighted loss.

    Args:
      hidden: `[N, D]`, N a multiple of `block_of_tokens(N, D, dtype)`.
      head: `[V, D]`, of the dtype of `hidden`.
      labels: int32 `[N]`.
      weights: float32 `[N]`.
      used: int32 scalar; rows from here on are not computed.
      gradient_dtype: of the gradient of `-sum(weights * log_probs)` with respect to `hidden`; None where it is not
        wanted.

    Returns:
      float32 `[N]`, float32 `[N]` and, where it is wanted, the gradient `[N, D]`; zeros in blocks that are not used.
    """
    gradient = gradient_dtype is not None
    (count, size), vocabulary = hidden.shape, head.shape[0]
    tokens, words = block_of_tokens(count, size, hidden.dtype), min(_rows(size, head.dtype, 512), vocabulary)
    column = pl.BlockSpec((tokens, 1), lambda i, j, used: (i, 0))
    row_block = pl.BlockSpec((tokens, size), lambda i, j, used: (i, 0))
    # The next block of tokens is far away: it is not fetched while this one is in use.
    single = pl.BlockSpec((tokens, size), lambda i, j, used: (i, 0), pipeline_mode=pl.Buffered(1))
    # The block index stands still where nothing is computed, and then nothing is fetched.
    head_block = pl.BlockSpec((words, size), lambda i, j, used: (jnp.where(i * tokens < used[0], j, 0), 0))
    inputs = [hidden, labels[:, None], head]
    in_specs = [single, column, head_block]
    out_specs, out_shape = [column, column], [jax.ShapeDtypeStruct((count, 1), jnp.float32)] * 2
    scratch = [pltpu.VMEM((tokens, 1), jnp.float32)] * 3
    if gradient:
        inputs += [weights[:, None], head[labels]]
        in_specs += [column, single]
        out_specs.append(row_block)
        out_shape.append(jax.ShapeDtypeStruct((count, size), gradient_dtype))
        scratch.append(pltpu.VMEM((tokens, size), jnp.float32))
    found = pl.pallas_call(
        partial(_statistics_kernel, vocabulary, gradient),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count // tokens, pl.cdiv(vocabulary, words)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=(4 if gradient else 2) * count * size * vocabulary,
            bytes_accessed=hidden.nbytes * (4 if gradient else 1) + head.nbytes * (count // tokens),
            transcendentals=count * vocabulary,
        ),
        name="token_statistics",
    )(used.reshape(1), *inputs)
    return found[0][:, 0], found[1][:, 0], *found[2:]


def _statistics_kernel(vocabulary: int, gradient: bool, used: Any, *refs: Any) -> None:
    if gradient:
        hidden, labels, head, weights, chosen, log_probs, normalisers, gradients, top, label_logit, others, rows = refs
    else:
        hidden, labels, head, log_probs, normalisers, top, label_logit, others = refs
    block, step, words = pl.program_id(0), pl.program_id(1), head.shape[0]
    in_use = block * hidden.shape[0] < used[0]

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        label_logit[...] = jnp.zeros_like(label_logit)
        others[...] = jnp.zeros_like(others)
        if gradient:
            rows[...] = jnp.zeros_like(rows)

    @pl.when(in_use)
    def _() -> None:
        here = head[...]
        if vocabulary % words:
            row = jax.lax.broadcasted_iota(jnp.int32, here.shape, 0)
            here = jnp.where(row < vocabulary - step * words, here, jnp.zeros_like(here))
        logits = _times_transposed(hidden[...], here)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + step * words
        if vocabulary % words:
            logits = jnp.where(column < vocabulary, logits, -jnp.inf)
        is_label = column == labels[...]
        largest = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
        parts = jnp.where(is_label, 0.0, jnp.exp(logits - largest))
        shrink = jnp.exp(top[...] - largest)
        top[...] = largest
        label_logit[...] += jnp.sum(jnp.where(is_label, logits, 0.0), axis=1, keepdims=True)
        others[...] = others[...] * shrink + jnp.sum(parts, axis=1, keepdims=True)
        if gradient:
            part = jnp.dot(parts.astype(here.dtype), here, preferred_element_type=jnp.float32)
            rows[...] = rows[...] * shrink + part

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        total = others[...] + jnp.exp(label_logit[...] - top[...])
        normaliser = top[...] + jnp.log(total)
        log_probs[...] = jnp.where(in_use, label_logit[...] - normaliser, 0.0)
        normalisers[...] = jnp.where(in_use, normaliser, 0.0)
        if gradient:
            found = rows[...] - others[...] * chosen[...].astype(jnp.float32)
            found = jnp.where(in_use, found * (weights[...] / total), 0.0)
            gradients[...] = found.astype(gradients.dtype)


def head_gradient(hidden: Array, head: Array, labels: Array, weights: Array, normalisers: Array, used: Array) -> Array:
    """Gradient float32 `[V, D]` of `-sum(weights * log_probs)` with respect to the head.

    Args:
      hidden, head, labels, weights, used: as for `token_statistics`.
      normalisers: float32 `[N]`, the log-sum-exps that it found.
    """
    (count, size), vocabulary = hidden.shape, head.shape[0]
    tokens, words = block_of_tokens(count, size, hidden.dtype), min(_rows(size, head.dtype, 512), vocabulary)

    def in_use(i: Any, used: Any) -> Any:
        return jnp.where(i * tokens < used[0], i, 0)

    column = pl.BlockSpec((tokens, 1), lambda j, i, used: (in_use(i, used), 0))
    return pl.pallas_call(
        _head_gradient_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(vocabulary, words), count // tokens),
            in_specs=[
                pl.BlockSpec((tokens, size), lambda j, i, used: (in_use(i, used), 0)),
                pl.BlockSpec((words, size), lambda j, i, used: (j, 0)),
                *[column] * 3,
            ],
            out_specs=pl.BlockSpec((words, size), lambda j, i, used: (j, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((vocabulary, size), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * count * size * vocabulary,
            bytes_accessed=head.nbytes + 4 * head.size + hidden.nbytes * pl.cdiv(vocabulary, words),
            transcendentals=count * vocabulary,
        ),
        name="head_gradient",
    )(used.reshape(1), hidden, head, labels[:, None], weights[:, None], normalisers[:, None])


def _head_gradient_kernel(
    used: Any, hidden: Any, head: Any, labels: Any, weights: Any, normalisers: Any, gradient: Any
) -> None:
    block, words = pl.program_id(1), head.shape[0]

    @pl.when(block == 0)
    def _() -> None:
        gradient[...] = jnp.zeros_like(gradient)

    @pl.when(block * hidden.shape[0] < used[0])
    def _() -> None:
        # Rows of the last block that the head lacks hold anything; they only reach rows that are not stored.
        logits = _times_transposed(hidden[...], head[...])
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + pl.program_id(0) * words
        error = jnp.exp(logits - normalisers[...]) - (column == labels[...]).astype(jnp.float32)
        error = (error * weights[...]).astype(head.dtype)
        gradient[...] += jax.lax.dot_general(
            error, hidden[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )


def _times_transposed(x: Array, y: Array) -> Array:
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
