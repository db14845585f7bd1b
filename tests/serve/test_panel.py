"""The model of raters against an independent optimiser, closed forms, and panels of known bias and noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import optimize, special

from duet_jax.serve.panel import EFFECT, NOISE, RATERS, VOTES, _moments, estimate
from duet_jax.serve.ratings import Vote


def panel_votes(
    seed: int, values, raters: int, votes: int, noise: float, spread: float
) -> tuple[np.ndarray, list[Vote]]:
    rng = np.random.default_rng(seed)
    bias = rng.normal(0, spread, raters)
    found = []
    for i in range(votes):
        trial, rater = rng.integers(len(values)), rng.integers(raters)
        star = int(np.clip(np.rint(values[trial] + bias[rater] + rng.normal(0, noise)), 1, 5))
        found.append(Vote(key=str(i), trial=int(trial), stars=star, rater=f"r{rater:03d}", item=str(i)))
    return bias, found


def test_slope_information_and_squares_are_those_of_the_ordered_probit() -> None:
    latent, noise, stars = np.array([2.2, 3.0, 4.9, 9.0]), 0.8, 5
    cuts = np.array([-np.inf, 1.5, 2.5, 3.5, 4.5, np.inf])

    def share(star: int, at: np.ndarray) -> np.ndarray:
        return special.ndtr((cuts[star] - at) / noise) - special.ndtr((cuts[star - 1] - at) / noise)

    step, expected, total = 1e-5, 0.0, 0.0
    for star in range(1, stars + 1):
        slope, information, square = _moments(latent, noise, np.full(4, star), stars)
        numeric = (np.log(share(star, latent[:3] + step)) - np.log(share(star, latent[:3] - step))) / (2 * step)
        np.testing.assert_allclose(slope[:3], numeric, rtol=1e-5, atol=1e-8)
        expected, total = expected + share(star, latent) * slope**2, total + share(star, latent) * square
    np.testing.assert_allclose(information, expected, rtol=1e-9)
    # The expected squared noise, over all stars, is its variance.
    np.testing.assert_allclose(total, noise**2, rtol=1e-9)


def test_the_mode_is_that_of_an_independent_optimiser() -> None:
    _, votes = panel_votes(0, [2.5, 3.5], 3, 40, 0.7, 0.6)
    panel = estimate(votes, 5)
    star = np.array([vote.stars for vote in votes])
    trial = np.array([vote.trial for vote in votes])
    rater = np.array([panel.raters.index(vote.rater) for vote in votes])
    cuts = np.array([-np.inf, 1.5, 2.5, 3.5, 4.5, np.inf])

    def height(x: np.ndarray) -> float:
        latent = x[:2][trial] + x[2:][rater]
        shares = special.ndtr((cuts[star] - latent) / panel.noise) - special.ndtr(
            (cuts[star - 1] - latent) / panel.noise
        )
        prior = np.sum(((x[:2] - 3) / 4) ** 2) + np.sum((x[2:] / panel.spread) ** 2)
        return -np.sum(np.log(shares)) + 0.5 * prior

    found = optimize.minimize(
        height, np.full(5, 0.1), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 9000}
    )
    np.testing.assert_allclose(np.concatenate([panel.value, panel.bias]), found.x, atol=2e-4)
    # The error of the values is the inverse of the curvature; ours is the expected one.
    step, points = 1e-3, np.eye(5)
    curvature = [
        [
            (
                height(found.x + step * (a + b))
                - height(found.x + step * (a - b))
                - height(found.x - step * (a - b))
                + height(found.x - step * (a + b))
            )
            / (4 * step**2)
            for b in points
        ]
        for a in points
    ]
    np.testing.assert_allclose(panel.covariance, np.linalg.inv(curvature)[:2, :2], rtol=0.25, atol=0.02)


def test_values_bias_and_noise_of_a_panel_are_found() -> None:
    values = np.linspace(2.2, 3.8, 4)
    errors, widths = [], []
    for seed in range(12):
        bias, votes = panel_votes(seed, values, 12, 240, 0.7, 0.5)
        panel = estimate(votes, 5)
        stderr = np.sqrt(np.diag(panel.covariance))
        errors.append((panel.value - values) / stderr)
        # Differences are known better than values: raters are common to both.
        difference = np.sqrt(panel.covariance[0, 0] + panel.covariance[1, 1] - 2 * panel.covariance[0, 1])
        widths.append(difference / stderr[0])
        assert 0.5 < panel.noise < 0.9 and 0.2 < panel.spread < 0.9
        assert np.corrcoef(panel.bias, bias[[int(name[1:]) for name in panel.raters]])[0, 1] > 0.85
    assert 0.7 < np.std(np.concatenate(errors)) < 1.4
    assert np.mean(widths) < 0.95


def test_unknown_raters_are_each_their_own() -> None:
    _, votes = panel_votes(3, [3.0], 1, 60, 0.7, 0.0)
    anonymous = [Vote(key=vote.key, trial=0, stars=vote.stars) for vote in votes]
    panel = estimate(anonymous, 5)
    assert panel.raters == ()
    value, stderr = panel.of(0)
    stars = np.array([vote.stars for vote in votes])
    # Rounding cancels at the middle of the scale: the value is nearly the mean, and so is its error.
    assert value == pytest.approx(stars.mean(), abs=0.05)
    assert stderr == pytest.approx(stars.std() / np.sqrt(len(stars)), rel=0.2)


def test_of_unknown_raters_values_settle_before_the_deviations(monkeypatch) -> None:
    _, votes = panel_votes(1, [2.5, 3.5], 3, 150, 0.7, 0.6)
    votes = [dataclasses.replace(vote, rater=None) for vote in votes]
    soon = estimate(votes, 5)
    monkeypatch.setattr("duet_jax.serve.panel.STEPS", 5000)
    late = estimate(votes, 5)
    errors = np.sqrt(np.diag(late.covariance))
    assert np.all(np.abs(soon.value - late.value) < 0.02 * errors)
    np.testing.assert_allclose(np.sqrt(np.diag(soon.covariance)), errors, rtol=0.02)


def test_a_few_votes_say_little_and_extreme_ones_stay_finite() -> None:
    one = estimate([Vote(key="a", trial=7, stars=5, rater="r")], 5)
    assert one.trials == (7,) and one.of(7)[1] > 0.7
    # The prior standard deviations are all that is known of noise and raters.
    assert one.noise == pytest.approx(NOISE, rel=0.3) and one.spread == pytest.approx(EFFECT, rel=0.5)
    assert VOTES > 1 and RATERS > 1
    thumbs = [Vote(key=f"{t}{i}", trial=t, stars=2 if t else 1, rater=f"r{i}") for t in (0, 1) for i in range(50)]
    sure = estimate(thumbs, 2)
    assert np.all(np.isfinite(sure.covariance)) and sure.value[0] < 1.5 < sure.value[1]


def test_how_many_more_ratings_tell_two_trials_apart() -> None:
    _, votes = panel_votes(5, [2.8, 3.1, 4.5], 30, 90, 0.7, 0.4)
    panel = estimate(votes, 5)
    assert panel.needed(0, 2, (0, 1, 2)) == 0
    more = panel.needed(0, 1, (0, 1))
    assert more is not None and more > 0
    # Only one of them may still be rated: it needs more, and may never be enough.
    alone = panel.needed(0, 1, (0,))
    assert alone is None or alone > more
    # By the closed form: that many are enough, and one fewer is not.
    each = panel.noise**2 + panel.spread**2 + 1 / 12
    now = panel.covariance[0, 0] + panel.covariance[1, 1]

    def variance(number: int) -> float:
        total = sum(1 / (1 / panel.covariance[i, i] + number / each) for i in (0, 1))
        return total * (now - 2 * panel.covariance[0, 1]) / now

    gap = abs(panel.value[0] - panel.value[1]) / 1.96
    assert variance(more) <= gap**2 < variance(more - 1)
