"""Projections of factors and of whole gradients agree, keep inner products on average, and vary as theory says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels import rademacher

from duet_jax.influence import projections
from duet_jax.influence.projections import CountSketch, Kronecker, KroneckerSketch, Rademacher, blocks, product

ALL = [CountSketch(64, 5), Rademacher(64, 5), Kronecker(4, 5), KroneckerSketch(64, 6, 5)]
NAMES = [p.name for p in ALL]


def factors(batch: int = 3, tokens: int = 7, rows: int = 48, cols: int = 20):
    keys = jax.random.split(jax.random.key(2), 2)
    return jax.random.normal(keys[0], (batch, tokens, rows)), jax.random.normal(keys[1], (batch, tokens, cols))


@pytest.mark.parametrize("projection", ALL, ids=NAMES)
def test_factors_and_whole_gradients_give_the_same(projection):
    x, d = factors()
    found = projection.project("q", 1, x, d)
    assert found.shape == (3, projection.width(48, 20)) and found.dtype == jnp.float32
    expected = projection.project_dense("q", 1, jnp.einsum("btr,btc->brc", x, d))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("projection", ALL, ids=NAMES)
@pytest.mark.parametrize("rows", [48, 160, 165])
def test_blocks_of_rows_add_up(projection, rows, monkeypatch):
    """A gradient that is never whole in memory: 165 rows do not divide into blocks."""
    x, d = factors(rows=rows)
    expected = projection.project("q", jnp.asarray(1), x, d)
    monkeypatch.setattr(projections, "GRADIENT_VALUES", 3 * 20 * 32)
    multiple = projection.row_multiple(20)
    plan = blocks(rows, 20, 3, multiple)
    assert plan.number == 1 or plan.size % multiple == 0
    assert rows < 160 or plan.number > 1
    total = plan.add_up(
        lambda first: projection.project_dense("q", 1, product(plan.take(plan.pad(x, -1), first, -1), d), first)
    )
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(projection.project("q", 1, x, d), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", ALL, ids=NAMES)
def test_linear_and_different_for_each_parameter_and_seed(projection):
    x, d = factors()
    found = projection.project("q", 1, x, d)
    np.testing.assert_allclose(projection.project("q", 1, x, 2 * d), 2 * found, rtol=1e-5)
    for other in [("q", 2), ("k", 1)]:
        assert np.abs(projection.project(*other, x, d) - found).max() > 0.1
    reseeded = type(projection)(**{**projection.__dict__, "seed": 6})
    assert np.abs(reseeded.project("q", 1, x, d) - found).max() > 0.1
    compiled = jax.jit(lambda layer: projection.project("q", layer, x, d))(1)
    np.testing.assert_allclose(compiled, found, rtol=1e-5, atol=1e-5)


def inner_products(make, gradient, seeds):
    """Inner products of the sketches of two gradients `[2, rows, cols]`, for many seeds, in double precision."""

    def one(seed):
        a, b = make(seed).project_dense("q", 0, gradient)
        return jnp.sum(a * b)

    return np.asarray(jax.jit(lambda s: jax.lax.map(one, s, batch_size=100))(jnp.arange(seeds)), np.float64)


def test_dense_signs_are_unbiased_with_the_variance_of_theory():
    gradient = jax.random.normal(jax.random.key(3), (2, 12, 10))
    gradient = gradient.at[1].add(0.3 * gradient[0])
    found = inner_products(lambda seed: Rademacher(32, seed), gradient, 8000)
    x, y = np.asarray(gradient, np.float64).reshape(2, -1)
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / 32
    assert abs(found.mean() - x @ y) < 4 * np.sqrt(variance / 8000)
    assert abs(found.var() / variance - 1) < 0.1


@pytest.mark.parametrize("make", [lambda s: Kronecker(4, s), lambda s: KroneckerSketch(32, 4, s)])
def test_two_sided_projections_are_unbiased(make):
    gradient = jax.random.normal(jax.random.key(3), (2, 12, 10))
    gradient = gradient.at[1].add(0.3 * gradient[0])
    found = inner_products(make, gradient, 8000)
    x, y = np.asarray(gradient, np.float64).reshape(2, -1)
    assert abs(found.mean() - x @ y) < 4 * found.std() / np.sqrt(8000)


def test_the_variance_of_a_two_sided_projection_of_rank_one():
    """<x, x'> and <y, y'> are estimated apart: E[(ab)^2] = E[a^2] E[b^2] - for rank one, worse than k dense signs."""
    side, seeds = 4, 8000
    rng = np.random.default_rng(0)
    (x, x2), (y, y2) = rng.normal(size=(2, 12)), rng.normal(size=(2, 10))
    gradient = jnp.asarray(np.stack([np.outer(x, y), np.outer(x2, y2)]), jnp.float32)
    found = inner_products(lambda seed: Kronecker(side, seed), gradient, seeds)

    def second_moment(a, b):
        return (a @ b) ** 2 + ((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * np.sum(a**2 * b**2)) / side

    expected = second_moment(x, x2) * second_moment(y, y2)
    assert abs(np.mean(found**2) / expected - 1) < 0.25


def test_a_narrow_factor_stays_as_it_is():
    x, d = factors(rows=3, cols=20)
    projection = Kronecker(4)
    assert projection.width(3, 20) == 12
    matrix = projection.matrix("out", "q.b", 0, 20)
    expected = jnp.einsum("btr,btc,cs->brs", x, d, matrix).reshape(3, 12)
    np.testing.assert_allclose(projection.project("q.b", 0, x, d), expected, rtol=1e-5, atol=1e-5)
    assert set(np.unique(np.abs(matrix))) == {0.5}


def test_dense_signs_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    projection, gradient = Rademacher(64), jax.random.normal(jax.random.key(0), (2, 10, 11))
    whole = projection.project_dense("q", 0, gradient)
    explicit = gradient.reshape(2, -1) @ projection.matrix("q", 0, 110) / 8
    np.testing.assert_allclose(whole, explicit, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(rademacher, "MATRIX_VALUES", 64 * 13)
    np.testing.assert_allclose(projection.project_dense("q", 0, gradient), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(projection.matrix("q", 0, 10, 100), projection.matrix("q", 0, 110)[100:])


@pytest.mark.parametrize("make", [CountSketch, Rademacher, KroneckerSketch])
def test_impossible_widths_are_named(make):
    with pytest.raises(ValueError, match="k=100; it must be a positive multiple of 32"):
        make(100)


def test_golden_values():
    """Sketches made today are compared with those of next year."""
    gradient = (jnp.arange(24 * 16, dtype=jnp.float32) % 7 - 3).reshape(1, 24, 16)
    found = {p.name: np.asarray(p.project_dense("gate", 11, gradient))[0, :6].tolist() for p in GOLDEN_OF}
    for name, values in GOLDEN.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    assert set(found) == set(GOLDEN)


GOLDEN_OF = [CountSketch(32, 1), Rademacher(32, 1), Kronecker(4, 1), KroneckerSketch(32, 8, 1)]
GOLDEN = {
    "count_sketch": [-9.0, 8.0, 4.0, 5.0, 11.0, 5.0],
    "rademacher": [3.7123106, 1.2374369, -10.0762711, 0.8838835, -0.8838835, -6.5407376],
    "kronecker": [12.25, 2.75, -13.25, 0.75, -3.75, -1.25],
    "kronecker_sketch": [0.0, -7.25, 5.25, 5.25, 5.5, 7.25],
}
