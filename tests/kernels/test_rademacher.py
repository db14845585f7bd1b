"""Dense random signs made on the fly, run by Pallas's interpreter, are those of the matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels import rademacher_pallas
from duet_jax.kernels.rademacher import matrix, signed_sums
from duet_jax.kernels.signs import signs, stream, words
from jax.experimental.pallas import tpu as pltpu

# The interpreter takes minutes for all of them.
pytestmark = pytest.mark.slow
STREAM = stream("k", 2)


def fused(vectors, k, first=0, seed=11):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return jax.jit(lambda v, first: signed_sums(v, seed, STREAM, k, first, implementation="pallas"))(vectors, first)


def test_a_column_group_is_a_stream_of_words():
    found = np.asarray(matrix(11, STREAM, 64, 5, 7))
    second = words(11, STREAM, jnp.arange(2))[1]
    bits = np.asarray(words(11, second, jnp.arange(7, 12)))[:, None] >> np.arange(32, dtype=np.uint32) & 1
    np.testing.assert_array_equal(found[:, 32:], 1.0 - 2.0 * bits)
    assert not np.array_equal(found[:, :32].ravel(), signs(11, STREAM, 160))


@pytest.mark.parametrize("batch, count, k", [(1, 5, 32), (3, 600, 96), (9, 130, 4128)])
def test_equals_the_product_with_the_matrix(batch, count, k):
    vectors = jax.random.normal(jax.random.key(count), (batch, count))
    expected = vectors @ matrix(11, STREAM, k, count, 40)
    np.testing.assert_allclose(fused(vectors, k, jnp.uint32(40)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(signed_sums(vectors, 11, STREAM, k, 40), expected, rtol=1e-4, atol=1e-4)


def test_more_examples_and_coordinates_than_a_tile(monkeypatch):
    monkeypatch.setattr(rademacher_pallas, "EXAMPLES", 8)
    monkeypatch.setattr(rademacher_pallas, "COORDINATES", 128)
    vectors = jax.random.normal(jax.random.key(0), (19, 300))
    expected = vectors @ matrix(11, STREAM, 64, 300)
    np.testing.assert_allclose(fused(vectors, 64), expected, rtol=1e-4, atol=1e-4)
