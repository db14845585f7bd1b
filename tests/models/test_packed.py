"""Packed arrays: nothing but the dtype changes, derivatives pass, and stacks of them stay in half precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.models import llama
from duet_jax.models.packed import KEEP, keep, pack, unpack

CONFIG = llama.LlamaConfig(50, 32, 64, 3, 4, 2, 8)


def network(config=CONFIG):
    return llama.init(config, key=jax.random.key(0)), jax.random.randint(jax.random.key(1), (2, 9), 0, 50)


def test_packing_changes_no_bit():
    values = jax.random.normal(jax.random.key(0), (3, 4)).astype(jnp.bfloat16)
    values = values.at[0].set(jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40], jnp.bfloat16))
    assert pack(values).dtype == jnp.uint16
    np.testing.assert_array_equal(unpack(pack(values)).astype(np.float32), values.astype(np.float32))
    exact = jnp.ones(3)
    assert pack(exact) is exact and unpack(exact) is exact


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_has_the_derivatives_of_the_identity(dtype):
    x = jnp.linspace(-1, 1, 8, dtype=dtype)

    def loss(x, keep=keep):
        return jnp.sum(jnp.sin(keep(jnp.cos(x))).astype(jnp.float32))

    def plain(x):
        return loss(x, lambda y: y)

    one, two = jax.grad(jax.checkpoint(loss, policy=KEEP))(x), jax.grad(plain)(x)
    np.testing.assert_array_equal(one.astype(np.float32), two.astype(np.float32))
    for f in (loss, jax.grad(loss)):
        expected = jax.jvp(plain if f is loss else jax.grad(plain), (x,), (x,))[1]
        np.testing.assert_array_equal(jax.jvp(f, (x,), (x,))[1].astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_parameters_compute_the_same(dtype):
    params, ids = network()
    frozen = llama.frozen(params, dtype)
    kernel = frozen["layers"]["q"]["kernel"]
    assert kernel.dtype == (jnp.uint16 if dtype == jnp.bfloat16 else dtype)
    assert frozen["layers"]["mlp_norm"].dtype == frozen["embedding"].dtype == jnp.float32
    again = llama.frozen(frozen, dtype)
    assert again["layers"]["q"]["kernel"].dtype == kernel.dtype
    assert llama.output_head(again).dtype == dtype
    np.testing.assert_array_equal(llama.output_head(again), params["embedding"].astype(dtype))

    def hidden(params, embedding):
        return llama.hidden_states(CONFIG, {**params, "embedding": embedding}, ids, compute_dtype=dtype)

    np.testing.assert_array_equal(hidden(frozen, params["embedding"]), hidden(params, params["embedding"]))
    one, two = (jax.grad(lambda e, p=p: jnp.sum(hidden(p, e) ** 3))(params["embedding"]) for p in (frozen, params))
    np.testing.assert_array_equal(one, two)


def test_the_backward_pass_keeps_half_precision():
    """Kept products grow with depth by what they weigh in 16 bits, not in 32."""

    def memory(layers):
        config = dataclasses.replace(CONFIG, num_layers=layers, hidden_size=64, intermediate_size=512)

        def loss(embedding, params, ids):
            params = {**llama.frozen(params, jnp.bfloat16), "embedding": embedding}
            hidden = llama.hidden_states(config, params, ids, compute_dtype=jnp.bfloat16, remat="products")
            return jnp.sum(hidden**3)

        shapes, ids = llama.shapes(config), jax.ShapeDtypeStruct((4, 64), jnp.int32)
        return (
            jax.jit(jax.grad(loss))
            .lower(shapes["embedding"], shapes, ids)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    more, tokens = (memory(10) - memory(4)) / 6, 4 * 64
    # Of a token: gate and up, q and k and v, attention, its sums, the product after it; the residual stream in 32 bits.
    kept = tokens * (2 * (2 * 512 + 32 + 2 * 16 + 32 + 64) + 4 * 4 + 4 * 64)
    kernels = 2 * sum(x.size for x in jax.tree.leaves(llama.shapes(CONFIG)["layers"])) / 3
    assert more < 1.3 * kept + 4 * kernels
