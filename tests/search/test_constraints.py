"""The set of allowed mixtures: projections and linear maxima agree with SciPy, and nothing ever leaves the set."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.search.constraints import (
    Constraints,
    Group,
    bounds,
    contains,
    extreme,
    gap,
    project,
    round_counts,
    support,
)

SEEDS = st.integers(0, 2**31 - 1)
# Groups are static, so that a structure is compiled once; bounds and weights vary from example to example.
STRUCTURES = (
    (2, ()),
    (3, (Group((0, 2), 0.3, 0.6),)),
    (4, (Group((1,), 0.2, 0.2), Group((0, 3), 0.0, 0.5))),
    (5, (Group((4, 0, 2), 0.5, 0.5),)),
    (8, ()),
    (12, (Group((3, 1, 8, 5), 0.1, 0.3), Group((0, 11), 0.2, 0.25), Group((9,), 0.0, 0.1))),
)
EVERY, SMALL = st.sampled_from(STRUCTURES), st.sampled_from(STRUCTURES[:4])
ROWS = 16


def random_bounds(rng: np.random.Generator, structure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minima and maxima, `[ROWS, d]`, some of them equal, and mixtures with zeros that fulfil them and the groups."""
    size, groups = structure
    raw = rng.dirichlet(np.full(size, 0.7), ROWS) * (rng.random((ROWS, size)) < 0.7) + 1e-300
    parts = [list(group.domains) for group in groups]
    rest = sorted(set(range(size)) - {domain for part in parts for domain in part})
    sums = rng.uniform([[g.minimum for g in groups]], [[g.maximum for g in groups]], (ROWS, len(groups)))
    anchor = np.empty((ROWS, size))
    for part, total in zip([*parts, rest], [*sums.T, 1 - sums.sum(1)], strict=True):
        anchor[:, part] = raw[:, part] / raw[:, part].sum(1, keepdims=True) * total[:, None]
    anchor = np.where(anchor < 1e-9, 0.0, anchor)
    chance, less, more = rng.random((3, ROWS, size))
    lower = np.where(chance < 0.4, anchor * less, 0.0)
    upper = np.where(more < 0.5, anchor + (1 - anchor) * more * rng.choice([0.05, 2.0], (ROWS, 1)), 1.0)
    frozen = chance > 0.85
    return np.where(frozen, anchor, lower), np.where(frozen, anchor, upper), anchor


def allowed(mixture, lower, upper, groups, tolerance) -> bool:
    mixture = np.asarray(mixture, np.float64)
    good = np.all((mixture >= lower - tolerance) & (mixture <= upper + tolerance))
    good &= np.all(np.abs(mixture.sum(-1) - 1) <= tolerance)
    for group in groups:
        total = mixture[..., list(group.domains)].sum(-1)
        good &= np.all((total >= group.minimum - tolerance) & (total <= group.maximum + tolerance))
    return bool(good)


def limits(constraints: Constraints, size: int):
    return (*bounds(constraints, size), constraints.groups)


PROJECT, EXTREME, GAP = (jax.jit(function, static_argnames="groups") for function in (project, extreme, gap))


@given(SEEDS, st.sampled_from([*((structure, np.float64) for structure in STRUCTURES), (STRUCTURES[-1], np.float32)]))
def test_projections_are_allowed_and_allowed_mixtures_stay(seed, case):
    structure, dtype = case
    rng, (size, groups) = np.random.default_rng(seed), structure
    lower, upper, anchor = random_bounds(rng, structure)
    weights = rng.gamma(0.3, size=(ROWS, size)) * (rng.random((ROWS, size)) < 0.7) * 10.0 ** rng.integers(-9, 9)
    weights[0] = 0.0
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    with jax.enable_x64(dtype == np.float64):
        found = PROJECT(jnp.asarray(weights, dtype), lower, upper, groups=groups)
        assert found.dtype == dtype and allowed(found, lower, upper, groups, tolerance)
        np.testing.assert_allclose(PROJECT(found, lower, upper, groups=groups), found, atol=tolerance)
        stays = np.asarray(PROJECT(jnp.asarray(anchor, dtype), lower, upper, groups=groups))
        np.testing.assert_allclose(stays, anchor, atol=tolerance)
        np.testing.assert_array_equal(stays[anchor == 0], 0.0)
        best = EXTREME(jnp.asarray(rng.normal(size=(ROWS, size)), dtype), lower, upper, groups=groups)
        assert best.dtype == dtype and allowed(best, lower, upper, groups, tolerance)


