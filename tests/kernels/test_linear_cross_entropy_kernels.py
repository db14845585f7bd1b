"""The kernels that stream the vocabulary, run by Pallas's interpreter, give what the plain path gives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels import linear_cross_entropy_pallas as module
from duet_jax.kernels.linear_cross_entropy import linear_cross_entropy, losses_and_gradients, token_log_probs
from jax.experimental.pallas import tpu as pltpu

# The interpreter takes minutes for all of them.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def problem(count, size, vocabulary, share=0.6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(count), 4)
    hidden = jax.random.normal(keys[0], (count, size)).astype(dtype)
    head = jax.random.normal(keys[1], (vocabulary, size)).astype(dtype)
    labels = jax.random.randint(keys[2], (count,), 0, vocabulary)
    draws = jax.random.uniform(keys[3], (count,))
    return hidden, head, labels, jnp.where(draws < share, draws + 0.1, 0.0)


CASES = [(23, 8, 31, 0.6), (300, 24, 700, 0.3), (16, 8, 31, 0.0)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of tokens, some without weights, and of the vocabulary, the last one short."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 512)


@pytest.mark.parametrize("count, size, vocabulary, share", CASES)
def test_losses_and_gradients(count, size, vocabulary, share, small_blocks):
    given = problem(count, size, vocabulary, share)
    compute = partial(losses_and_gradients, *given, 32, jnp.float32, of_head=True)
    used = given[3] != 0
    names = ("losses", "normalisers", "of hidden", "of head")
    kernel = jax.jit(partial(compute, implementation="pallas"))
    for name, ours, plain in zip(names, kernel(), compute(), strict=True):
        ours, plain = (jnp.where(used, x, 0) if name == "normalisers" else x for x in (ours, plain))
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5, err_msg=name)


def test_log_probabilities(small_blocks):
    hidden, head, labels, weights = problem(200, 16, 300)
    compute = partial(token_log_probs, hidden, head, labels, weights != 0)
    np.testing.assert_allclose(compute(implementation="pallas"), compute(), rtol=1e-5, atol=1e-5)


def test_derivatives_through_autodiff():
    hidden, head, labels, weights = problem(40, 16, 90)

    def loss(implementation, hidden, head):
        return 2.0 * linear_cross_entropy(hidden, head, labels, weights, 16, jnp.float32, implementation)

    for argnums in (0, (0, 1)):
        ours = jax.grad(partial(loss, "pallas"), argnums)(hidden, head)
        plain = jax.grad(partial(loss, "xla"), argnums)(hidden, head)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_nearly_certain_tokens_keep_their_precision():
    """In bfloat16 the label's probability rounds to 1, and the gradient must not be lost with it."""
    hidden, head, labels, weights = problem(16, 32, 64, 1.0)
    labels = jnp.arange(16)
    hidden = (head[labels] * 0.33).astype(jnp.bfloat16)
    head = head.astype(jnp.bfloat16)
    exact = losses_and_gradients(
        hidden.astype(jnp.float32), head.astype(jnp.float32), labels, weights, 16, jnp.float32, of_head=False
    )
    found = losses_and_gradients(
        hidden, head, labels, weights, 16, jnp.bfloat16, of_head=False, implementation="pallas"
    )
    assert np.median(exact[0] / weights) < 0.01
    error = np.linalg.norm(found[2].astype(jnp.float32) - exact[2], axis=1) / np.linalg.norm(exact[2], axis=1)
    assert error.max() < 0.02
