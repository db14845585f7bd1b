"""NICE: what raises a reward scores high, one trajectory serves LESS as well, and nothing is lost in a crash."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from duet_jax import models
from duet_jax.config import DomainConfig, PolicyConfig, RewardConfig, SelectorConfig, TrainingConfig
from duet_jax.data import Example, encode, encode_prompts
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed, Engine
from duet_jax.feedback.rewards import Reward, build_reward
from duet_jax.influence import policy_gradient
from duet_jax.influence.build import Point
from duet_jax.influence.given import external_samples
from duet_jax.influence.scores import queries
from duet_jax.influence.store import Store
from duet_jax.models import llama
from duet_jax.models.sampling import Sampling
from duet_jax.selection import Asked, Pool, score
from duet_jax.training.optimiser import learning_rates
from duet_jax.training.sft import Trainer
from tests.small import write_rows

LETTERS = 5
# Two domains, of small and of capital letters, with one right answer to each letter.
PROMPTS = (string.ascii_lowercase[:LETTERS], string.ascii_uppercase[:LETTERS])
RIGHT = [dict(zip(own, np.random.default_rng(i).permutation(list(own)), strict=True)) for i, own in enumerate(PROMPTS)]
TOKENIZER = CharacterTokenizer("\n" + "".join(PROMPTS))
BUCKETS = (6,)
MODEL = llama.LlamaConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_length=16,
)
EXACT = RewardConfig(kind="exact_match")
TARGET = DomainConfig(name="target", source="not read here")
SELECTOR = SelectorConfig(
    kind="nice",
    targets=(TARGET,),
    warmup_epochs=2,
    warmup_examples=192,
    k=1024,
    policy=PolicyConfig(samples=16, max_new_tokens=2, batch_size=32),
    reward=EXACT,
)


def examples(domain: int, wrong: bool, count: int, name: str) -> list[Example]:
    """Letters with their right answer, or with any other."""
    rng, found = np.random.default_rng([domain, wrong, count]), []
    for i in range(count):
        letter = PROMPTS[domain][i % LETTERS]
        others = [other for other in PROMPTS[domain] if other != RIGHT[domain][letter]]
        answer = str(rng.choice(others)) if wrong else str(RIGHT[domain][letter])
        found.append(Example(f"{name}{i}", letter, answer))
    return found


def pool(asked: Sequence[Example] | None, reward: Reward | None, **external: Any) -> Pool:
    """A third of each domain is wrong; targets, if any, are `asked`, otherwise each domain's own letters."""
    settings = TrainingConfig(method="full", learning_rate=1e-2, batch_size=8)
    base = llama.init(MODEL, key=jax.random.key(0))
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, base), settings, BUCKETS, TOKENIZER.pad_id, remat="none")
    engine = Engine(models.Model(MODEL, {}, TOKENIZER, "from scratch", "f"), False, BUCKETS)
    both = [examples(i, False, 64, f"{i}good") + examples(i, True, 32, f"{i}bad") for i in range(2)]
    train = tuple(encode(part, TOKENIZER, chat=False, max_length=BUCKETS[-1]) for part in both)
    held_out = [examples(i, False, LETTERS, f"{i}v") for i in range(2)]

    def read(part: Sequence[Example]) -> Any:
        if reward is None:
            return encode(part, TOKENIZER, chat=False, max_length=BUCKETS[-1])
        return encode_prompts(part, TOKENIZER, chat=False, max_length=BUCKETS[-1])

    sets = [held_out[0] + held_out[1]] if asked is None else [list(asked)]
    return Pool(
        names=("small", "capital"),
        train=train,
        validation=tuple(map(read, held_out)),
        targets=() if asked is None else (("target", read(asked)),),
        trainer=trainer,
        fingerprint="f",
        seed=0,
        asked=None if reward is None else Asked(engine, tuple(sets[0]), reward, **external),
    )


SMALL = examples(0, False, LETTERS, "t")


