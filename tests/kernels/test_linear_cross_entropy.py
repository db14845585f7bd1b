"""Cross-entropy from hidden states equals the textbook formula on full logits, values and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    token_error_norms,
    token_log_probs,
    token_predictions,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, SIZE, VOCAB = 23, 8, 31


def problem(seed: int, share: float):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (ROWS, SIZE))
    head = jax.random.normal(keys[1], (VOCAB, SIZE))
    labels = jax.random.randint(keys[2], (ROWS,), 0, VOCAB)
    draws = jax.random.uniform(keys[3], (ROWS,))
    return hidden, head, labels, jnp.where(draws < share, draws + 0.1, 0.0)


def reference(hidden, head, labels, weights):
    log_probs = jax.nn.log_softmax(hidden @ head.T)
    return -jnp.sum(weights * log_probs[jnp.arange(ROWS), labels])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([4, 23, 64]))
def test_value_and_gradients_equal_the_dense_formula(seed, share, chunk):
    hidden, head, labels, weights = problem(seed, share)
    ours = partial(linear_cross_entropy, labels=labels, weights=weights, chunk=chunk)
    dense = partial(reference, labels=labels, weights=weights)
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    expected, expected_gradients = jax.value_and_grad(dense, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for ours_, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_of_hidden_alone_and_outer_factor():
    hidden, head, labels, weights = problem(3, 0.5)
    ours = jax.grad(lambda h: 3.0 * linear_cross_entropy(h, head, labels, weights, 8, jnp.float32))
    theirs = jax.grad(lambda h: 3.0 * reference(h, head, labels, weights))
    np.testing.assert_allclose(ours(hidden), theirs(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 32])
def test_token_log_probs(chunk):
    hidden, head, labels, weights = problem(4, 0.5)
    mask = weights != 0
    expected = jax.nn.log_softmax(hidden @ head.T)[jnp.arange(ROWS), labels]
    found = token_log_probs(hidden, head, labels, mask, chunk=chunk)
    np.testing.assert_allclose(found, jnp.where(mask, expected, 0.0), rtol=1e-5, atol=1e-5)


def test_rows_without_weight_are_not_computed():
    """Eight weighted rows fill two chunks of four: the others could hold anything."""
    hidden, head, labels, _ = problem(5, 1.0)
    weights = jnp.where(jnp.arange(ROWS) % 3 == 0, 0.5, 0.0)
    assert int(jnp.count_nonzero(weights)) == 8
    poisoned = jnp.where((weights != 0)[:, None], hidden, jnp.nan)
    value, gradient = jax.value_and_grad(linear_cross_entropy)(poisoned, head, labels, weights, 4)
    np.testing.assert_allclose(value, reference(hidden, head, labels, weights), rtol=1e-5)
    assert jnp.all(jnp.isfinite(gradient))


def test_logits_of_all_tokens_never_exist():
    """The largest array of the compiled gradient is one chunk of logits."""
    rows, size, vocab, chunk = 4096, 8, 4096, 64
    shapes = (
        jax.ShapeDtypeStruct((rows, size), jnp.float32),
        jax.ShapeDtypeStruct((vocab, size), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    gradient = jax.jit(jax.grad(partial(linear_cross_entropy, chunk=chunk), argnums=(0, 1)))
    memory = gradient.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * chunk * vocab * 4 + 4 * rows * size * 4 + 4 * vocab * size * 4
    assert memory.temp_size_in_bytes < rows * vocab * 4 / 4


@pytest.mark.parametrize("chunk", [4, 64])
def test_predictions_are_those_of_the_dense_logits(chunk):
    hidden, head, labels, weights = problem(5, 0.6)
    best = jnp.argmax(hidden @ head.T, axis=-1)
    labels = jnp.where(jnp.arange(ROWS) % 3 == 0, best, labels).astype(jnp.int32)
    log_probs, is_best = token_predictions(hidden, head, labels, weights != 0, chunk=chunk)
    dense = jax.nn.log_softmax(hidden @ head.T)[jnp.arange(ROWS), labels]
    np.testing.assert_allclose(log_probs, jnp.where(weights != 0, dense, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(is_best, (labels == best) | (weights == 0))
    assert 0 < np.sum(is_best & (weights != 0)) < np.sum(weights != 0)


@pytest.mark.parametrize("chunk", [4, 64])
def test_error_norms_are_those_of_the_dense_softmax(chunk):
    hidden, head, labels, weights = problem(6, 0.6)
    error = jax.nn.softmax(hidden @ head.T) - jax.nn.one_hot(labels, VOCAB)
    found = token_error_norms(hidden, head, labels, weights != 0, chunk=chunk)
    np.testing.assert_allclose(found, jnp.where(weights != 0, jnp.linalg.norm(error, axis=1), 0.0), rtol=1e-5)


def test_the_error_norm_of_a_sure_prediction_has_its_digits():
    """Two tokens whose logits are `gap` apart: the norm is sqrt(2) / (1 + exp(gap)), also where p^2 - 2 p + 1 is 0."""
    for gap in (2.0, 12.0, 30.0):
        found = token_error_norms(jnp.ones((1, 1)), jnp.array([[gap], [0.0]]), jnp.zeros(1, int), jnp.ones(1, bool))
        np.testing.assert_allclose(found, np.sqrt(2) / (1 + np.exp(gap)), rtol=1e-5)


def test_error_norms_of_all_tokens_never_meet_the_vocabulary_at_once():
    rows, size, vocab, chunk = 4096, 8, 4096, 64
    shapes = (
        jax.ShapeDtypeStruct((rows, size), jnp.float32),
        jax.ShapeDtypeStruct((vocab, size), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
    )
    memory = jax.jit(partial(token_error_norms, chunk=chunk)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * chunk * vocab * 4 + 4 * rows * size * 4
