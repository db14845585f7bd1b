"""The fused sketch of per-example gradients, run by Pallas's interpreter, is the sketch of the gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels import gradient_sketch as module
from duet_jax.kernels.gradient_sketch import gradient_sketch, plan_of, reference
from duet_jax.kernels.gradient_sketch_pallas import sign_planes
from duet_jax.kernels.signs import signs, stream
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from duet_jax.influence.projections import CountSketch, Rademacher

# The interpreter takes minutes for all of them.
pytestmark = pytest.mark.slow
STREAM = stream("gate", 5)
SMOL = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
LLAMA = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]


def factors(batch: int, tokens: int, rows: int, cols: int, dtype=jnp.float32):
    x, d = jax.random.split(jax.random.key(rows + cols))
    return (
        jax.random.normal(x, (batch, tokens, rows)).astype(dtype),
        jax.random.normal(d, (batch, tokens, cols)).astype(dtype),
    )


def fused(x, d, k, seed=3):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return jax.jit(lambda x, d: gradient_sketch(x, d, seed, STREAM, k, implementation="pallas"))(x, d)


@pytest.mark.parametrize(
    "tokens, rows, cols, k",
    [
        (24, 40, 384, 1024),  # lines are rows
        (5, 13, 256, 2048),  # odd sizes, a short last sketch row
        (8, 6, 64, 1024),  # two rows a line, less than one sketch row
        (7, 22, 192, 1024),  # a row begins in the middle of a line
        (16, 10, 576, 4096),
    ],
)
def test_equals_the_sketch_of_the_gradients(tokens, rows, cols, k):
    x, d = factors(2, tokens, rows, cols)
    assert plan_of(tokens, rows, cols, k, 4) is not None
    expected = reference(x, d, 3, STREAM, k)
    np.testing.assert_allclose(fused(x, d, k), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cols", [128, 192])
def test_gradients_in_several_tiles(cols, monkeypatch):
    x, d = factors(2, 8, 384, cols)
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 128 * cols)
    plan = plan_of(8, 384, cols, 1024, 4)
    assert plan.rows == 128 and plan.tiles == 3
    np.testing.assert_allclose(fused(x, d, 1024), reference(x, d, 3, STREAM, 1024), rtol=1e-5, atol=1e-4)


def test_low_precision_factors_accumulate_in_float32():
    x, d = factors(1, 32, 16, 128, jnp.bfloat16)
    found = fused(x, d, 1024)
    expected = reference(x.astype(jnp.float32), d.astype(jnp.float32), 3, STREAM, 1024)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_planes_hold_the_signs_of_the_hash():
    plan = plan_of(8, 384, 1024, 1024, 4)
    planes = np.asarray(sign_planes(plan, 1024, 9, STREAM))
    assert planes.shape[0] == plan.tiles
    bits = (planes[:, :, None] >> np.arange(32, dtype=np.uint32)[:, None, None]) & 1
    bits = bits.reshape(plan.tiles, -1, 1024)[:, : plan.sketch_rows].reshape(-1)
    np.testing.assert_array_equal(1.0 - 2.0 * bits, signs(9, STREAM, 384 * 1024))


def test_shapes_that_the_kernel_does_not_take_go_the_plain_way():
    x, d = factors(2, 4, 10, 16)
    assert plan_of(4, 10, 16, 1024, 4) is None
    expected = reference(x, d, 3, STREAM, 1024)
    np.testing.assert_array_equal(gradient_sketch(x, d, 3, STREAM, 1024, implementation="pallas"), expected)
    np.testing.assert_array_equal(gradient_sketch(x, d, 3, STREAM, 1024), expected)
    own = gradient_sketch(x, d, 3, STREAM, 1024, plain=lambda x, d: jnp.zeros((x.shape[0], 1024)))
    assert not own.any()


def test_projections_of_both_kinds_are_one_scheme():
    """A store's header holds the text of the projection, and must not depend on how it was computed."""
    assert repr(CountSketch(1024, 3, "pallas")) == repr(CountSketch(1024, 3))
    assert repr(Rademacher(1024, 3, "pallas")) == repr(Rademacher(1024, 3))
    x, d = factors(1, 4, 10, 128)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(lambda x, d: CountSketch(1024, 3, "pallas").project("gate", 5, x, d))(x, d)
    np.testing.assert_allclose(found, CountSketch(1024, 3).project("gate", 5, x, d), rtol=1e-5, atol=1e-4)


def test_an_unknown_implementation_is_named():
    x, d = factors(1, 4, 8, 128)
    with pytest.raises(ValueError, match="'cuda'; it must be 'xla', 'pallas' or None"):
        gradient_sketch(x, d, 3, STREAM, 1024, implementation="cuda")


@pytest.mark.parametrize("tokens", [256, 512, 1024])
@pytest.mark.parametrize("rows, cols", SMOL + LLAMA)
def test_layers_of_real_models_are_taken(tokens, rows, cols):
    plan = plan_of(tokens, rows, cols, 8192, 2)
    assert plan.rows * plan.tiles == rows
    assert rows > 1536 or plan.tiles == 1 or plan.rows * cols >= 1 << 18


@given(
    st.integers(1, 600),
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from([1024, 3072, 8192]),
    st.sampled_from([2, 4]),
)
def test_tiles_begin_at_sketch_rows(tokens, row_units, col_units, k, itemsize):
    rows, cols = 2 * row_units, 64 * col_units
    plan = plan_of(tokens, rows, cols, k, itemsize)
    if plan is None:
        return
    assert plan.rows * plan.tiles == rows
    assert plan.sketch_rows * k >= plan.rows * cols > (plan.sketch_rows - 1) * k
    if plan.tiles > 1:
        assert plan.rows % 128 == 0 and plan.sketch_rows * k == plan.rows * cols
