"""Each kind of feedback goes through the whole search: checked, kept, and read as what it is."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from duet_jax.errors import FeedbackError
from duet_jax.search import BestOf, Comparisons, Rounded, Scores, Search, Stars

D = 3
TARGET = np.array([0.6, 0.4, 0.0])
MIXTURES = np.random.default_rng(0).dirichlet(np.ones(D), 24)


def value(mixture: np.ndarray) -> float:
    """From about -1 to 0."""
    return -float(((np.sqrt(mixture) - np.sqrt(TARGET)) ** 2).sum())


def stars(mixture, rng):
    return np.clip(np.rint(5 + 4 * value(mixture) + 0.5 * rng.standard_normal(6)), 1, 5).astype(int).tolist()


def comparison(mixture, rng):
    better = value(mixture) - value(MIXTURES[0]) > 0.1 * rng.standard_normal(5)
    return MIXTURES[0], int(better.sum()), int((~better).sum())


KINDS = {
    "best of": (BestOf(), lambda m, rng: (value(m) - rng.exponential(0.1, 4)).tolist(), 1.0),
    "best of, bounded": (BestOf(cutoff=0.2), lambda m, rng: (value(m) - 0.2 * rng.uniform(size=3)).tolist(), 1.0),
    "stars": (Stars(5), stars, 4.0),
    "rounded": (Rounded(0.25), lambda m, rng: round(value(m) / 0.25) * 0.25, 1.0),
    "comparisons": (Comparisons(), comparison, None),
}


SLOW = ("best of", "best of, bounded", "rounded", "stars")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in KINDS])
def test_the_search_learns_from_it(name):
    kind, tell, scale = KINDS[name]
    rng = np.random.default_rng(1)
    search = Search(num_domains=D, capacity=32, feedback=kind)
    state = search.init()
    for mixture in MIXTURES:
        state = search.tell(state, mixture, tell(mixture, rng))
    mixture, diagnostics = search.ask(state, key=jax.random.key(0))
    assert math.fsum(mixture) == 1.0 and np.all(mixture >= 0) and diagnostics.gap < 1e-3
    best, mean, stderr, _ = search.recommend(state)
    assert value(best) > -0.06, best
    assert value(best) > np.quantile([value(m) for m in MIXTURES], 0.9)
    predicted, _ = search.predict(state, MIXTURES)
    truth = np.array([value(m) for m in MIXTURES])
    assert np.corrcoef(predicted, truth)[0, 1] > 0.75
    if scale is not None:
        # In units of the feedback: not biased by taking the best of several, by rounding or by stars.
        offset = 5.0 if name == "stars" else 0.0
        assert np.mean(predicted - offset - scale * truth) == pytest.approx(0, abs=0.08 * scale)


def test_the_best_of_more_models_is_not_a_better_mixture():
    # All mixtures are equally good; where more models were trained, the best is better by chance.
    rng = np.random.default_rng(0)
    naive, debiased = Search(num_domains=D, capacity=64), Search(num_domains=D, capacity=64, feedback=BestOf())
    states = [naive.init(), debiased.init()]
    few, many = [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]
    for _ in range(20):
        for mixture, count in ((few, 2), (many, 16)):
            scores = 1.0 - rng.exponential(0.3, count)
            states[0] = naive.tell(states[0], mixture, scores.max())
            states[1] = debiased.tell(states[1], mixture, scores)
    (low, high), _ = naive.predict(states[0], [few, many])
    assert high - low > 0.08
    (low, high), stderr = debiased.predict(states[1], [few, many])
    assert abs(high - low) < 3 * np.hypot(*stderr) and abs(high - low) < 0.06
    assert high == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(
    ("kind", "feedback"),
    [
        (Scores(), 0.3),
        (BestOf(), [0.3]),
        (Stars(), [1, 1]),
        (Rounded(0.25), 1.0),
        (Comparisons(), (MIXTURES[0], 2, 2)),
    ],
)
def test_where_all_feedback_is_the_same_random_mixtures_go_on_and_nothing_is_singled_out(kind, feedback):
    search = Search(num_domains=D, capacity=32, feedback=kind)
    state, key = search.init(), jax.random.key(0)
    for number in range(8):
        mixture, diagnostics = search.ask(state, key=jax.random.fold_in(key, number))
        assert diagnostics.origin == "initial"
        if number:
            apart = np.linalg.norm(np.sqrt(state.mixtures)[:number] - np.sqrt(mixture), axis=1)
            assert np.all(mixture > 0) and apart.min() > 0.01
        else:
            np.testing.assert_allclose(mixture, np.full(D, 1 / D))
        state = search.tell(state, mixture, feedback)
    np.testing.assert_allclose(search.recommend(state).mixture, np.full(D, 1 / D))


def test_comparisons_that_were_all_won_are_not_all_the_same():
    search = Search(num_domains=D, capacity=32, feedback=Comparisons())
    state = search.init()
    for mixture in MIXTURES[:3]:
        state = search.tell(state, mixture, (np.full(D, 1 / D), 3, 0))
    assert search.ask(state, key=jax.random.key(0))[1].origin == "ucb"


@pytest.mark.parametrize(
    ("kind", "feedback", "sentence"),
    [
        (Scores(), "good", "a finite number"),
        (Scores((1.0, 2.0)), 1.0, "2 finite numbers"),
        (BestOf(), [], "at least one number"),
        (BestOf(cutoff=0.1), [0.0, 0.5], "raise the cutoff"),
        (Stars(5), [6], "from 1 to 5"),
        (Stars(5), 4, "list of ratings"),
        (Stars(5), [], "no ratings"),
        (Rounded(0.5), [1.0, 0.0], "two bounds in order"),
        (Rounded(0.5), float("nan"), "two bounds in order"),
        (Comparisons(), 1.0, "wins, losses"),
        (Comparisons(), ([0.2, 0.3, 0.5], 0, 0), "nor both 0"),
    ],
)
def test_what_is_no_feedback_of_its_kind(kind, feedback, sentence):
    search = Search(num_domains=D, feedback=kind)
    with pytest.raises(FeedbackError, match=sentence):
        search.tell(search.init(), np.full(D, 1 / D), feedback)


@pytest.mark.parametrize("kind", [BestOf(), Stars(), Rounded(1.0), Comparisons()])
def test_kinds_that_learn_their_noise_take_no_standard_error(kind):
    search = Search(num_domains=D, feedback=kind)
    with pytest.raises(FeedbackError, match="standard error"):
        search.tell(search.init(), np.full(D, 1 / D), [1], 0.1)