@pytest.mark.filterwarnings("ignore:Equality and inequality constraints")
@settings(max_examples=20)
@given(SEEDS, SMALL)
def test_projection_has_the_least_divergence(seed, structure):
    rng, (size, groups) = np.random.default_rng(seed), structure
    lower, upper, anchor = random_bounds(rng, structure)
    weights = rng.dirichlet(np.ones(size), ROWS) + 1e-3
    with jax.enable_x64(True):
        found = np.asarray(PROJECT(jnp.asarray(weights), lower, upper, groups=groups))
        # Convex: where no allowed direction descends, nothing is nearer.
        slope = np.log(np.maximum(found, 1e-14) / weights)
        assert np.all(GAP(jnp.asarray(-slope), jnp.asarray(found), lower, upper, groups=groups) < 1e-10)

    def divergence(mixture):
        return float(np.sum(mixture * np.log(np.maximum(mixture, 1e-300) / weights[0])))

    member = np.array([np.isin(np.arange(size), group.domains) for group in groups] + [np.ones(size)]) * 1.0
    minima, maxima = [g.minimum for g in groups] + [1.0], [g.maximum for g in groups] + [1.0]
    best = scipy.optimize.minimize(
        divergence,
        anchor[0],
        bounds=list(zip(lower[0], upper[0], strict=True)),
        constraints=scipy.optimize.LinearConstraint(member, minima, maxima),
        method="SLSQP",
        jac=lambda mixture: np.log(np.maximum(mixture, 1e-12) / weights[0]) + 1,
        options={"ftol": 1e-13, "maxiter": 300},
    )
    if best.success and allowed(best.x, lower[0], upper[0], groups, 1e-7):
        # SciPy's solver stops early now and then, never below the minimum.
        assert divergence(found[0]) <= divergence(best.x) + 1e-5


@given(SEEDS, EVERY)
def test_extreme_is_the_maximum_of_a_linear_program(seed, structure):
    rng, (size, groups) = np.random.default_rng(seed), structure
    lower, upper, anchor = random_bounds(rng, structure)
    slope = np.round(rng.normal(size=(ROWS, size)), rng.integers(0, 4))
    with jax.enable_x64(True):
        found = np.asarray(EXTREME(jnp.asarray(slope), lower, upper, groups=groups))
        gain = np.asarray(GAP(jnp.asarray(slope), jnp.asarray(anchor), lower, upper, groups=groups))
    np.testing.assert_allclose(gain, np.maximum(np.sum(slope * (found - anchor), axis=1), 0), atol=1e-14)
    member = np.array([np.isin(np.arange(size), group.domains) for group in groups]).reshape(-1, size) * 1.0
    best = scipy.optimize.linprog(
        -slope[0],
        np.concatenate([member, -member]),
        [g.maximum + 1e-12 for g in groups] + [-g.minimum + 1e-12 for g in groups],
        np.ones((1, size)),
        [1.0],
        list(zip(lower[0], upper[0], strict=True)),
    )
    assert np.all(np.sum(slope * (found - anchor), axis=1) >= -1e-12)
    if best.status == 0:
        assert float(slope[0] @ found[0]) == pytest.approx(-best.fun, abs=1e-7)


def test_zeros_give_way_where_the_others_do_not_suffice():
    with jax.enable_x64(True):
        capped = Constraints(maximum=(0.3, 0.3, 1.0, 1.0))
        found = PROJECT(jnp.array([1.0, 2.0, 0.0, 0.0]), *limits(capped, 4))
        np.testing.assert_allclose(found, [0.3, 0.3, 0.2, 0.2], atol=1e-15)
        needed = Constraints(groups=(Group((2, 3), 0.2, 0.4),))
        found = PROJECT(jnp.array([1.0, 3.0, 0.0, 0.0]), *limits(needed, 4))
        np.testing.assert_allclose(found, [0.2, 0.6, 0.1, 0.1], atol=1e-15)


