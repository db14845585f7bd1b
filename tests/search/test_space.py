"""Settings beside the mixture: coordinates, their grid, the joint search, and fidelity per cost."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.search import Choice, Constraints, Fidelity, Number, Search, Space, Subset, simplex
from duet_jax.search import search as module
from duet_jax.search.diagnostics import diagnose
from duet_jax.search.maximise import maximise

SPACE = Space(
    (
        Number("rate", 1e-5, 1e-2, log=True),
        Number("dropout", 0.0, 0.1),
        Number("rank", 1, 128, log=True, integer=True),
        Number("layers", 1, 6, integer=True),
        Choice("schedule", ("cosine", "linear", "constant")),
        Choice("bias", (False, True)),
        Subset("modules", ("q", "v", "up"), least=1),
    ),
    Fidelity("steps", (10, 40, 160)),
)


def values(seed: int) -> dict:
    """A random configuration of `SPACE` by name."""
    rng = np.random.default_rng(seed)
    members = [name for name in ("q", "v", "up") if rng.random() < 0.5] or ["up"]
    return {
        "rate": float(np.exp(rng.uniform(np.log(1e-5), np.log(1e-2)))),
        "dropout": float(rng.uniform(0, 0.1)),
        "rank": int(rng.integers(1, 129)),
        "layers": int(rng.integers(1, 7)),
        "schedule": str(rng.choice(["cosine", "linear", "constant"])),
        "bias": bool(rng.random() < 0.5),
        "modules": tuple(members),
        "steps": (10, 40, 160)[rng.integers(3)],
    }


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_what_is_encoded_is_decoded(seed):
    told = values(seed)
    coordinates = SPACE.encode(told)
    assert coordinates.shape == (SPACE.width,) == (12,) and np.all((coordinates >= 0) & (coordinates <= 1))
    found = SPACE.decode(coordinates)
    np.testing.assert_allclose([found.pop(x) for x in ("rate", "dropout")], [told.pop(x) for x in ("rate", "dropout")])
    assert found == told
    with jax.enable_x64(True):
        np.testing.assert_allclose(SPACE.snap(jnp.asarray(coordinates)), coordinates, atol=1e-12)
    if told["steps"] == 160:
        del told["steps"]
        assert SPACE.encode({**told, "rate": 1e-4, "dropout": 0.0})[-1] == 1.0


def test_random_and_middle_configurations_are_allowed():
    with jax.enable_x64(True):
        drawn = np.asarray(SPACE.draws(jax.random.key(0), 500))
    for row in [*drawn, SPACE.middle()]:
        np.testing.assert_allclose(SPACE.encode(SPACE.decode(row)), row, atol=1e-9)
    decoded = [SPACE.decode(row) for row in drawn]
    assert {one["schedule"] for one in decoded} == {"cosine", "linear", "constant"}
    assert {one["layers"] for one in decoded} == set(range(1, 7)) and {one["bias"] for one in decoded} == {False, True}
    assert len({one["modules"] for one in decoded}) == 7 and {one["steps"] for one in decoded} == {160}
    assert SPACE.decode(SPACE.middle()) == {
        "rate": pytest.approx(10**-3.5), "dropout": 0.05, "rank": 11, "layers": 4, "schedule": "cosine",
        "bias": False, "modules": ("q", "v", "up"), "steps": 160,
    }  # fmt: skip


def test_neighbours_are_all_changes_of_one_discrete_setting():
    space = Space(SPACE.settings[3:])
    here = {"layers": 2, "schedule": "linear", "bias": True, "modules": ("v",)}
    with jax.enable_x64(True):
        rows = np.asarray(space.neighbours(jnp.asarray(space.encode(here))[None]))[0]
    found = {tuple(space.decode(row).items()) for row in rows}
    others = {"layers": range(1, 7), "schedule": ["cosine", "linear", "constant"], "bias": [False, True]}
    expected = {tuple({**here, name: value}.items()) for name, choices in others.items() for value in choices}
    # Without "v" there would be no module.
    expected |= {tuple({**here, "modules": members}.items()) for members in (("q", "v"), ("v", "up"))}
    assert found == expected


@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_best_of_all_settings_is_found(least):
    space = Space(
        (
            Number("x", 0.0, 1.0),
            Number("n", 1, 40, integer=True),
            Choice("c", ("a", "b", "d")),
            Subset("s", ("p", "q", "r"), least=least),
        )
    )
    target = np.sqrt([0.6, 0.4, 0.0])
    rng = np.random.default_rng(least)
    effect, members = rng.normal(size=3), rng.normal(size=3) - 0.7
    crossed = 0.3 * rng.normal(size=(3, 3))

    def score(points):
        mixture, x, n, c, s = jnp.split(points, [3, 4, 5, 8], axis=1)
        value = -2.0 * jnp.sum((mixture - target) ** 2, axis=1) - (x[:, 0] - 0.3 * (c[:, 1] > 0) - 0.2) ** 2
        value = value - 3.0 * (n[:, 0] - 0.37) ** 2 + (c * 2**0.5) @ effect + s @ members
        return value + jnp.sum(((c * 2**0.5) @ crossed) * s, axis=1)

    with jax.enable_x64(True):
        key = jax.random.key(0)
        draws = simplex.draws(key, 256, 3)
        centres = jnp.concatenate([jnp.sqrt(draws[:2]), space.draws(key, 2)], axis=1)
        found = jax.jit(lambda: maximise(score, centres, draws, Constraints(), space, key=key))()
        options = [
            np.concatenate([target, space.encode({"x": 0.5 if c == "b" else 0.2, "n": n, "c": c, "s": s})])
            for n in range(1, 41)
            for c in ("a", "b", "d")
            for size in range(least, 4)
            for s in itertools.combinations(("p", "q", "r"), size)
        ]
        best = np.max(score(jnp.asarray(np.array(options))))
    np.testing.assert_allclose(found.score, best, atol=1e-9)
    assert float(found.gap) < 1e-6
    space.encode(space.decode(np.asarray(found.point)[3:]))


def law(mixture: np.ndarray, chosen: dict) -> float:
    """Value of a mixture under some settings, at most 0."""
    value = -((np.sqrt(mixture) - np.sqrt([0.7, 0.3, 0.0])) ** 2).sum()
    value -= 0.1 * (np.log10(chosen["rate"]) + 3.2) ** 2
    value -= 0.15 * np.log2(chosen["rank"] / 32) ** 2 / 9
    return float(value - (0.2 if chosen["schedule"] == "constant" else 0.0))


JOINT = Space(
    (
        Number("rate", 1e-5, 1e-2, log=True),
        Number("rank", 1, 128, log=True, integer=True),
        Choice("schedule", ("constant", "cosine", "linear")),
    )
)


@pytest.mark.slow
def test_mixture_and_settings_are_found_together():
    search = Search(num_domains=3, space=JOINT, initial=5)
    state, rng, told = search.init(), np.random.default_rng(0), []
    for i in range(25):
        mixture, about = search.ask(state, key=jax.random.key(i))
        assert set(about.settings) == {"rate", "rank", "schedule"} and 1 <= about.settings["rank"] <= 128
        told.append(law(mixture, about.settings) + 0.01 * rng.standard_normal())
        state = search.tell(state, mixture, told[-1], settings=about.settings)
    best = search.recommend(state)
    assert law(best.mixture, best.settings) > -0.03 and abs(best.mean - law(best.mixture, best.settings)) < 0.1
    drawn = rng.dirichlet(np.ones(3), 25)
    with jax.enable_x64(True):
        random = [JOINT.decode(row) for row in np.asarray(JOINT.draws(jax.random.key(1), 25))]
    assert law(best.mixture, best.settings) > max(map(law, drawn, random))
    top = search.best(state)
    mean, stderr = search.predict(state, top.mixture[None], top.settings)
    assert top.settings in [JOINT.decode(row) for row in np.asarray(state.settings)[:25]]
    np.testing.assert_allclose([top.mean, top.stderr], [mean[0], stderr[0]])


@pytest.mark.slow
def test_settings_alone():
    search = Search(num_domains=1, space=JOINT)
    state = search.init()
    for i in range(15):
        mixture, about = search.ask(state, key=jax.random.key(i))
        np.testing.assert_array_equal(mixture, [1.0])
        value = law(np.array([0.7, 0.3, 0.0]), about.settings)
        state = search.tell(state, mixture, value, settings=about.settings)
    assert law(np.array([0.7, 0.3, 0.0]), search.recommend(state).settings) > -0.02
    report = diagnose(search, state)
    np.testing.assert_array_equal(report.effects.importance, [0.0])
    assert np.all(np.isfinite(report.left_out.residuals)) and report.noise > 0


def test_a_prior_mixture_pulls_the_mixture_and_not_the_settings():
    search = Search(num_domains=2, space=Space((Number("x", 0.0, 1.0),)), prior=(0.9, 0.1), penalty=50.0, initial=1)
    state = search.init()
    for share, x in ((0.5, 0.1), (0.2, 0.9), (0.7, 0.6)):
        state = search.tell(state, [share, 1 - share], -((x - 0.9) ** 2) - share, settings={"x": x})
    mixture, about = search.ask(state, key=jax.random.key(0))
    np.testing.assert_allclose(mixture, [0.9, 0.1], atol=0.02)
    assert about.settings["x"] > 0.7


def curve(mixture: np.ndarray, steps: float) -> float:
    """A score that grows with the steps, and from which the best mixture can be told early."""
    return law(mixture, {"rate": 10**-3.2, "rank": 32, "schedule": "cosine"}) - 0.5 * (steps / 10) ** -0.7


@pytest.mark.slow
def test_cheap_trials_do_most_of_the_work():
    search = Search(num_domains=3, space=Space((), Fidelity("steps", (10, 40, 160))), initial=4)
    state, rng, spent, levels = search.init(), np.random.default_rng(0), 0.0, []
    while spent < 6 * 160:
        mixture, about = search.ask(state, key=jax.random.key(len(levels)))
        levels.append(about.settings["steps"])
        value = curve(mixture, levels[-1]) + 0.005 * rng.standard_normal()
        state = search.tell(state, mixture, value, 0.005, settings=about.settings)
        spent += levels[-1]
    best = search.recommend(state)
    # For the cost of six full trials.
    assert law(best.mixture, {"rate": 10**-3.2, "rank": 32, "schedule": "cosine"}) > -0.01
    assert len(levels) > 12 and best.settings == {}
    # What is predicted is the value at the target.
    assert abs(best.mean - curve(best.mixture, 160)) < 4 * best.stderr + 0.02


def test_a_level_that_costs_as_much_as_the_target_is_never_chosen():
    space = Space((), Fidelity("steps", (10, 160), costs=(1.0, 1.0)))
    search = Search(num_domains=3, space=space, initial=2)
    state = search.init()
    for i in range(6):
        mixture, about = search.ask(state, key=jax.random.key(i))
        assert about.settings == {"steps": 160}
        state = search.tell(state, mixture, curve(mixture, 160), settings=about.settings)


def test_what_a_trial_tells_is_that_of_the_joint_normal():
    search = Search(num_domains=3, space=Space((), Fidelity("steps", (10, 40, 160))))
    state, rng = search.init(), np.random.default_rng(1)
    for mixture in rng.dirichlet(np.ones(3), 6):
        steps = int(rng.choice([10, 40, 160]))
        state = search.tell(state, mixture, curve(mixture, steps), 0.05, settings={"steps": steps})
    with jax.enable_x64(True):
        [posterior] = module._fitted(search, state)
        surrogate, hyper = search.surrogate, posterior.hyperparameters
        grid = search.space.fidelity.grid
        points = jnp.concatenate([jnp.tile(jnp.sqrt(jnp.array([0.2, 0.3, 0.5])), (3, 1)), grid[:, None]], axis=1)
        found = surrogate.told(posterior, points)
        queries = surrogate.inputs(points)
        cross = np.asarray(surrogate.covariance(hyper, queries, posterior.inputs))
        inverse = np.asarray(posterior.factor.T @ posterior.factor)
        joint = np.asarray(surrogate.covariance(hyper, queries, queries)) - cross @ inverse @ cross.T
        noise = float(np.exp(hyper.noise)) + 1e-6
    for i in range(3):
        remains = joint[2, 2] - joint[i, 2] ** 2 / (joint[i, i] + noise)
        np.testing.assert_allclose(found[i], 1 - remains / joint[2, 2], rtol=1e-6)


@pytest.mark.slow
def test_a_batch_is_what_one_after_another_gives():
    search = Search(num_domains=3, space=JOINT, initial=2)
    state = search.init()
    for i, mixture in enumerate(np.random.default_rng(0).dirichlet(np.ones(3), 4)):
        chosen = {"rate": 10.0 ** -(2 + 0.5 * i), "rank": 2**i, "schedule": "linear"}
        state = search.tell(state, mixture, law(mixture, chosen), settings=chosen)
    key = jax.random.key(0)
    mixtures, about = search.ask_batch(state, 3, key=key)
    first, _ = search.ask(state, key=key)
    np.testing.assert_allclose(mixtures[0], first, atol=1e-9)
    assert len({tuple(one.settings.items()) for one in about}) == 3 or len(np.unique(mixtures, axis=0)) == 3
    stderr = search.predict(state, mixtures, [one.settings for one in about])[1]
    assert about[1].stderr < stderr[1] + 1e-12 and about[2].stderr < stderr[2] + 1e-12


def test_joint_rounds_compose_with_scan():
    search = Search(num_domains=2, space=Space((Number("x", 0.0, 1.0),)), capacity=8, initial=2)

    def round_(state, key):
        proposal = search.propose(state, key=key)
        value = -((proposal.mixture[0] - 0.8) ** 2) - (proposal.settings[0] - 0.25) ** 2
        return search.insert(state, proposal.mixture, (value, 0.0), settings=proposal.settings), value

    with jax.enable_x64(True):
        run = jax.jit(lambda: jax.lax.scan(round_, search.start(), jax.random.split(jax.random.key(0), 8)))
        state, seen = run()
    assert state.settings.shape == (8, 1) and float(np.max(np.asarray(seen))) > -0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Number("x", 2.0, 1.0), "x goes from 2.0 to 1.0"),
        (lambda: Number("x", 0.0, 1.0, log=True), "must begin above 0"),
        (lambda: Number("x", 0.5, 3, integer=True), "whole numbers"),
        (lambda: Choice("x", ("a", "a")), "all different"),
        (lambda: Subset("x", ("a",), least=2), "at least 2 of 1"),
        (lambda: Fidelity("x", (4, 2)), "ascending"),
        (lambda: Fidelity("x", (1, 2), costs=(1.0,)), "one above 0 for each level"),
        (lambda: Space((Number("x", 0, 1), Choice("x", (1, 2)))), "without repetition"),
        (lambda: SPACE.encode(None), "The settings are none, not rate, dropout"),
        (lambda: SPACE.encode({**values(0), "rank": 2.5}), "rank is 2.5; it must be a whole number"),
        (lambda: SPACE.encode({**values(0), "rate": 1.0}), "rate is 1.0"),
        (lambda: SPACE.encode({**values(0), "schedule": "step"}), "one of cosine, linear, constant"),
        (lambda: SPACE.encode({**values(0), "bias": 1}), "bias is 1"),
        (lambda: SPACE.encode({**values(0), "modules": ()}), "at least 1 of q, v, up"),
        (lambda: SPACE.encode({**values(0), "steps": 20}), "steps is 20; it must be one of 10, 40, 160"),
        (lambda: Search(num_domains=1), "at least 2 domains"),
        (
            lambda: Search(num_domains=2).tell(Search(num_domains=2).init(), [1, 0], 0.0, settings={"x": 1}),
            "are x, not none",
        ),
    ],
)
def test_bad_input_is_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()
