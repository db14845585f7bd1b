"""NICE (Wang et al., ICML 2025): training examples whose steps of Adam raise the reward of the model's own replies.

As LESS, on the same trajectory, but a target's gradient is the policy gradient of a reward, which need not be
differentiable nor compare with a label: at each checkpoint the model replies to every prompt several times, the
replies are rewarded, and the reward-weighted gradients of their log-probabilities are sketched. The score of an
example is the sum over checkpoints of its cosines with them, and the maximum over target sets.

Where we differ from the published code: see `influence.policy_gradient`, and that a prompt whose replies say nothing
is told and left out of the mean of its set, where the code counts it as a cosine of 0. All else is as in the code
with `policy.compat` and `form: code`, but for random numbers and projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax._files import save_array
from duet_jax.config import PolicyConfig, SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.processes import lead
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed
from duet_jax.influence.build import is_finished, measured_error, sketch
from duet_jax.influence.given import guided, labelled
from duet_jax.influence.header import require_comparable
from duet_jax.influence.policy_gradient import (
    PAPER_CODE,
    Estimator,
    Weights,
    covering,
    replies,
    squared_norms,
    target_sketches,
    weights,
)
from duet_jax.influence.scores import Checkpoint
from duet_jax.selection.pool import Asked, Pool
from duet_jax.selection.replies import Judged, Questions, judged
from duet_jax.selection.trajectory import Stage, stages, utilities

# Replies whose sketches are compared with their exact gradients at each checkpoint.
MEASURED = 8


class Labels(NamedTuple):
    """What an estimator that compares replies with labels needs: their rewards float64 `[prompts]`, and their ids."""

    rewards: np.ndarray
    rows: Encoded


def nice(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Scores float32 `[examples]` of each domain.

    Args:
      pool: what is scored, for which prompts, with what they are `asked`.
      selector: of kind "nice".
      folder: keeps replies, rewards and sketches of each checkpoint, and beside it stands the trajectory; a run that
        was killed goes on from what is there.

    Raises:
      ConfigError: there are too few replies a prompt for the estimator.
      DataError: a prompt has no tokens, a label is missing, or no reply says what to prefer.
      FeedbackError: a reply cannot be rewarded.
    """
    asked, policy = pool.asked, selector.policy
    assert asked is not None and policy is not None
    prompts = join([examples for _, examples in pool.sets])
    for identifier, length in zip(prompts.ids, prompts.lengths, strict=True):
        if not length:
            raise DataError(f"the prompt '{identifier}' is empty, and the model has no BOS to reply to; leave it out.")
    _check_external(asked, policy)
    subtasks = np.repeat(np.arange(len(pool.sets)), [len(examples) for _, examples in pool.sets])
    labels, questions = _labels(asked, policy, prompts), _questions(asked, policy, prompts, max(pool.trainer.buckets))
    asked.engine.require_room(questions.prompts, policy.max_new_tokens, "nice")
    if cut := questions.prompts.truncated:
        pool.say(f"nice: {cut} of {len(prompts)} prompts lose their beginning, at {max(pool.trainer.buckets)} tokens")
    checkpoints, signals = [], []
    for number, stage in enumerate(stages(pool, selector, folder.parent)):
        place = folder / stage.name
        found = judged(
            Deployed(asked.engine, stage.point.params, stage.point.lora),
            questions,
            policy,
            asked.reward,
            asked.external,
            place,
            seed=int(np.random.SeedSequence([pool.seed, 9, number]).generate_state(1)[0] >> 1),
            on_progress=pool.progress(f"{stage.name}, replies"),
        )
        weighed = _weights(pool, policy, stage, questions, found, labels, place)
        checkpoints.append(_checkpoint(pool, stage, questions, found, weighed, labels, place))
        signals.append(~weighed.zero_signal)
        pool.say(_report(pool, stage, found, signals[-1], subtasks))
    return _utilities(pool, selector, checkpoints, np.any(signals, axis=0), subtasks)


def _estimator(policy: PolicyConfig, external: bool) -> Estimator:
    variant = {name: getattr(policy, name) for name in ("variant", "top", "worst_case_protection", "token_mean")}
    if policy.compat:
        return dataclasses.replace(PAPER_CODE, **variant)
    # How probable a reply from elsewhere was there is not known.
    cap = None if external else policy.importance_cap
    return Estimator(advantage=policy.advantage, importance_cap=cap, **variant)


def _check_external(asked: Asked, policy: PolicyConfig) -> None:
    if asked.external is not None and asked.external.ids.shape[1] < 2 and policy.compares:
        raise DataError(
            f"{policy.external} has one reply to each prompt, but the advantage '{policy.advantage}' compares replies "
            f"with each other; give two or more, or take the advantage 'none'."
        )


