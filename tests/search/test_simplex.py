"""Mixtures stay on the simplex, exactly."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.search import simplex

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=40).filter(lambda values: sum(values) > 1e-3)


@given(SHARES)
def test_renormalised_shares_sum_to_one_exactly_and_stay(values):
    mixture = simplex.renormalise(np.array(values))
    assert math.fsum(mixture) == 1.0 and np.all(mixture >= 0)
    assert np.all((mixture == 0) == (np.array(values) / math.fsum(values) == 0))
    np.testing.assert_array_equal(simplex.renormalise(mixture), mixture)
    np.testing.assert_array_equal(simplex.check_mixture(mixture, len(values)), mixture)


@given(SHARES, st.floats(0, 1))
def test_floor_zeroes_small_shares_and_renormalises(values, share):
    mixture = np.array(values) / sum(values)
    floor = share / len(values)
    with jax.enable_x64(True):
        found = np.asarray(simplex.apply_floor(jnp.asarray(mixture), floor))
    assert abs(found.sum() - 1) < 1e-14
    kept = found > 0
    assert np.all(mixture[kept] >= floor - 1e-15) and np.all(mixture[~kept] <= floor)
    np.testing.assert_allclose(found[kept], mixture[kept] / mixture[kept].sum(), rtol=1e-12)


def test_floor_of_an_even_share_keeps_the_uniform_mixture():
    for size in (3, 7, 49):
        uniform = jnp.full(size, 1 / size)
        np.testing.assert_allclose(simplex.apply_floor(uniform, 1 / size), uniform, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 20])
def test_draws_cover_the_inside_and_the_faces(size):
    with jax.enable_x64(True):
        found = np.asarray(simplex.draws(jax.random.key(0), 2000, size))
    assert found.shape == (2000, size) and np.all(found >= 0)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-14)
    inside = found[:1000]
    assert np.all(inside > 0)
    # Uniform on the simplex: a share is Beta(1, d - 1), with mean 1/d and this variance.
    variance = (size - 1) / (size**2 * (size + 1))
    np.testing.assert_allclose(inside.mean(0), 1 / size, atol=5 * (variance / 1000) ** 0.5)
    assert inside.var() == pytest.approx(variance, rel=0.1)
    assert set((found[1000:] > 0).sum(1)) == set(range(1, size + 1))


def test_landmarks_are_mixtures():
    for size in (2, 3, 20, 30):
        points = simplex.landmarks(size)
        np.testing.assert_allclose(points.sum(1), 1.0)
        assert len(np.unique(points, axis=0)) == len(points)