@pytest.fixture(scope="module")
def exact() -> Pool:
    return pool(SMALL, build_reward(EXACT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all selections with one trajectory: what is trained once need not be trained by every test."""
    return tmp_path_factory.mktemp("selections")


@pytest.fixture(scope="module")
def scores(exact: Pool, folder: Path) -> tuple[np.ndarray, ...]:
    return score(exact, SELECTOR, folder)


def policy(**fields: Any) -> SelectorConfig:
    assert SELECTOR.policy is not None
    return dataclasses.replace(SELECTOR, policy=dataclasses.replace(SELECTOR.policy, **fields))


def good(part: Any) -> np.ndarray:
    return np.array(["good" in identifier for identifier in part.ids])


def test_what_raises_the_reward_scores_high(exact: Pool, scores: tuple[np.ndarray, ...]) -> None:
    first, second = scores
    right = good(exact.train[0])
    found = roc_auc_score(right, first)
    rng = np.random.default_rng(0)
    by_chance = [roc_auc_score(rng.permutation(right), first) for _ in range(200)]
    assert found > 0.8 and found > max(by_chance)
    # Answers to other prompts raise no reward here.
    both = np.concatenate([first[right], second])
    assert roc_auc_score(np.repeat([1, 0], [right.sum(), len(second)]), both) > 0.75


def test_each_domain_is_scored_for_its_own_prompts(folder: Path) -> None:
    subject = pool(None, build_reward(EXACT))
    found = score(subject, dataclasses.replace(SELECTOR, targets=()), folder)
    for part, values in zip(subject.train, found, strict=True):
        assert roc_auc_score(good(part), values) > 0.75


def test_less_and_nice_share_one_trajectory(
    tmp_path: Path, exact: Pool, scores: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, written = [], []
    fit, write = Trainer.fit, Store.write
    monkeypatch.setattr(Trainer, "fit", lambda *args, **options: fits.append(1) or fit(*args, **options))
    monkeypatch.setattr(
        Store, "write", lambda store, *args, **options: written.append(store.folder) or write(store, *args, **options)
    )
    less = SelectorConfig(kind="less", targets=(TARGET,), warmup_epochs=2, warmup_examples=192, k=1024)
    score(dataclasses.replace(pool(SMALL, None), trainer=exact.trainer), less, tmp_path)
    before = len(written)
    found = score(exact, SELECTOR, tmp_path)
    assert len(fits) == 1 and len(list(tmp_path.glob("trajectory-*"))) == 1
    assert sum("trajectory" in str(place) for place in written[:before]) == 2
    assert not any("trajectory" in str(place) for place in written[before:])
    for one, other in zip(found, scores, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_was_found_out_is_said_again(tmp_path: Path, exact: Pool) -> None:
    first, again = [], []
    score(dataclasses.replace(exact, say=first.append), SELECTOR, tmp_path)
    score(dataclasses.replace(exact, say=again.append), SELECTOR, tmp_path)
    assert again == first
    assert any("mean reward" in line for line in first) and any("sketch error" in line for line in first)


class Killed(BaseException):
    pass


def dying(real: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Raises in the call of this number."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Killed
        return real(*args, **options)

    return call


def test_a_killed_run_goes_on_to_the_same_scores(
    tmp_path: Path, exact: Pool, scores: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duet_jax.selection.replies.PART", 3)
    monkeypatch.setattr("duet_jax.selection.replies.FILLS", 0)
    asked, sampled = exact.asked, []
    assert asked is not None
    step, reward = exact.trainer.step, asked.reward

    def killed(patch: Callable[[pytest.MonkeyPatch], None], subject: Pool = exact) -> None:
        with monkeypatch.context() as patched:
            patch(patched)
            with pytest.raises(Killed):
                score(subject, SELECTOR, tmp_path)

    killed(lambda patch: patch.setitem(exact.trainer.__dict__, "step", dying(step, 30)))
    killed(lambda patch: patch.setattr(Store, "write", dying(Store.write, 1)))  # of training examples
    killed(lambda patch: patch.setattr(Deployed, "sample", dying(Deployed.sample, 2)))
    failing = dataclasses.replace(reward, function=dying(reward.function, 1))
    killed(lambda patch: None, dataclasses.replace(exact, asked=dataclasses.replace(asked, reward=failing)))
    killed(lambda patch: patch.setattr(Store, "write", dying(Store.write, 1)))  # of prompts
    killed(lambda patch: patch.setattr(Point, "each", dying(Point.each, 1)))  # of what measures the error
    killed(lambda patch: patch.setattr(Deployed, "sample", dying(Deployed.sample, 2)))  # at the second checkpoint
    killed(lambda patch: patch.setattr("duet_jax.selection.nice.utilities", dying(len, 1)))
    real = Deployed.sample
    monkeypatch.setattr(Deployed, "sample", lambda *args, **options: sampled.append(1) or real(*args, **options))
    again = score(exact, SELECTOR, tmp_path)
    assert not sampled, "what was sampled once is not sampled again"
    for one, other in zip(scores, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_compat_is_the_published_sampler_estimator_and_score(
    tmp_path: Path, exact: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and distribution as they are used, and scores written out from the stores."""
    drawn, weighed = [], []
    sample, weights = Deployed.sample, policy_gradient.weights
    monkeypatch.setattr(
        Deployed, "sample", lambda model, prompts, s, **rest: drawn.append(s) or sample(model, prompts, s, **rest)
    )
    monkeypatch.setattr(
        "duet_jax.selection.nice.weights",
        lambda e, rewards, **rest: weighed.append((rewards, weights(e, rewards, **rest))) or weighed[-1][1],
    )
    chosen = dataclasses.replace(policy(compat=True, temperature=1.2), form="code")
    found = np.concatenate(score(exact, chosen, tmp_path))
    assert set(drawn) == {Sampling(1.2, top_k=50, top_p=0.95)} and len(weighed) == 2
    for rewards, given in weighed:
        np.testing.assert_allclose(given.values, rewards / rewards.shape[1], rtol=1e-6)
    (trajectory,), (place,) = tmp_path.glob("trajectory-*"), tmp_path.glob("nice-*")
    rates = learning_rates(exact.warm_up_trainer(2).settings, 48).reshape(2, 24).mean(axis=1)
    expected = np.zeros(len(found))
    for epoch, weight in enumerate(rates / rates.sum(), start=1):
        train = Store.open(trajectory / f"epoch-{epoch}" / "adam_less_code-1024-int8").take()
        targets = Store.open(place / f"epoch-{epoch}" / "targets").take()
        targets = targets[np.any(targets != 0, axis=1)]
        cosines = train @ targets.T / np.linalg.norm(train, axis=1)[:, None] / np.linalg.norm(targets, axis=1)
        expected += weight * cosines.mean(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_targets_of_zeros_are_left_out_of_a_mean_of_cosines() -> None:
    targets = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    found = queries(targets, np.array([0, 0, 1, 2]), "mean_of_cosines")
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"advantage": "optimal", "token_mean": True},
        {"advantage": "gold"},
        {"advantage": "none", "variant": "hard_rejection", "top": 6},
        {"variant": "rejection", "worst_case_protection": True, "temperature": 1.5, "min_p": 0.02},
        {"guidance": True, "stop": ("\n",)},
    ],
)
def test_every_estimator_finds_right_answers(
    exact: Pool, folder: Path, scores: tuple[np.ndarray, ...], fields: dict[str, Any]
) -> None:
    first, _ = score(exact, policy(**fields), folder)
    # By chance it is 0.5, with a standard error of 0.06.
    assert roc_auc_score(good(exact.train[0]), first) > 0.69


