"""Weights of replies against closed forms: bandits and sums over all outcomes, names after NICE's tests N1 to N9."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.errors import ConfigError, DataError
from duet_jax.influence.estimator import PAPER_CODE, Estimator, Weights, weights

ADVANTAGES = ("leave_one_out", "none", "mean", "optimal", "gold")


def of(
    estimator: Estimator,
    rewards: object,
    *,
    log_probs: object = 0.0,
    sampled: object = 0.0,
    gold: object = None,
    norms: object = None,
) -> Weights:
    rewards = np.asarray(rewards, np.float64)
    pi, q = (np.broadcast_to(np.asarray(x, np.float64), rewards.shape) for x in (log_probs, sampled))
    gold = None if gold is None else np.broadcast_to(np.asarray(gold, np.float64), rewards.shape[:1])
    return weights(estimator, rewards, log_probs=pi, sampled_log_probs=q, gold_rewards=gold, square_norms=norms)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def expected_row(estimator: Estimator, logits: np.ndarray, rewards: np.ndarray, *, q: np.ndarray, **more) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The mean of the weighted NLL gradients of two replies of a softmax bandit, over all pairs drawn from q."""
    pi, count = softmax(logits), len(logits)
    nll = pi - np.eye(count)
    pairs = np.array(list(itertools.product(range(count), repeat=2)))
    scales = np.sum(np.square(nll), axis=1)
    norms = scales[pairs] if estimator.advantage == "optimal" else None
    found = of(estimator, rewards[pairs], log_probs=np.log(pi)[pairs], sampled=np.log(q)[pairs], norms=norms, **more)
    rows = np.einsum("pm,pmk->pk", found.values, nll[pairs])
    return (q[pairs].prod(axis=1)) @ rows


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_n1_the_expected_row_of_a_bandit_is_minus_the_gradient(advantage: str, baseline: float) -> None:
    rewards = np.array([1.0, 0.0, 0.0])
    gradient = jax.grad(lambda logits: jax.nn.softmax(logits) @ rewards)(jnp.zeros(3))
    np.testing.assert_allclose(gradient, [2 / 9, -1 / 9, -1 / 9], atol=1e-7)
    estimator, uniform = Estimator(advantage), np.full(3, 1 / 3)  # type: ignore[arg-type]
    found = expected_row(estimator, np.zeros(3), rewards, q=uniform, gold=baseline)
    # The mean of both replies has half of the other's.
    np.testing.assert_allclose(found, -np.asarray(gradient) * (0.5 if advantage == "mean" else 1), atol=1e-7)


