"""What the rewards of sampled replies make of their gradients: advantages, rejections and importance weights.

The variants of NICE (Wang et al., ICML 2025) as weights of replies, without any model: see `policy_gradient`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

import numpy as np

from duet_jax._checks import check_estimator, require
from duet_jax.errors import ConfigError, DataError

Advantage = Literal["leave_one_out", "none", "mean", "optimal", "gold"]
Variant = Literal["vanilla", "rejection", "hard_rejection"]
# By how much the published code lets a reply fall behind the label before `hard_rejection` drops it.
MARGIN = 1e-5


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What a reply's reward makes of its gradient.

    Attributes:
      advantage: what is subtracted from the rewards of a prompt's M replies. 'leave_one_out': the mean of the other
        M - 1; unbiased. 'none': nothing. 'mean': the mean of all M; (M - 1) / M times 'leave_one_out'. 'optimal': the
        other replies' estimate of E[R s^2] / E[s^2], s the norm of a reply's gradient, which has the least variance
        of all constants (Greensmith et al. 2004, section 4); unbiased, needs an extra pass. 'gold': the label's.
      variant: which replies count. 'vanilla': all, and their mean is taken. 'rejection': those with a positive
        reward, and the mean over them. 'hard_rejection': likewise those that are no worse than the label by more
        than 1e-5.
      top: the variants of rejection look at the `top` highest rewards alone, the first of equal ones; None: at all.
      worst_case_protection: where a rejection leaves none of a prompt's replies, its label counts as the one reply.
      token_mean: a reply's loss is the mean over its tokens, no longer their sum; J has no such gradient.
      importance_cap: replies count min(cap, pi(y|x) / q(y|x)), q what they were sampled from (Ionides 2008); 1 for
        plain sampling. Infinite: unbiased, but for what truncation can never sample. None: all count the same,
        whatever they were sampled from.

    Raises:
      ConfigError: a field is out of range, or needs another one.
    """

    advantage: Advantage = "leave_one_out"
    variant: Variant = "vanilla"
    top: int | None = None
    worst_case_protection: bool = False
    token_mean: bool = False
    importance_cap: float | None = 10.0

    def __post_init__(self) -> None:
        advantages, variants = get_args(Advantage), get_args(Variant)
        require(self.advantage in advantages, "advantage", self.advantage, f"one of {', '.join(advantages)}")
        require(self.variant in variants, "variant", self.variant, f"one of {', '.join(variants)}")
        check_estimator(self)

    @property
    def needs_label(self) -> bool:
        """Whether the reward of the label is asked for."""
        return self.variant == "hard_rejection" or self.worst_case_protection or self.advantage == "gold"


PAPER_CODE = Estimator(advantage="none", importance_cap=None)
"""The published code: plain rewards times gradients of the replies' summed losses, whatever they were sampled from.

Equal to it but for a positive factor, which cosines do not see: for `vanilla` it adds the M replies up where we take
their mean (a factor M, the same for all prompts); in rejection both divide by the number of replies that are kept.
Its flags are `variant`, `top=10` (its topk), `worst_case_protection` and `token_mean` (its do_normalize)."""


class Weights(NamedTuple):
    """What the gradient of each reply's loss is multiplied with; their sum estimates the gradient of -J.

    Attributes:
      values: float32 `[prompts, samples]`; 0 for a reply that has no part.
      gold: float32 `[prompts]`, of the label; 0 but under worst-case protection.
      zero_signal: bool `[prompts]`: nothing is left of the prompt, and its target row will be 0.
      token_mean: whether a reply's loss is the mean over its tokens rather than their sum.
    """

    values: np.ndarray
    gold: np.ndarray
    zero_signal: np.ndarray
    token_mean: bool


def weights(
    estimator: Estimator,
    rewards: np.ndarray,
    *,
    log_probs: np.ndarray,
    sampled_log_probs: np.ndarray,
    gold_rewards: np.ndarray | None = None,
    square_norms: np.ndarray | None = None,
) -> Weights:
    """Weights of replies from their rewards.

    Args:
      estimator: see there.
      rewards: `[prompts, samples]`.
      log_probs: of whole replies under the policy, `[prompts, samples]`; looked at for importance weights alone.
      sampled_log_probs: of whole replies under what they were sampled from, `[prompts, samples]`.
      gold_rewards: of the labels, `[prompts]`, where the estimator needs them.
      square_norms: squared norms of the gradients of the replies' losses, `[prompts, samples]`, for the advantage
        'optimal'; see `squared_norms`.

    Raises:
      ConfigError: the estimator needs labels, norms, several replies a prompt or log-probabilities that are not there.
      DataError: a reward is not finite.
      ValueError: shapes differ.
    """
    rewards = np.asarray(rewards, np.float64)
    _require_inputs(estimator, rewards, gold_rewards, square_norms)
    prompts, samples = rewards.shape
    gold = np.zeros(prompts) if gold_rewards is None else np.asarray(gold_rewards, np.float64)
    ratios = _ratios(estimator, np.asarray(log_probs, np.float64), np.asarray(sampled_log_probs, np.float64), rewards)
    optimal = estimator.advantage == "optimal"
    spread = np.square(ratios) * square_norms if optimal else np.ones_like(rewards)
    advantages, of_gold = _advantages(estimator, rewards, gold, spread)
    kept = _kept(estimator, rewards, gold)
    counts = kept.sum(axis=1) if estimator.variant != "vanilla" else np.full(prompts, samples)
    values = np.where(kept, ratios * advantages, 0) / np.maximum(counts, 1)[:, None]
    protected = ~kept.any(axis=1) & estimator.worst_case_protection
    values, of_gold = values.astype(np.float32), np.where(protected, of_gold, 0).astype(np.float32)
    return Weights(values, of_gold, ~(values.any(axis=1) | (of_gold != 0)), estimator.token_mean)


