"""Attention in blocks against a masked softmax in NumPy and the derivative that JAX finds of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.models import attention
from duet_jax.models.attention import cached_attention, causal_attention

# Below, at and above one block of queries; the last takes several blocks of more than the least size.
LENGTHS = (1, 9, 64, 65, 150, 600)


def factors(length, heads=4, key_heads=2, size=8, batch=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(batch, length, n, size) for n in (heads, key_heads, key_heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def whole(q, k, v, window):
    """One softmax over all keys, the others masked."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])[None]
    visible = (distance >= 0) & (distance < window)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


def pulled(attend, d, given):
    """Values of attention, and its derivatives along `d`."""
    values, pull = jax.vjp(attend, *given)
    return values, pull(d)


@partial(jax.jit, static_argnums=2)
def found(d, given, window):
    return pulled(lambda *x: causal_attention(*x, window), d, given)


@jax.jit
def expected(d, given, window):
    return pulled(lambda *x: whole(*x, window), d, given)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("length", [*LENGTHS[:-1], pytest.param(LENGTHS[-1], marks=pytest.mark.slow)])
def test_values_and_derivatives_are_those_of_a_masked_softmax(length, window):
    given, d = factors(length), jax.random.normal(jax.random.key(7), (2, length, 4, 8))
    (values, derivatives), (wanted, wanted_derivatives) = found(d, given, window), expected(d, given, window or length)
    np.testing.assert_allclose(values, wanted, atol=2e-6)
    for one, two in zip(derivatives, wanted_derivatives, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_one_query_after_another_over_a_cache_is_the_same():
    q, k, v = factors(9)
    for window in (None, 4):
        at_once = causal_attention(q, k, v, window)
        for position in range(9):
            lengths = jnp.full(2, position + 1)
            cache = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            step = cached_attention(q[:, position : position + 1], *cache, lengths, window)
            np.testing.assert_allclose(step[:, 0], at_once[:, position], atol=2e-6)


def test_large_scores_neither_overflow_nor_lose_their_order():
    q, k, v = factors(70)
    given = 1e4 * q, k, v
    values, derivatives = found(jnp.ones_like(q), given, None)
    np.testing.assert_allclose(values, expected(jnp.ones_like(q), given, 70)[0], atol=1e-5)
    assert np.isfinite(derivatives[0]).all()


def test_bfloat16_is_as_close_as_its_rounding():
    exact = factors(150)
    rough = [x.astype(jnp.bfloat16) for x in exact]
    values = causal_attention(*rough)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_allclose(values.astype(np.float32), whole(*exact, 150), atol=0.03)


@pytest.mark.slow
def test_products_with_the_hessian():
    """Forward over backward: the derivative of the gradient along a direction, against a central difference."""
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in factors(70, batch=1))
        along = jax.random.normal(jax.random.key(3), q.shape, jnp.float64)
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(causal_attention(q, k, v))))
        found = jax.jvp(gradient, (q,), (along,))[1]
        step = 1e-3
        expected = (gradient(q + step * along) - gradient(q - step * along)) / (2 * step)
    # Scores are float32 whatever the dtype given, hence the tolerance.
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_nothing_of_the_size_of_all_scores_is_kept_for_the_backward_pass():
    q, k, v = factors(600, batch=1)
    _, kept = jax.eval_shape(lambda *x: attention._forward(*x, None), q, k, v)
    assert max(x.size for x in jax.tree.leaves(kept)) == q.size