def test_n3_prompts_whose_replies_are_all_right_have_no_signal() -> None:
    rewards = [[1.0] * 4, [1, 0, 0, 0], [0.1] * 4]
    found = of(Estimator(), rewards)
    np.testing.assert_array_equal(found.zero_signal, [True, False, True])
    np.testing.assert_array_equal(found.values[[0, 2]], 0)
    np.testing.assert_allclose(4 * found.values[1], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    plain = of(PAPER_CODE, rewards)
    assert not plain.zero_signal.any() and (plain.values[0] == 0.25).all()
    # With logits 0, 0 the plain row of a prompt whose replies are all right is 0 on average, and never 0 for one.
    nll = np.array([[-0.5, 0.5], [0.5, -0.5]])
    assert np.abs(plain.values[1, 0] * nll[0]).max() > 0.1
    np.testing.assert_allclose(expected_row(PAPER_CODE, np.zeros(2), np.ones(2), q=np.full(2, 0.5)), 0, atol=1e-9)


def bernoulli(rewards: np.ndarray, baseline: float) -> tuple[float, float]:
    """Mean and variance of one reply's weight times -NLL gradient; p = 0.8, the derivative is that of the logit."""
    p, score = np.array([0.2, 0.8]), np.array([-0.8, 0.2])
    values = of(Estimator("gold"), rewards[:, None], gold=baseline).values[:, 0] * score
    return float(p @ values), float(p @ np.square(values) - (p @ values) ** 2)


@pytest.mark.parametrize(
    ("rewards", "baseline", "mean", "variance"),
    [
        ([0, 1], 0.0, 0.16, 0.0064),
        ([0, 1], 0.8, 0.16, 0.0576),
        ([0, 1], 0.2, 0.16, 0.0),
        ([1, 1], 0.0, 0.0, 0.16),
        ([1, 1], 1.0, 0.0, 0.0),
    ],
)
def test_n4_variances_of_baselines(rewards: list, baseline: float, mean: float, variance: float) -> None:
    found = bernoulli(np.array(rewards, float), baseline)
    np.testing.assert_allclose(found, [mean, variance], atol=1e-7)


def test_n4_the_optimal_baseline_of_many_replies_is_that_of_least_variance() -> None:
    rewards = np.repeat([1.0, 0.0], [400, 100])[None]
    norms = np.where(rewards > 0, 0.2**2, 0.8**2)
    found = of(Estimator("optimal"), rewards, norms=norms).values[0] * 500
    # b* = 0.2; the reply itself is left out, of 400 or of 100.
    np.testing.assert_allclose(found[0], 1 - 399 * 0.04 / (399 * 0.04 + 100 * 0.64), rtol=1e-6)
    np.testing.assert_allclose(found[-1], -400 * 0.04 / (400 * 0.04 + 99 * 0.64), rtol=1e-6)
    np.testing.assert_allclose(found[[0, -1]], [0.8, -0.2], rtol=2e-2)
    still = of(Estimator("optimal"), [[1, 0, 3]], norms=np.zeros((1, 3)))
    np.testing.assert_array_equal(still.values, of(Estimator(), [[1, 0, 3]]).values)


def test_n5_sampling_at_another_temperature_is_weighed() -> None:
    logits, rewards = np.array([1.0, 0, 0]), np.ones(3)
    hot = softmax(logits / 1.2)
    exact, unweighed = Estimator("none", importance_cap=float("inf")), Estimator("none", importance_cap=None)
    on_policy = expected_row(unweighed, logits, rewards, q=softmax(logits))
    np.testing.assert_allclose(on_policy, 0, atol=1e-8)
    np.testing.assert_allclose(
        -expected_row(unweighed, logits, rewards, q=hot), [-0.04113, 0.02056, 0.02056], atol=5e-6
    )
    np.testing.assert_allclose(expected_row(exact, logits, rewards, q=hot), 0, atol=1e-7)
    varied = np.array([0.3, 2.0, -1.0])
    gradient = np.asarray(jax.grad(lambda x: jax.nn.softmax(x) @ varied)(jnp.asarray(logits)))
    loo = dataclasses.replace(exact, advantage="leave_one_out")
    np.testing.assert_allclose(expected_row(loo, logits, varied, q=hot), -gradient, atol=1e-7)


def test_importance_weights_are_cut_off_at_the_cap() -> None:
    found = of(Estimator("none", importance_cap=3.0), [[2, 2, 2]], log_probs=[[0.0, 0.0, -5.0]], sampled=[[-1, -9, 0]])
    np.testing.assert_allclose(found.values[0] * 3 / 2, [np.e, 3, np.exp(-5)], rtol=1e-6)


REWARDS = st.lists(st.lists(st.integers(-4, 4), min_size=4, max_size=4), min_size=1, max_size=5)


@given(rewards=REWARDS, shift=st.integers(-8, 8), power=st.integers(-3, 3))
def test_n8_scale_and_shift_of_rewards(rewards: list, shift: int, power: int) -> None:
    rewards = np.array(rewards, float)
    for name in ("leave_one_out", "mean", "gold"):
        estimator = Estimator(name)  # type: ignore[arg-type]
        gold = rewards[:, 0]
        base, moved = of(estimator, rewards, gold=gold), of(estimator, rewards + shift, gold=gold + shift)
        np.testing.assert_array_equal(base.values, moved.values)
        np.testing.assert_array_equal(base.zero_signal, (rewards == rewards[:, :1]).all(axis=1))
        scaled = of(estimator, rewards * 2.0**power, gold=gold * 2.0**power)
        np.testing.assert_array_equal(scaled.values, base.values * np.float32(2.0**power))
    if shift:
        assert (of(PAPER_CODE, rewards + shift).values != of(PAPER_CODE, rewards).values).all()


@given(rewards=REWARDS, order=st.permutations(range(4)))
def test_n8_order_and_doubled_replies(rewards: list, order: list) -> None:
    rewards = np.array(rewards, float)
    norms = 1 + np.square(rewards + np.arange(4))
    for name in ("leave_one_out", "none", "mean", "optimal"):
        estimator = Estimator(name)  # type: ignore[arg-type]
        base = of(estimator, rewards, norms=norms).values
        np.testing.assert_allclose(of(estimator, rewards[:, order], norms=norms[:, order]).values, base[:, order])
        if name != "optimal":
            twice = of(estimator, np.concatenate([rewards, rewards], axis=1)).values
            factor = (4 - 1) * 2 / (2 * 4 - 1) if name == "leave_one_out" else 1
            np.testing.assert_allclose(twice[:, :4] + twice[:, 4:], factor * base, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        of(Estimator("mean"), rewards).values, 0.75 * of(Estimator(), rewards).values, rtol=1e-6, atol=1e-7
    )


def published(rewards: list, gold: float, policy: str, top: bool, protect: bool) -> tuple[dict[int, float], float]:
    """What the published code multiplies each reply's loss gradient with, by its flags; and the label's."""
    order = sorted(range(len(rewards)), key=lambda m: -rewards[m])
    allowed = order[:10] if top else order
    if policy == "vanilla":
        return dict(enumerate(rewards)), 0.0
    bar = 0.0 if policy == "rejection" else gold - 1e-5
    kept = [m for m in allowed if rewards[m] > bar]
    if not kept:
        return {}, gold if protect else 0.0
    return {m: rewards[m] / len(kept) for m in kept}, 0.0


@given(
    rewards=st.lists(st.integers(-4, 4), min_size=1, max_size=14),
    gold=st.integers(-4, 5),
    policy=st.sampled_from(["vanilla", "rejection", "hard_rejection"]),
    top=st.booleans(),
    protect=st.booleans(),
)
def test_the_papers_code_but_for_a_positive_factor(
    rewards: list, gold: int, policy: str, top: bool, protect: bool
) -> None:
    top, protect = top and policy != "vanilla", protect and policy != "vanilla"
    estimator = dataclasses.replace(
        PAPER_CODE,
        variant=policy,
        top=10 if top else None,
        worst_case_protection=protect,  # type: ignore[arg-type]
    )
    found = of(estimator, [rewards], log_probs=-3.0, sampled=-1.0, gold=[gold])
    theirs, of_label = published([float(r) for r in rewards], gold, policy, top, protect)
    expected = np.array([theirs.get(m, 0.0) for m in range(len(rewards))])
    factor = len(rewards) if policy == "vanilla" else 1
    np.testing.assert_allclose(factor * found.values[0], expected, rtol=1e-6)
    assert found.gold[0] == of_label and found.zero_signal[0] == (not expected.any() and of_label == 0)


def test_rejection_keeps_advantages() -> None:
    """Better than the label by a hair, and a negative reward: the published code pushes away from such a reply."""
    rewards, gold = [[-1.0, -2.0, -4.0]], [-1.5]
    assert of(dataclasses.replace(PAPER_CODE, variant="hard_rejection"), rewards, gold=gold).values[0, 0] < 0
    found = of(Estimator(variant="hard_rejection"), rewards, gold=gold)
    np.testing.assert_allclose(found.values, [[2.0, 0, 0]])
    kept = of(Estimator("gold", "hard_rejection"), rewards, gold=gold)
    np.testing.assert_allclose(kept.values, [[0.5, 0, 0]])
    protected = Estimator(variant="hard_rejection", worst_case_protection=True)
    found = of(protected, [[0.0, 1.0, 2.0], [0.0, 1.0, 5.0]], gold=[4.0, 4.0])
    np.testing.assert_allclose(found.gold, [3.0, 0.0])
    np.testing.assert_allclose(found.values, [[0, 0, 0], [0, 0, 4.5]])


def test_what_needs_labels_or_more_is_said() -> None:
    for estimator, word in (
        (Estimator(variant="hard_rejection"), "variant hard_rejection"),
        (Estimator(variant="rejection", worst_case_protection=True), "worst_case_protection"),
        (Estimator("gold"), "advantage gold"),
    ):
        assert estimator.needs_label
        with pytest.raises(ConfigError, match=f"{word} compares replies with the label's reward, but there are no"):
            of(estimator, [[1, 2]])
    assert not Estimator(variant="rejection", top=3).needs_label
    with pytest.raises(ConfigError, match="pass square_norms"):
        of(Estimator("optimal"), [[1, 2]])
    with pytest.raises(ConfigError, match="there is one reply a prompt; sample two or more"):
        of(Estimator(), [[1], [2]])
    with pytest.raises(ConfigError, match="reply 1 to prompt 0 was where it was sampled.*importance_cap to null"):
        of(Estimator(), [[1, 2]], sampled=[[0, np.nan]])
    of(Estimator(importance_cap=None), [[1, 2]], sampled=[[0, np.nan]])
    with pytest.raises(DataError, match="reply 0 to prompt 1 is nan"):
        of(Estimator(), [[1, 2], [np.nan, 0]])
    with pytest.raises(DataError, match="gold_rewards of prompt 1 are not finite"):
        of(Estimator("gold"), [[1, 2], [1, 0]], gold=[0, np.inf])
    for rewards, more, word in (
        ([1, 2], {}, r"must be \[prompts, samples\]"),
        ([[1, 2]], {"norms": np.ones(2)}, "square_norms have shape"),
    ):
        with pytest.raises(ValueError, match=word):
            of(Estimator("optimal" if more else "none"), rewards, **more)
    with pytest.raises(ValueError, match="both must be those of whole replies"):
        weights(Estimator(), np.ones((1, 2)), log_probs=np.ones((1, 2, 3)), sampled_log_probs=np.ones((1, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage": "best"}, "advantage is 'best'; it must be one of leave_one_out, none"),
        ({"variant": "topk"}, "variant is 'topk'"),
        ({"variant": "rejection", "top": 0}, "top is 0; it must be at least 1"),
        ({"top": 10}, "top is of the variants of rejection; leave it out"),
        ({"worst_case_protection": True}, "worst_case_protection is of the variants of rejection"),
        ({"importance_cap": 0.0}, "importance_cap is 0.0; it must be positive"),
        (
            {"advantage": "gold", "variant": "rejection", "worst_case_protection": True},
            "advantage is 'gold', by which a label that counts as a reply counts 0",
        ),
    ],
)
def test_estimators_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Estimator(**fields)
