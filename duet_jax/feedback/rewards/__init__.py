"""Rewards: how good a reply is, by any function of the reply and the example that it answers."""

from duet_jax.feedback.rewards.build import build_reward
from duet_jax.feedback.rewards.cache import cached
from duet_jax.feedback.rewards.reward import Reward, of_parts

__all__ = ["Reward", "build_reward", "cached", "of_parts"]
