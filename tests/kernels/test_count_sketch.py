"""The row-shift CountSketch is its definition, adds up, and has the mean and variance that theory gives it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels.count_sketch import SHIFTS, count_sketch
from duet_jax.kernels.signs import signs, stream, words
from hypothesis import given, settings
from hypothesis import strategies as st

STREAM = stream("q", 3)
MOST = 2048  # coordinates; one length for all examples is compiled once


def by_definition(gradient: np.ndarray, seed: int, k: int, start: int = 0) -> np.ndarray:
    """Coordinate by coordinate, in double precision."""
    out, count = np.zeros(k), len(gradient)
    assert start + count <= MOST
    sign = np.asarray(signs(seed, STREAM, MOST))
    shift = np.asarray(words(seed, STREAM + jnp.uint32(SHIFTS), jnp.arange(MOST // 32))) % k
    for i, value in enumerate(gradient):
        c = start + i
        out[(c % k + int(shift[c // k])) % k] += value * sign[c]
    return out


@settings(max_examples=8)
@given(st.integers(1, 700), st.sampled_from([32, 64, 96, 256]), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_equals_the_definition(count, k, first_row, seed):
    gradient = np.random.default_rng(count).normal(size=count).astype(np.float32)
    found = jax.jit(count_sketch, static_argnums=3)(gradient, np.uint32(seed), STREAM, k, first_row * k)
    np.testing.assert_allclose(found, by_definition(gradient, seed, k, first_row * k), rtol=1e-5, atol=1e-5)


def test_batches_parts_and_traced_starts():
    gradient = jax.random.normal(jax.random.key(0), (2, 3, 500))
    whole = count_sketch(gradient, 1, STREAM, 64)
    assert whole.shape == (2, 3, 64)
    np.testing.assert_allclose(whole[1, 2], by_definition(np.asarray(gradient[1, 2]), 1, 64), atol=1e-5)
    part = jax.jit(lambda g, start: count_sketch(g, 1, STREAM, 64, start))
    added = part(gradient[..., :192], 0) + part(gradient[..., 192:384], 192) + part(gradient[..., 384:], 384)
    np.testing.assert_allclose(added, whole, atol=1e-5)
    mapped = jax.vmap(jax.vmap(lambda g: count_sketch(g, 1, STREAM, 64)))(gradient)
    np.testing.assert_array_equal(mapped, whole)
    half = count_sketch(gradient.astype(jnp.bfloat16), 1, STREAM, 64)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, count_sketch(gradient.astype(jnp.bfloat16).astype(jnp.float32), 1, STREAM, 64))


def test_golden_values():
    found = count_sketch(jnp.arange(1.0, 101.0), 7, stream("up", 1), 32)
    np.testing.assert_array_equal(found, GOLDEN)


GOLDEN = [
    *(-17, 40, 228, -8, 38, 88, -143, -10, 47, -48, 7, 6, -51, 164, 117, -2),
    *(-119, -120, -1, -2, 123, -4, -59, 126, -63, -64, -33, 22, -21, 116, -19, 122),
]


def test_inner_products_are_unbiased_and_vary_as_theory_says():
    """Over 20,000 seeds. Pairs of one row never meet, so the variance is below that of dense signs."""
    count, k, seeds = 300, 32, 20_000
    x, y = jax.random.normal(jax.random.key(1), (2, count))
    y = y + 0.3 * x
    pair = jnp.stack([x, y])

    def inner(seed):
        a, b = count_sketch(pair, seed, STREAM, k)
        return a @ b

    found = np.asarray(jax.jit(jax.vmap(inner))(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    dense = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)
    rows = [slice(i, i + k) for i in range(0, count, k)]
    within = sum((x[r] @ x[r]) * (y[r] @ y[r]) + (x[r] @ y[r]) ** 2 - 2 * np.sum(x[r] ** 2 * y[r] ** 2) for r in rows)
    variance = (dense - within) / k
    assert abs(found.mean() - x @ y) < 4 * np.sqrt(variance / seeds)
    assert abs(found.var() / variance - 1) < 0.06
    assert variance < dense / k


@pytest.mark.parametrize("k", [0, 31, 48, -32])
def test_impossible_widths_are_named(k):
    with pytest.raises(ValueError, match=f"k={k} .* multiple of 32"):
        count_sketch(jnp.ones(10), 0, STREAM, k)
