"""Adapters: they start as nothing, equal their merged model, and stay where they are told to be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.models import llama
from duet_jax.models import lora as adapters

CONFIG = llama.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def network():
    params = llama.init(CONFIG, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 50)
    return params, tokens


def random_adapters(config: adapters.LoraConfig) -> adapters.Lora:
    lora = adapters.init(CONFIG, config, key=jax.random.key(2))
    leaves, tree = jax.tree.flatten(lora.factors)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return dataclasses.replace(lora, factors=jax.tree.unflatten(tree, leaves))


def test_new_adapters_change_nothing(network):
    params, tokens = network
    lora = adapters.init(CONFIG, adapters.LoraConfig(rank=4), key=jax.random.key(2))
    plain = llama.hidden_states(CONFIG, params, tokens)
    np.testing.assert_array_equal(llama.hidden_states(CONFIG, params, tokens, lora=lora), plain)


@pytest.mark.parametrize("targets", [adapters.TARGETS, ("q", "v"), ("down",)])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_merged_parameters_compute_the_same(network, targets, layers):
    params, tokens = network
    lora = random_adapters(adapters.LoraConfig(rank=4, alpha=6.0, targets=targets, layers=layers))
    assert set(lora.factors) == set(targets)
    overlaid = llama.hidden_states(CONFIG, params, tokens, lora=lora)
    merged = llama.hidden_states(CONFIG, adapters.merge(params, lora), tokens)
    np.testing.assert_allclose(overlaid, merged, atol=3e-5)
    assert not np.allclose(overlaid, llama.hidden_states(CONFIG, params, tokens), atol=1e-3)


def test_other_layers_get_no_gradient(network):
    params, tokens = network
    lora = random_adapters(adapters.LoraConfig(rank=4, layers=(0, 2)))

    def loss(factors):
        changed = dataclasses.replace(lora, factors=factors)
        return jnp.sum(llama.hidden_states(CONFIG, params, tokens, lora=changed) ** 2 * 0.1 + 0.3)

    gradient = jax.grad(lambda f: loss(f))(lora.factors)
    for factors in gradient.values():
        assert float(jnp.abs(factors["a"][1]).max()) == 0.0
        assert float(jnp.abs(factors["b"][1]).max()) == 0.0
        assert float(jnp.abs(factors["b"][0]).max()) > 0.0


def test_dropout_is_unbiased_and_repeatable(network):
    params, tokens = network
    lora = random_adapters(adapters.LoraConfig(rank=4, dropout=0.3, targets=("down",), layers=(2,)))
    # Only the last layer's output is adapted, so the stream before the final norm is linear in the masks.
    flat = {**params, "norm": jnp.ones_like(params["norm"])}

    def run(key):
        return llama.hidden_states(CONFIG, flat, tokens, lora=lora, dropout_key=key)

    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    x = jax.random.normal(jax.random.key(5), (64,))
    adapter = {
        "a": lora.factors["down"]["a"][2][: x.size],
        "b": lora.factors["down"]["b"][2],
        "scale": jnp.float32(1.0),
        "dropout": jnp.float32(0.3),
    }
    x = x[: adapter["a"].shape[0]][None]
    exact = adapters.adapt(x, adapter, jnp.float32)
    keys = jax.random.split(jax.random.key(6), 4000)
    draws = jax.vmap(lambda key: adapters.adapt(x, {**adapter, "key": key}, jnp.float32))(keys)
    error = jnp.abs(draws.mean(0) - exact) / (draws.std(0) / jnp.sqrt(4000.0))
    assert float(error.max()) < 5.0
