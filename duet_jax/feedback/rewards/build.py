"""Rewards from their configuration."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from duet_jax.feedback import answers
from duet_jax.feedback.rewards import choice, numeric, text, unit_tests
from duet_jax.feedback.rewards.cache import cached, everything
from duet_jax.feedback.rewards.judge import judge
from duet_jax.feedback.rewards.python import python
from duet_jax.feedback.rewards.reward import Reward, accept, code_digest
from duet_jax.feedback.rewards.reward_model import reward_model
from duet_jax.feedback.rewards.sandbox import Limits

if TYPE_CHECKING:
    from duet_jax.config import RewardConfig


def build_reward(config: RewardConfig, cache_folder: Path | None = None) -> Reward:
    """The reward that a configuration describes. What it needs is loaded here: models, modules, the sandbox.

    Args:
      config: see there.
      cache_folder: where values that cost something are kept (unit tests, models, functions); None keeps none. The
        values of all other kinds are faster computed than looked up.

    Raises:
      ConfigError: there is no such function.
      ModelError: there is no such model.
      FeedbackError: programs are to be run, and this machine cannot isolate them.
    """
    kind = config.kind
    if kind == "python":
        assert config.function is not None
        low = -math.inf if config.low is None else config.low
        high = math.inf if config.high is None else config.high
        reward = python(config.function, low=low, high=high, needs_label=config.needs_label, workers=config.workers)
        return cached(reward, cache_folder, reads=everything, part=max(16, 4 * config.workers))
    if kind in ("reward_model", "judge"):
        assert config.model is not None
        if kind == "judge":
            reward = judge(config.model, reference=config.reference, batch_size=config.batch_size, dtype=config.dtype)
        else:
            reward = reward_model(config.model, batch_size=config.batch_size, dtype=config.dtype)
        return cached(reward, cache_folder, part=8 * config.batch_size)
    if kind == "unit_tests":
        limits = Limits(
            cpu_seconds=config.seconds, wall_seconds=5.0 * config.seconds, memory_bytes=config.memory_mb * 2**20
        )
        function = unit_tests.unit_tests(limits, unsafe=config.unsafe)
        identity = unit_tests.identity(limits, unsafe=config.unsafe)
        return cached(Reward(kind, 0.0, 1.0, False, identity, function, unit_tests.exam), cache_folder)
    return _of_text(config)


def _of_text(config: RewardConfig) -> Reward:
    needs_label, requires = True, accept
    if config.kind == "regex":
        assert config.pattern is not None
        function = text.matches(re.compile(config.pattern), config.where)
        needs_label = False
    elif config.kind == "length":
        function = text.length(config.unit, config.minimum, config.maximum)
        needs_label = False
    elif config.kind == "numeric":
        function, requires = numeric.equals_reference(config.tolerance), numeric.require_number
    elif config.kind == "multiple_choice":
        function, requires = choice.right_choice, choice.require_choices
    else:
        function = {"exact_match": text.exact_match, "token_f1": text.token_f1, "rouge_l": text.rouge_l}[config.kind]
    identity = f"{config!r} {code_digest(answers, text, numeric, choice)}"
    return Reward(config.kind, 0.0, 1.0, needs_label, identity, function, requires)