def _require_inputs(
    estimator: Estimator, rewards: np.ndarray, gold_rewards: np.ndarray | None, square_norms: np.ndarray | None
) -> None:
    if rewards.ndim != 2 or not rewards.size:
        raise ValueError(f"rewards have shape {rewards.shape}; they must be [prompts, samples]")
    if estimator.needs_label and gold_rewards is None:
        asking = "worst_case_protection" if estimator.worst_case_protection else f"variant {estimator.variant}"
        asking = "advantage gold" if estimator.advantage == "gold" else asking
        raise ConfigError(
            f"The policy gradient's {asking} compares replies with the label's reward, but there are no labels; "
            f"give the prompts labels, or choose another {asking.split()[0]}."
        )
    if estimator.advantage == "optimal" and square_norms is None:
        raise ConfigError("The advantage optimal needs the squared norms of the replies' gradients; pass square_norms.")
    if estimator.advantage in ("leave_one_out", "mean", "optimal") and rewards.shape[1] < 2:
        raise ConfigError(
            f"The advantage {estimator.advantage} compares a prompt's replies with each other, and there is one reply "
            f"a prompt; sample two or more, or take the advantage none."
        )
    for name, array, shape in (
        ("gold_rewards", gold_rewards, rewards.shape[:1]),
        ("square_norms", square_norms, rewards.shape),
    ):
        if array is not None and np.shape(array) != shape:
            raise ValueError(f"{name} have shape {np.shape(array)}; they must have {shape}, as the rewards do")
        if array is not None and not np.isfinite(array).all():
            raise DataError(f"{name} of prompt {int(np.argwhere(~np.isfinite(array))[0][0])} are not finite.")
    if not np.isfinite(rewards).all():
        prompt, reply = np.argwhere(~np.isfinite(rewards))[0].tolist()
        raise DataError(f"The reward of reply {reply} to prompt {prompt} is {rewards[prompt, reply]}, not finite.")


def _ratios(
    estimator: Estimator, log_probs: np.ndarray, sampled_log_probs: np.ndarray, rewards: np.ndarray
) -> np.ndarray:
    """Importance weights `[prompts, samples]`."""
    if log_probs.shape != rewards.shape or sampled_log_probs.shape != rewards.shape:
        raise ValueError(
            f"log-probabilities have shapes {log_probs.shape} and {sampled_log_probs.shape}; both must be those of "
            f"whole replies, {rewards.shape}"
        )
    if estimator.importance_cap is None:
        return np.ones_like(rewards)
    differences = log_probs - sampled_log_probs
    if not np.isfinite(differences).all():
        prompt, reply = np.argwhere(~np.isfinite(differences))[0].tolist()
        raise ConfigError(
            f"It is not known how probable reply {reply} to prompt {prompt} was where it was sampled; replies from "
            f"elsewhere have no importance weights, set importance_cap to null."
        )
    return np.exp(np.minimum(differences, np.log(estimator.importance_cap)))


def _advantages(
    estimator: Estimator, rewards: np.ndarray, gold: np.ndarray, spread: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards less a baseline: of replies `[prompts, samples]`, and of labels `[prompts]`."""
    if estimator.advantage == "none":
        return rewards, gold
    if estimator.advantage == "gold":
        return rewards - gold[:, None], np.zeros_like(gold)
    # Differences to the first reward: those of equal rewards are 0 exactly, whatever sums round to.
    first = rewards[:, :1]
    rewards, gold = rewards - first, gold - first[:, 0]
    # Where no other reply has a gradient, no baseline is better than their mean.
    others = 1 - np.eye(rewards.shape[1])
    spread = np.where((spread @ others > 0).all(axis=1, keepdims=True), spread, 1)
    pooled = np.sum(spread * rewards, axis=1) / np.sum(spread, axis=1)
    if estimator.advantage == "mean":
        return rewards - pooled[:, None], gold - pooled
    return rewards - (spread * rewards) @ others / (spread @ others), gold - pooled


def _kept(estimator: Estimator, rewards: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Which replies count, bool `[prompts, samples]`."""
    if estimator.variant == "vanilla":
        return np.ones(rewards.shape, bool)
    kept = rewards > (0 if estimator.variant == "rejection" else gold[:, None] - MARGIN)
    if estimator.top is not None:
        order = np.argsort(-rewards, axis=1, kind="stable")
        places = np.argsort(order, axis=1, kind="stable")
        kept &= places < estimator.top
    return kept