def test_without_bounds_projecting_is_one_division():
    weights = jnp.array([1.0, 2.0, 1.0])
    np.testing.assert_array_equal(project(weights, *bounds(Constraints(), 3), ()), weights / 4)
    program = str(jax.make_jaxpr(lambda weights: project(weights, *bounds(Constraints(), 3), ()))(weights))
    assert "clip" not in program and program.count("\n") < 5


def test_the_gap_certifies_the_maximum_of_a_concave_function():
    target = jnp.array([0.7, 0.2, 0.1, 0.0])
    constraints = Constraints(maximum=(0.4, 1.0, 1.0, 1.0), groups=(Group((2, 3), 0.3, 0.5),))
    with jax.enable_x64(True):
        mixture = jnp.array([0.25, 0.25, 0.25, 0.25])
        slope = jax.grad(lambda mixture: jnp.sum(target * jnp.log(mixture + 0.1)))
        climb = lambda _, at: project(at * jnp.exp(0.1 * slope(at)), *limits(constraints, 4))  # noqa: E731
        gaps = [float(GAP(slope(mixture), mixture, *limits(constraints, 4)))]
        mixture = jax.lax.fori_loop(0, 2000, climb, mixture)
        gaps.append(float(GAP(slope(mixture), mixture, *limits(constraints, 4))))
    assert gaps[0] > 1e-2 and 0 <= gaps[1] < 1e-9


@pytest.mark.parametrize(
    ("dtype", "constraints"),
    [
        (np.float64, Constraints(floor=0.12)),
        (np.float64, Constraints(most=2)),
        (np.float64, Constraints(minimum=(0.02,) * 2 + (0,) * 5, floor=0.2, most=4)),
        (np.float64, Constraints(maximum=(0.3, 0.05, 0.3, 0.05, 0.6, 0.1, 0.4), most=3)),
        (
            np.float64,
            Constraints(maximum=(0.3, 0.05, 0.3, 0.1, 0.6, 0.1, 0.4), floor=0.08, groups=(Group((0, 1, 6), 0.4, 0.7),)),
        ),
        (np.float32, Constraints(groups=(Group((0, 1, 2), 0.5, 0.6), Group((5, 6), 0.1, 0.3)), floor=0.1, most=3)),
        (np.float64, Constraints((0.1,) + (0,) * 6, (0.1,) + (1 / 3,) * 6, (Group((0, 3), 0.3, 0.4),), 0.05, 4)),
    ],
)
def test_the_chosen_support_is_feasible(dtype, constraints):
    constraints.check(7)
    tolerance = 1e-12 if dtype == np.float64 else 1e-6

    @jax.jit
    def choose(weights):
        lower, upper = support(weights, constraints)
        return lower, upper, project(weights, lower, upper, constraints.groups)

    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        lower, upper, groups = limits(constraints, 7)
        weights = PROJECT(jnp.asarray(rng.gamma(0.5, size=(300, 7)), dtype), lower, upper, groups=groups)
        lower, upper, found = choose(weights)
        assert lower.shape == upper.shape == (300, 7) and lower.dtype == upper.dtype == dtype
        assert np.all(contains(found, constraints, 7, tolerance))
        assert np.all(found <= upper + tolerance) and np.all(found >= lower - tolerance)


def test_support_by_hand():
    chosen = jax.jit(support, static_argnums=1)
    mixture = jnp.array([0.4, 0.05, 0.3, 0.25])
    lower, upper = chosen(mixture, Constraints(floor=0.1))
    np.testing.assert_allclose(lower, [0.1, 0, 0.1, 0.1])
    np.testing.assert_allclose(upper, [1, 0, 1, 1])
    lower, upper = chosen(mixture, Constraints(minimum=(0, 0.05, 0, 0), most=2))
    np.testing.assert_allclose(lower, [0, 0.05, 0, 0])
    np.testing.assert_allclose(upper, [1, 1, 0, 0])
    # Two of the largest hold too little: a third is kept; with two allowed, the second gives way to the roomiest.
    caps = (0.4, 1.0, 0.5, 0.5)
    np.testing.assert_allclose(chosen(mixture, Constraints(maximum=caps, floor=0.28))[1], [0.4, 0, 0.5, 0.5])
    np.testing.assert_allclose(chosen(mixture, Constraints(maximum=caps, most=2))[1], [0.4, 1.0, 0, 0])
    even = jnp.full(49, 1 / 49)
    np.testing.assert_allclose(chosen(even, Constraints(floor=1 / 49))[1], np.ones(49))


