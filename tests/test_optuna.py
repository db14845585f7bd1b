"""The Optuna sampler: good mixtures, the same from the same storage, whatever other trials are there."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import warnings

import jax
import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from duet_jax.optuna import DuetSampler  # noqa: E402
from duet_jax.search import Constraints, Search  # noqa: E402

D = 3
NAMES = ["code", "maths", "web"]
TARGET = np.array([0.6, 0.4, 0.0])
COMPLETE, FAIL, PRUNED = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "FAIL", "PRUNED"))


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def value(mixture) -> float:
    shares = np.array([mixture[name] for name in NAMES])
    return -float(((np.sqrt(shares) - np.sqrt(TARGET)) ** 2).sum())


def create(seed=0, direction="maximize", storage=None, **options):
    sampler = DuetSampler(NAMES, seed=seed, **options)
    name = {"study_name": "mixtures", "load_if_exists": True} if storage else {}
    return optuna.create_study(sampler=sampler, direction=direction, storage=storage, **name), sampler


def optimize(study, trials, sign=1.0):
    study.optimize(lambda trial: sign * value(study.sampler.suggest_mixture(trial)), n_trials=trials)
    return study


def mixtures(study) -> np.ndarray:
    return np.array([[trial.params.get(f"share/{name}", np.nan) for name in NAMES] for trial in study.trials])


def past(study, shares, score=None, state=COMPLETE, **options):
    """Adds a trial that another sampler may have made."""
    share = optuna.distributions.FloatDistribution(0, 1)
    keys = [f"share/{name}" for name in NAMES]
    study.add_trial(
        optuna.create_trial(
            params=dict(zip(keys, shares, strict=True)),
            distributions=dict.fromkeys(keys, share),
            value=score,
            state=state,
            **options,
        )
    )


def fresh(study, **options):
    """The mixture that the study's sampler gives the next trial."""
    return np.array(list(study.sampler.suggest_mixture(study.ask(**options)).values()))


def apart(points) -> float:
    return min(np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i])


@pytest.mark.slow
def test_twenty_trials_beat_random_and_are_mixtures():
    ours, chance = [], []
    for seed in range(3):
        study, sampler = create(seed)
        optimize(study, 20)
        ours.append(-study.best_value)
        rng = np.random.default_rng(seed)
        chance.append(-max(value(dict(zip(NAMES, draw, strict=True))) for draw in rng.dirichlet(np.ones(D), 20)))
        assert all(math.fsum(sampler.suggest_mixture(trial).values()) == 1.0 for trial in study.trials)
    assert np.median(ours) < 0.1 * np.median(chance), (ours, chance)


def test_the_same_seed_agrees_and_minimising_is_maximising_the_negative():
    one, two = optimize(create(5)[0], 10), optimize(create(5)[0], 10)
    negative = optimize(create(5, "minimize")[0], 10, sign=-1.0)
    np.testing.assert_array_equal(mixtures(one), mixtures(two))
    np.testing.assert_array_equal(mixtures(one), mixtures(negative))
    assert np.abs(mixtures(one) - mixtures(optimize(create(6)[0], 10))).max() > 1e-6
    shares, mean, stderr = negative.sampler.best(negative)
    assert shares in [one.sampler.suggest_mixture(trial) for trial in one.trials] and stderr > 0
    assert mean == -one.sampler.best(one)[1] and abs(mean - negative.best_value) < 0.05


def test_proposes_what_the_search_does():
    study, _ = create(3)
    optimize(study, 8)
    search, told = Search(num_domains=D), Search(num_domains=D).init()
    for shares, trial in zip(mixtures(study), study.trials, strict=True):
        told = search.tell(told, shares, trial.value)
    state, pending, asking = study.sampler._recall(study, None)
    jax.tree.map(np.testing.assert_array_equal, state, told)
    assert pending == asking == []
    expected, _ = search.ask(told, key=jax.random.fold_in(jax.random.key(3), 8))
    np.testing.assert_array_equal(fresh(study), expected)


def test_buffers_grow_with_the_trials():
    study, sampler = create(capacity=4)
    for number, shares in enumerate(np.random.default_rng(0).dirichlet(np.ones(D), 17)):
        past(study, shares, float(number))
    state, _, _ = sampler._recall(study, None)
    assert state.mixtures.shape == (64, D) and state.mask.sum() == 17
    np.testing.assert_array_equal(state.feedback.values[:17, 0], np.arange(17))


def test_running_trials_are_apart():
    study, sampler = create()
    optimize(study, 6)
    trials = [study.ask() for _ in range(4)]
    points = np.array([list(sampler.suggest_mixture(trial).values()) for trial in trials])
    assert apart(points) > 1e-3
    for trial, point in reversed(list(zip(trials, points, strict=True))):
        study.tell(trial, value(dict(zip(NAMES, point, strict=True))))
    assert fresh(study).sum() == pytest.approx(1)


