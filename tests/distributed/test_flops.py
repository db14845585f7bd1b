"""Counted operations against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from duet_jax.distributed import flops
from duet_jax.models import llama, lora
from duet_jax.models.llama import LlamaConfig

SHAPE = LlamaConfig(96, 32, 80, 3, 4, 2, 8, tie_embeddings=False)


def test_loops_branches_and_transformations_count_out() -> None:
    x, w = jnp.ones((8, 16)), jnp.ones((4, 16, 16))
    one = 2.0 * 8 * 16 * 16

    def f(w, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0])

    assert flops.count(jax.jit(f).trace(w, x).jaxpr) == 4 * one
    # Forwards, once more for the backward pass, and two products of it.
    assert flops.count(jax.jit(jax.grad(f)).trace(w, x).jaxpr) == 4 * 4 * one
    branch = jax.jit(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x))
    assert flops.count(branch.trace(x).jaxpr) == 2 * one


def test_a_mapped_function_counts_the_work_of_all_devices() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    run = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert flops.count(jax.jit(run).trace(jnp.ones((8, 16))).jaxpr) == 2.0 * 8 * 8 * 16


@pytest.mark.parametrize("length", [64, 128])
def test_a_decoder_forwards(length: int) -> None:
    """Two operations a parameter of the products and token, and attention below the diagonal, in blocks of 64."""
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    run = jax.jit(lambda params, tokens: llama.hidden_states(SHAPE, params, tokens))
    found = flops.count(run.trace(llama.shapes(SHAPE), tokens).jaxpr)
    products = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80
    seen = sum(64 * end for end in range(64, length + 1, 64))
    assert found == 3 * 2 * (2.0 * length * products + 2 * 2.0 * 32 * seen)


def test_gradients_of_frozen_kernels_are_not_counted() -> None:
    """Forwards, and back through the kernels alone: what they would be changed by is computed by nobody."""
    params = llama.shapes(SHAPE, jnp.bfloat16)
    factors = jax.eval_shape(lambda: lora.init(SHAPE, lora.LoraConfig(4), key=jax.random.key(0)).factors)
    scale = lora.without_factors(SHAPE, lora.LoraConfig(4)).scale

    def loss(factors, params, tokens):
        adapters = lora.Lora(factors, scale)
        return jnp.sum(llama.hidden_states(SHAPE, params, tokens, lora=adapters, compute_dtype=jnp.bfloat16))

    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    forwards = flops.count(jax.jit(loss).trace(factors, params, tokens).jaxpr)
    both = flops.count(jax.jit(jax.grad(loss)).trace(factors, params, tokens).jaxpr)
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 80), (32, 80), (80, 32)]
    # Of each factor its own gradient, too.
    of_factors = 3 * 2.0 * 2 * 64 * 4 * sum(rows + cols for rows, cols in widths)
    # The backward pass of attention has five products where the forward pass has two.
    attention = 3 * 2 * 2 * 2.0 * 64 * 64 * 32
    assert both <= 2 * forwards + of_factors + 1.5 * attention
