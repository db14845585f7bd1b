"""The decoder without any reference library: causality, padding, caches, windows and rotary scaling."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.models import decoding, llama, rope
from duet_jax.models.linear import matmul

PLAIN = llama.LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)
VARIANTS = {
    "plain": PLAIN,
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, head_dim=12),
    "untied": dataclasses.replace(PLAIN, tie_embeddings=False, num_kv_heads=4),
    "window": dataclasses.replace(PLAIN, sliding_window=4),
}


forward = jax.jit(llama.hidden_states, static_argnums=0, static_argnames="compute_dtype")
prefill, step = (
    jax.jit(part, static_argnames=("config", "compute_dtype")) for part in (decoding.prefill, decoding.step)
)


@functools.cache
def network(config: llama.LlamaConfig):
    params = llama.init(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def tokens(rows: int = 2, length: int = 11):
    return jax.random.randint(jax.random.key(2), (rows, length), 0, 60)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_continues_the_whole_forward_pass(name):
    config = VARIANTS[name]
    params, ids = network(config), tokens()
    whole = forward(config, params, ids)
    decoder = decoding.unstack(config, params, None, jnp.float32)
    # Rows of different lengths: the second one's padding is written over.
    lengths = jnp.array([5, 3])
    hidden, cache = prefill(config, decoder, ids[:, :5], lengths, jnp.float32)
    np.testing.assert_allclose(hidden, whole[jnp.arange(2), lengths - 1], atol=2e-5)
    keys = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, 6)]) for x in cache.keys)
    values = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, 6), (0, 0)]) for x in cache.values)
    cache = decoding.Cache(keys, values)
    for number in range(6):
        position = lengths + number
        token = ids[jnp.arange(2), position]
        hidden, cache = step(config, decoder, token, position, cache, jnp.float32)
        np.testing.assert_allclose(hidden, whole[jnp.arange(2), position], atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_later_tokens_and_padding_do_not_matter(name):
    config = VARIANTS[name]
    params, ids = network(config), tokens()
    before = forward(config, params, ids)
    changed = ids.at[:, 7:].set((ids[:, 7:] + 1) % 60)
    np.testing.assert_allclose(forward(config, params, changed)[:, :7], before[:, :7], atol=1e-5)
    padded = jnp.pad(ids, [(0, 0), (0, 5)])
    np.testing.assert_allclose(forward(config, params, padded)[:, :11], before, atol=1e-5)


def test_a_window_forgets():
    """With one layer and a window of 4, token t depends on tokens t-3 .. t and no earlier one."""
    config = dataclasses.replace(VARIANTS["window"], num_layers=1)
    params, ids = network(config), jnp.arange(3, 14)[None]

    @jax.jit
    def last(position, shift):
        nudged = params["embedding"].at[ids[0, position]].add(shift)
        return llama.hidden_states(config, {**params, "embedding": nudged}, ids)[0, 10]

    base = np.asarray(last(0, 0.0))
    for position in range(10):
        moved = np.abs(last(position, 1.0) - base).max() > 1e-6
        assert moved == (position >= 7), position


@pytest.mark.parametrize("remat", ["products", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    params, ids = network(PLAIN), tokens()

    def loss(params, remat):
        return jnp.sum(llama.hidden_states(PLAIN, params, ids, remat=remat) ** 3)

    one, two = jax.grad(loss)(params, "none"), jax.grad(loss)(params, remat)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close():
    params, ids = network(PLAIN), tokens()
    exact = forward(PLAIN, params, ids)
    rough = forward(PLAIN, params, ids, compute_dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.15


def test_llama3_rope_scaling_is_the_published_rule():
    scaling = rope.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(PLAIN, head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    plain = rope.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    expected = []
    for frequency in np.asarray(plain, np.float64):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(rope.rope_frequencies(config), expected, rtol=1e-5)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        dataclasses.replace(PLAIN, num_kv_heads=3)


def test_a_matrix_product_has_a_hessian():
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 3), (3, 2)]))

    def loss(product):
        return lambda kernel: jnp.sum(jnp.tanh(product(x, kernel)) ** 2)

    found = jax.hessian(loss(lambda x, kernel: matmul(x, kernel, jnp.float32)))(kernel)
    expected = jax.hessian(loss(jnp.matmul))(kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