def _labels(asked: Asked, policy: PolicyConfig, prompts: Encoded) -> Labels | None:
    """The labels of all prompts where the estimator needs them; with guidance they still answer the prompts alone."""
    if not _estimator(policy, False).needs_label:
        return None
    responses = [example.response for example in asked.examples]
    rows = labelled(prompts, responses, asked.engine.model.tokenizer)
    return Labels(lead(asked.reward, responses, asked.examples), rows)


def _questions(asked: Asked, policy: PolicyConfig, prompts: Encoded, max_length: int) -> Questions:
    if not policy.guidance:
        return Questions(prompts, asked.examples, ("",) * len(prompts))
    responses = [example.response for example in asked.examples]
    found = guided(prompts, responses, asked.engine.model.tokenizer, max_length)
    return Questions(found.prompts, asked.examples, found.beginnings)


def _weights(
    pool: Pool, policy: PolicyConfig, stage: Stage, questions: Questions, found: Judged, labels: Labels | None, at: Path
) -> Weights:
    assert pool.asked is not None
    samples, norms = found.samples, None
    if policy.advantage == "optimal":
        path = at / "squared-norms.npy"
        if not lead(path.is_file):
            exact = squared_norms(stage.point, questions.prompts, samples, pool.batching, token_mean=policy.token_mean)
            lead(save_array, path, exact)
        norms = np.load(path, allow_pickle=False)
    return weights(
        _estimator(policy, pool.asked.external is not None),
        found.rewards,
        log_probs=samples.log_probs.sum(axis=2, dtype=np.float64),
        sampled_log_probs=samples.sampled_log_probs.sum(axis=2, dtype=np.float64),
        gold_rewards=None if labels is None else labels.rewards,
        square_norms=norms,
    )


def _checkpoint(
    pool: Pool, stage: Stage, questions: Questions, found: Judged, weighed: Weights, labels: Labels | None, at: Path
) -> Checkpoint:
    """Sketches of training examples and prompts at one checkpoint; of a prompt without signal, zeros."""
    targets = target_sketches(
        stage.point,
        questions.prompts,
        found.samples,
        weighed,
        at / "targets",
        pool.batching,
        gold=None if labels is None else labels.rows,
        projection=stage.projection,
        on_progress=pool.progress(f"{stage.name}, targets"),
    )
    require_comparable(stage.train.header, targets.header)
    if not is_finished(targets):
        data = join(pool.train)
        rows = replies(questions.prompts, found.samples)
        chosen = np.random.default_rng(pool.seed).permutation(len(rows))[:MEASURED]
        some = rows.take(np.sort(chosen))
        batching = covering(pool.batching, questions.prompts, found.samples.ids.shape[2])
        store = sketch(stage.point, some, at / "measured", batching, projection=stage.projection, row_format="float32")
        error = measured_error(
            stage.point, (data, stage.train), (some, store), batching, feature=stage.feature, seed=pool.seed
        )
        lead(targets.finish, error._asdict())
        pool.say(f"nice, {stage.name}: {error}")
    return Checkpoint(stage.train, targets.take(), stage.weight)


def _report(pool: Pool, stage: Stage, found: Judged, signal: np.ndarray, subtasks: np.ndarray) -> str:
    """What the replies of one checkpoint were worth."""
    line = f"nice, {stage.name}: mean reward {found.rewards.mean():.3g} of {found.rewards.size} replies"
    if cut := int(np.count_nonzero(~found.samples.ended)):
        line += f", {cut} of which are cut at {found.samples.ids.shape[2]} tokens"
    silent = [
        f"{name} {count} of {len(examples)}"
        for (name, examples), count in zip(pool.sets, np.bincount(subtasks, ~signal).astype(int), strict=True)
        if count
    ]
    return line + (f"; prompts without signal, which are left out: {', '.join(silent)}" if silent else "")


def _utilities(
    pool: Pool, selector: SelectorConfig, checkpoints: Sequence[Checkpoint], signal: np.ndarray, subtasks: np.ndarray
) -> list[np.ndarray]:
    """Scores by the sets of which some prompt has a signal somewhere."""
    heard = np.bincount(subtasks, signal) > 0
    if not heard.any():
        raise DataError(
            f"no prompt of {', '.join(name for name, _ in pool.sets)} says what to prefer: all replies to it count the "
            f"same at every checkpoint; sample more replies, at a higher temperature, or give a finer reward."
        )
    for (name, _), known in zip(pool.sets, heard.tolist(), strict=True):
        if not known:
            without = "it has no part in the scores" if pool.targets else "its examples all score 0"
            pool.say(f"nice: no prompt of '{name}' has a signal at any checkpoint; {without}")
    if not pool.targets:
        return utilities(pool, selector, list(checkpoints), subtasks)
    # A set without signal has score 0 for all examples, which must not be the maximum of scores below 0.
    rows = heard[subtasks]
    checkpoints = [dataclasses.replace(one, targets=np.asarray(one.targets)[rows]) for one in checkpoints]
    return utilities(pool, selector, list(checkpoints), (np.cumsum(heard) - 1)[subtasks[rows]])
