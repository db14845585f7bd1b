"""What the best of several replies is worth."""

from __future__ import annotations

import math

import numpy as np


def best_of(rewards: np.ndarray, k: int) -> np.ndarray:
    """The expected highest reward of k of a prompt's n replies, drawn without replacement.

    For rewards of 0 and 1 this is pass@k as Chen et al. 2021 (arXiv 2107.03374, equation 1) estimate it, without bias.

    Args:
      rewards: `[prompts, n]`.
      k: from 1, which gives the mean, to n, which gives the maximum.

    Returns:
      float64 `[prompts]`.

    Raises:
      ValueError: k is not from 1 to n.
    """
    count = rewards.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}; it must be from 1 to {count}, the replies to a prompt.")
    # The i-th lowest is the highest of k if the others are among the i lower ones.
    shares = [math.comb(i, k - 1) / math.comb(count, k) for i in range(count)]
    return np.sort(np.asarray(rewards, np.float64), axis=1) @ np.array(shares)