def test_replies_from_a_file(
    tmp_path: Path, exact: Pool, folder: Path, scores: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "replies.jsonl"
    rows = [{"id": example.id, "replies": [str(RIGHT[0][example.prompt]), *PROMPTS[0][:3]]} for example in SMALL]
    write_rows(path, rows)
    asked = exact.asked
    assert asked is not None
    given = external_samples(path, exact.targets[0][1], TOKENIZER, 2)
    subject = dataclasses.replace(exact, asked=dataclasses.replace(asked, external=given))
    monkeypatch.setattr(Deployed, "sample", None)
    selector = policy()
    selector = dataclasses.replace(selector, policy=PolicyConfig(external=str(path), max_new_tokens=2))
    first, _ = score(subject, selector, folder)
    assert roc_auc_score(good(exact.train[0]), first) > 0.85
    single = dataclasses.replace(given, **{n: getattr(given, n)[:, :1] for n in ("ids", "lengths")})
    alone = dataclasses.replace(exact, asked=dataclasses.replace(asked, external=single))
    with pytest.raises(DataError, match="has one reply to each prompt, but the advantage 'leave_one_out' compares"):
        score(alone, dataclasses.replace(selector, k=512), tmp_path)


def constant(replies: Sequence[str], asked: Sequence[Example]) -> list[float]:
    """Replies to small letters are all worth the same."""
    return [0.5 if e.prompt in PROMPTS[0] else float(r == e.response) for r, e in zip(replies, asked, strict=True)]


def test_prompts_without_signal_are_told(folder: Path, scores: tuple[np.ndarray, ...]) -> None:
    said: list[str] = []
    reward = Reward("constant", 0.0, 1.0, False, "constant", constant)
    with pytest.raises(DataError, match="no prompt of target says what to prefer: all replies to it count the same"):
        score(dataclasses.replace(pool(SMALL, reward), say=said.append), SELECTOR, folder)
    assert "prompts without signal, which are left out: target 5 of 5" in said[-1]
    both = dataclasses.replace(pool(None, reward), say=said.append)
    first, second = score(both, dataclasses.replace(SELECTOR, targets=()), folder)
    assert said[-1] == "nice: no prompt of 'small' has a signal at any checkpoint; its examples all score 0"
    assert not first.any() and roc_auc_score(good(both.train[1]), second) > 0.75
    # Among given targets the silent one is no floor of 0 under the other's scores.
    named = tuple(zip(("small", "capital"), both.validation, strict=True))
    found = score(dataclasses.replace(both, targets=named), SELECTOR, folder)
    np.testing.assert_allclose(found[1], second, atol=1e-6)
    assert min(map(np.min, found)) < 0