def test_it_is_a_static_argument_and_works_in_batches():
    constraints = Constraints([0.1, 0, 0], np.array([0.5, 0.5, 1.0]), [Group([1, 2], 0.2, 0.9)], floor=0.05)
    assert hash(constraints) == hash(Constraints((0.1, 0.0, 0.0), (0.5, 0.5, 1.0), (Group((1, 2), 0.2, 0.9),), 0.05))
    weights = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), (2, 4)))

    def choose(weights, constraints):
        lower, upper = support(project(weights, *limits(constraints, 3)), constraints)
        return project(weights, lower, upper, constraints.groups)

    whole = jax.jit(choose, static_argnums=1)(weights, constraints)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda row: choose(row, constraints))))(weights)
    np.testing.assert_allclose(whole, mapped, atol=1e-6)
    assert np.all(contains(whole, constraints, 3, 1e-6))
    np.testing.assert_array_equal(contains(jnp.array([[0.3, 0.3, 0.4], [0.3, 0.66, 0.04]]), constraints, 3), [1, 0])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda v: sum(v) > 1e-3), st.integers(0, 10**6))
def test_without_constraints_counts_are_those_of_the_sampler(values, budget):
    mixture = np.array(values) / sum(values)
    found = round_counts(mixture, budget, Constraints())
    # Largest remainders; equal ones favour the earlier domain.
    expected = np.floor(mixture * budget).astype(int)
    expected[np.argsort(expected - mixture * budget, kind="stable")[: budget - expected.sum()]] += 1
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64


@given(SEEDS, st.sampled_from(STRUCTURES[:3]), st.integers(1, 12))
def test_counts_are_allowed_whenever_whole_numbers_can_be(seed, structure, budget):
    size, groups = structure
    low, high, mixtures = random_bounds(np.random.default_rng(seed), structure)
    grid = np.array([c for c in itertools.product(range(budget + 1), repeat=size) if sum(c) == budget])
    for lower, upper, mixture in zip(low, high, mixtures, strict=True):
        found = round_counts(mixture, budget, Constraints(tuple(lower), tuple(upper), groups))
        assert found.sum() == budget and np.all(found >= 0) and np.all(found[mixture == 0] == 0)
        possible = [row for row in grid if not np.any(row[mixture == 0])]
        if any(allowed(row / budget, lower, upper, groups, 1e-9) for row in possible):
            assert allowed(found / budget, lower, upper, groups, 1e-9)
        else:
            assert allowed(found / budget, lower, upper, groups, 1 / budget)


def test_counts_by_hand():
    third = np.full(3, 1 / 3)
    np.testing.assert_array_equal(round_counts(third, 100, Constraints(maximum=(1 / 3,) * 3)), [34, 33, 33])
    frozen = Constraints((0.29, 0, 0), (0.29, 1, 1))
    np.testing.assert_array_equal(round_counts(np.array([0.29, 0.355, 0.355]), 100, frozen), [29, 36, 35])
    least = Constraints(minimum=(0.25, 0.25, 0.0))
    np.testing.assert_array_equal(round_counts(np.array([0.25, 0.25, 0.5]), 10, least), [3, 3, 4])
    floor = Constraints(floor=0.06)
    np.testing.assert_array_equal(round_counts(np.array([0.06, 0.94, 0.0]), 20, floor), [2, 18, 0])


