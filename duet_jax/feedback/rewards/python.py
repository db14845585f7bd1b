"""Any Python function of a reply and its example as a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.outside import load_function, source_of
from duet_jax.feedback.rewards.reward import Reward


def python(name: str, *, low: float = -math.inf, high: float = math.inf, needs_label: bool, workers: int = 1) -> Reward:
    """The reward of the function named `module:callable`, called with a reply and its example.

    Its identity includes the text of its module, so that a changed function is not answered from a cache.

    Args:
      name: modules of the working directory are found too.
      low, high: the range that its values lie in.
      needs_label: whether it reads the example's response or answers.
      workers: threads that call it.

    Raises:
      ConfigError: there is no such function.
    """
    function = load_function(name, "reward.function")

    def one(reply: str, example: Example) -> float:
        try:
            return function(reply, example)
        except Exception as error:  # whatever a stranger's function raises
            raise FeedbackError(
                f"The reward {name} failed for a reply to example {example.id}: {type(error).__name__}: {error}"
            ) from error

    def every(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, replies, examples))

    return Reward(name, low, high, needs_label, f"python {name} {low} {high} {source_of(function)}", every)