def test_workers_that_ask_at_the_same_moment_are_given_different_mixtures():
    barrier = threading.Barrier(4)

    class Simultaneous(DuetSampler):
        def _recall(self, *args):
            known = super()._recall(*args)
            barrier.wait(60)  # none has its mixture before all have looked
            return known

    study = optuna.create_study(sampler=Simultaneous(NAMES), direction="maximize")
    study.optimize(lambda trial: value(study.sampler.suggest_mixture(trial)), n_trials=4, n_jobs=4)
    assert apart(mixtures(study)) > 1e-3
    one_by_one, _ = create()
    np.testing.assert_array_equal(mixtures(study), [fresh(one_by_one) for _ in range(4)])


def test_a_worker_that_died_before_it_asked_is_forgotten():
    study, _ = create()
    other, _ = create()
    study.ask()
    other.ask()
    optimize(study, 6)
    state, pending, asking = study.sampler._recall(study, 7)
    assert state.mask.sum() == 6 and pending == asking == []
    # Before any later trial has finished, it may still be asking.
    assert other.sampler._recall(other, 1)[2] == [0]


def test_a_new_sampler_goes_on_from_the_storage(tmp_path):
    whole = optimize(create(storage=f"sqlite:///{tmp_path}/whole.db")[0], 8)
    optimize(create(storage=f"sqlite:///{tmp_path}/parts.db")[0], 5)
    parts, _ = create(storage=f"sqlite:///{tmp_path}/parts.db")
    assert len(parts.trials) == 5
    optimize(parts, 3)
    np.testing.assert_array_equal(mixtures(whole), mixtures(parts))


def test_other_parameters_go_on_from_the_storage_too():
    def objective(trial):
        good = value(trial.study.sampler.suggest_mixture(trial))
        return good - (trial.suggest_float("a", 0, 1) - 0.3) ** 2 - 0.1 * trial.suggest_float("b", 0, 1)

    def run(*counts):
        storage = optuna.storages.InMemoryStorage()
        for count in counts:
            study, _ = create(storage=storage)
            study.optimize(objective, n_trials=count)
        return [trial.params for trial in study.trials]

    whole = run(14)
    assert whole == run(11, 3)
    assert all(params["a"] != params["b"] for params in whole)


def test_another_sampler_may_sample_the_other_parameters():
    grid = optuna.samplers.GridSampler({"rank": [4, 8]}, seed=0)
    study, sampler = create(independent_sampler=grid)
    study.optimize(lambda trial: value(sampler.suggest_mixture(trial)) + trial.suggest_int("rank", 1, 8), n_trials=5)
    assert sorted(trial.params["rank"] for trial in study.trials) == [4, 8]


@pytest.mark.parametrize("state", [FAIL, PRUNED, "nan", "inf"])
def test_failed_mixtures_are_not_proposed_again(state):
    study, sampler = create()
    optimize(study, 8)
    number = len(study.trials)

    def objective(trial):
        mixture = sampler.suggest_mixture(trial)
        if trial.number > number:
            return value(mixture)
        if state == FAIL:
            raise RuntimeError("out of memory")
        if state == PRUNED:
            raise optuna.TrialPruned
        return float(state)

    study.optimize(objective, n_trials=3, catch=RuntimeError)
    assert study.trials[number].state == {"nan": FAIL, "inf": COMPLETE}.get(state, state)
    assert apart(mixtures(study)[number:]) > 1e-3
    told, pending, _ = sampler._recall(study, None)
    assert told.mask.sum() == number + 2 and len(pending) == 1


def test_known_errors_are_told_and_wrong_ones_ignored():
    study, sampler = create()
    shares = np.random.default_rng(1).dirichlet(np.ones(D), 4)
    for point, stderr in zip(shares, [0.25, None, "small", -1.0], strict=True):
        past(study, point, 1.0, user_attrs={} if stderr is None else {"stderr": stderr})
    with pytest.warns(UserWarning, match="trial 2: The standard error is 'small'.*unknown") as caught:
        state, _, _ = sampler._recall(study, None)
    assert len(caught) == 1
    np.testing.assert_array_equal(state.feedback.stderrs[:4, 0], [0.25, 0, 0, 0])