def test_repetition_limits():
    assert Constraints.repetition([100, 10_000, 0], 1000, 4) == (0.4, 1.0, 0.0)
    for sizes, budget, epochs, message in (
        ([-1, 5], 10, 1, "at least 0 examples"),
        ([5], 0, 1, "at least 1 example"),
        ([5], 10, 0, "above 0"),
        ([100, 200], 1000, 2, "2 epochs of 300 examples are less than the budget, 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            Constraints.repetition(sizes, budget, epochs)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(minimum=(0.1,)), "minimum has 1 shares; it must have one for each of 3"),
        (Constraints(maximum=(0.5,) * 4), "maximum has 4 shares"),
        (Constraints(minimum=(-0.1, 0, 0)), "minimum of domain 0 is -0.1; a share is from 0 to 1"),
        (Constraints(maximum=(1, 40, 1)), "maximum of domain 1 is 40"),
        (Constraints(maximum=(1, float("nan"), 1)), "maximum of domain 1 is nan"),
        (Constraints((0.3, 0, 0), (0.2, 1, 1)), "minimum of domain 0, 0.3, is above its maximum, 0.2"),
        (Constraints(minimum=(0.5, 0.4, 0.2)), "minima of groups and domains sum to 1.1, which is above 1"),
        (Constraints(maximum=(0.5, 0.2, 0.2)), "maxima of groups and domains sum to 0.9, which is below 1"),
        (Constraints(groups=(Group(()),)), "Group 0 has no domains"),
        (Constraints(groups=(Group((0, 3)),)), "Group 0 names domain 3; there are 0 to 2"),
        (Constraints(groups=(Group((0, 0)),)), "Group 0 names a domain twice"),
        (Constraints(groups=(Group((0, 1)), Group((1, 2)))), "Domain 1 is in groups 0 and 1; it may be in one only"),
        (Constraints(groups=(Group((0, 1), 0.6, 0.5),)), "Group 0 has minimum 0.6 and maximum 0.5"),
        (
            Constraints(maximum=(0.1, 0.1, 1), groups=(Group((0, 1), 0.3),)),
            "Group 0 needs 0.3, but its domains' maxima sum to 0.2",
        ),
        (
            Constraints(minimum=(0.2, 0.2, 0), groups=(Group((0, 1), 0, 0.3),)),
            "Group 0 may have 0.3, but its minima sum to 0.4",
        ),
        (Constraints(minimum=(0, 0, 0.6), groups=(Group((0, 1), 0.5),)), "minima.* sum to 1.1"),
        (Constraints(maximum=(1, 1, 0.3), groups=(Group((0, 1), 0, 0.5),)), "maxima.* sum to 0.8"),
        (Constraints(floor=1.5), "floor is 1.5; it must be from 0 to 1"),
        (Constraints(most=0), "most is 0; a mixture has at least 1 domain"),
        (
            Constraints((0.1, 0, 0), (0.1, 1, 1), floor=0.2),
            "Domain 0 needs a share, but its maximum, 0.1, is below the floor, 0.2",
        ),
        (Constraints(minimum=(0.1, 0.1, 0), most=1), "2 domains need a share, but at most 1 may have one"),
        (Constraints(maximum=(0.4, 0.4, 0.4), floor=0.35), "With a floor of 0.35, no choice of domains"),
        (Constraints(maximum=(0.4, 0.4, 0.4), most=2), "With at most 2 domains, no choice of domains"),
        (Constraints(groups=(Group((0,), 0.1), Group((1,), 0.1)), most=1), "With at most 1 domains, no choice"),
    ],
)
def test_every_mistake_is_named(constraints, message):
    with pytest.raises(ValueError, match=message):
        constraints.check(3)


@given(SEEDS, st.integers(2, 6), st.integers(1, 6), st.sampled_from([0.0, 0.05, 0.15, 0.3]))
def test_without_groups_check_accepts_exactly_what_is_possible(seed, size, most, floor):
    rng = np.random.default_rng(seed)
    lower = np.where(rng.random(size) < 0.3, rng.random(size) / size, 0.0)
    upper = np.minimum(lower + rng.random(size) * rng.choice([0.3, 1.0], size), 1.0)
    constraints = Constraints(tuple(lower), tuple(upper), (), floor, most)
    choices = np.array([c for c in itertools.product([False, True], repeat=size) if 0 < sum(c) <= most])
    possible = (
        np.all(choices | (lower == 0), axis=1)
        & np.all(~choices | (upper >= floor), axis=1)
        & ((choices * np.maximum(lower, floor)).sum(1) <= 1 + 1e-12)
        & ((choices * upper).sum(1) >= 1 - 1e-12)
    )
    try:
        constraints.check(size)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == possible.any()