def test_trials_that_are_no_mixtures_are_ignored_with_one_warning():
    study, sampler = create()
    past(study, [0.9, 0.9, 0.1], 5.0)
    past(study, [0.3, 0.3, 0.3], 5.0)
    past(study, [0.2, 0.3, 0.5], 1.0)
    past(study, [0.9, 0.9, 0.9], state=FAIL)
    study.add_trial(optuna.create_trial(value=1.0))
    with pytest.warns(
        UserWarning, match="3 completed trials, trial 0 the first, .* code, maths, web that sum to 1"
    ) as caught:
        optimize(study, 3)
    assert len(caught) == 1
    state, pending, _ = sampler._recall(study, None)
    assert state.mask.sum() == 4 and pending == []


def test_enqueued_mixtures_are_tried_and_avoided_before():
    study, sampler = create()
    study.enqueue_trial({"share/code": 0.2, "share/maths": 0.3, "share/web": 0.5})
    study.enqueue_trial({"share/web": 1.0})
    study.enqueue_trial({"rank": 4})
    _, pending, _ = sampler._recall(study, None)
    np.testing.assert_array_equal(pending, [[0.2, 0.3, 0.5], [0, 0, 1]])
    study.optimize(lambda trial: value(sampler.suggest_mixture(trial)) + trial.suggest_int("rank", 1, 8), n_trials=4)
    np.testing.assert_array_equal(mixtures(study)[:2], [[0.2, 0.3, 0.5], [0, 0, 1]])
    assert study.trials[2].params["rank"] == 4 and apart(mixtures(study)) > 1e-3
    study.enqueue_trial({"share/code": 0.2})
    with pytest.raises(ValueError, match="shares of trial 4 sum to 0.2, not to 1"):
        sampler.suggest_mixture(study.ask())


def test_enqueued_shares_may_miss_their_sum_by_rounding():
    study, sampler = create()
    study.enqueue_trial(dict.fromkeys([f"share/{name}" for name in NAMES], 0.3333333))
    assert math.fsum(sampler.suggest_mixture(study.ask()).values()) == 1.0


def test_constraints_are_respected():
    study, _ = create(constraints=Constraints(maximum=(1.0, 0.3, 0.5), floor=0.1), initial=4)
    optimize(study, 8)
    points = mixtures(study)
    assert np.all(points <= [1.0, 0.3 + 1e-9, 0.5 + 1e-9])
    assert np.all((points == 0) | (points >= 0.1 - 1e-9))


@pytest.mark.slow
def test_several_objectives_need_weights():
    study = optuna.create_study(sampler=DuetSampler(NAMES), directions=["maximize", "minimize"])
    with pytest.raises(ValueError, match="2 objectives, and the sampler weights 1"):
        study.sampler.suggest_mixture(study.ask())

    sampler = DuetSampler(NAMES, weights=[1, 2])
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])

    def objective(trial):
        mixture = sampler.suggest_mixture(trial)
        trial.set_user_attr("stderr", [0.01, 1.0])
        return value(mixture), -1000 * value(mixture)

    study.optimize(objective, n_trials=10)
    state, _, _ = sampler._recall(study, None)
    values = np.array([trial.values for trial in study.trials])
    np.testing.assert_array_equal(state.feedback.values[:10], values * [1, -1])
    np.testing.assert_array_equal(state.feedback.stderrs[:10], [[0.01, 1.0]] * 10)
    assert value(sampler.best(study)[0]) > values[:3, 0].max()


def test_a_hyperband_bracket_is_a_study_too():
    sampler = DuetSampler(NAMES)
    pruner = optuna.pruners.HyperbandPruner(max_resource=4)
    study = optuna.create_study(sampler=sampler, direction="maximize", pruner=pruner)
    optimize(study, 6)
    np.testing.assert_allclose(mixtures(study).sum(1), 1)


def test_mistakes():
    with pytest.raises(ValueError, match="without repetition"):
        DuetSampler(["web", "web"])
    with pytest.raises(ValueError, match="at least 2 domains"):
        DuetSampler(["web"])
    with pytest.raises(ValueError, match="beta"):
        DuetSampler(NAMES, beta=-1.0)
    study, sampler = create()
    with pytest.raises(ValueError, match="before the first feedback"):
        sampler.best(study)
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    with pytest.raises(ValueError, match="give the study this sampler"):
        sampler.suggest_mixture(random.ask())


def test_without_optuna_one_sentence_names_the_extra(monkeypatch):
    for name in ("optuna", "optuna.distributions"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "duet_jax.optuna")
    with pytest.raises(ImportError, match=r"duet_jax\.optuna needs Optuna.*duet_jax\[optuna\]"):
        importlib.import_module("duet_jax.optuna")


def test_nothing_is_deprecated_or_experimental():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study, sampler = create()
        study.optimize(lambda trial: value(sampler.suggest_mixture(trial)) + trial.suggest_float("a", 0, 1), n_trials=2)
