"""Drawing the next token: temperature, then the truncations top-k, top-p and min-p, in the order of transformers.

There is no sorting of the vocabulary. A truncation keeps the tokens above a threshold, which bisection finds exactly
(32 sums over the vocabulary, for there are 2^32 floats), and a token is drawn by inverting the cumulative
distribution, from one uniform number a row: sums of blocks first, then the tokens of one block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax._checks import check_truncation, require

# Tokens that are summed up together when the cumulative distribution is inverted.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. Hashable: compiled programs depend on it.

    Attributes:
      temperature: divides the logits; 0 always takes the most probable token (the first of equals).
      top_k: keeps the so many most probable tokens; None keeps all.
      top_p: keeps the most probable tokens that together have at least this mass (Holtzman et al. 2020, arXiv
        1904.09751, section 3.1).
      min_p: keeps tokens with at least this share of the greatest probability (arXiv 2407.01082, section 3).

    Tokens that are as probable as the last one kept are kept as well.

    Raises:
      ConfigError: a field is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < float("inf")
        require(finite, "temperature", self.temperature, "a finite number of at least 0")
        check_truncation(self)


GREEDY = Sampling(temperature=0.0)


def draw(logits: Array, uniforms: Array, sampling: Sampling) -> tuple[Array, Array, Array]:
    """Draws one token a row.

    Args:
      logits: float32 `[rows, vocab]`.
      uniforms: float32 `[rows]` in [0, 1).
      sampling: what is drawn from.

    Returns:
      Tokens int32 `[rows]`, and their log-probabilities float32 `[rows]`: under the model, and under the truncated,
      tempered distribution they were drawn from (0 where it is greedy).
    """
    rows = jnp.arange(len(logits))
    most = jnp.max(logits, axis=1, keepdims=True)
    normaliser = (most[:, 0]) + jnp.log(jnp.sum(jnp.exp(logits - most), axis=1))
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        return token, logits[rows, token] - normaliser, jnp.zeros(len(logits))
    weights = jnp.exp((logits - most) / sampling.temperature)
    weights = _truncated(logits, weights, sampling)
    token, total = _invert(weights, uniforms)
    return token, logits[rows, token] - normaliser, jnp.log(weights[rows, token]) - jnp.log(total)


def _truncated(logits: Array, weights: Array, sampling: Sampling) -> Array:
    """The weights `[rows, vocab]`, 0 where a token is left out."""
    order = _ordered(logits)
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        # A token is kept if fewer than k are more probable.
        least = _threshold(order, jnp.ones_like(weights), jnp.full(len(logits), float(sampling.top_k)))
        weights = jnp.where(order >= least[:, None], weights, 0.0)
    if sampling.top_p < 1:
        # A token is kept if those that are more probable have less than the mass.
        least = _threshold(order, weights, sampling.top_p * jnp.sum(weights, axis=1))
        weights = jnp.where(order >= least[:, None], weights, 0.0)
    if sampling.min_p > 0:
        # The greatest weight is 1.
        weights = jnp.where(weights >= sampling.min_p, weights, 0.0)
    return weights


def _ordered(x: Array) -> Array:
    """Integers in the order of the floats x."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _threshold(order: Array, weights: Array, limit: Array) -> Array:
    """The smallest integer of each row above which there is less weight than `limit [rows]`."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = jnp.sum(jnp.where(order > middle[:, None], weights, 0.0), axis=1)
        return jnp.where(above < limit, low, middle), jnp.where(above < limit, middle, high)

    # Above `high` there is nothing; above `low` is everything, which need not be enough.
    low, high = jnp.min(order, axis=1) - 1, jnp.max(order, axis=1)
    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def _invert(weights: Array, uniforms: Array) -> tuple[Array, Array]:
    """Rows' tokens int32, the first whose cumulative weight exceeds its share `uniforms` of all, and all the weight."""
    count = weights.shape[1]
    blocks = jnp.pad(weights, [(0, 0), (0, -count % BLOCK)]).reshape(len(weights), -1, BLOCK)
    sums = jnp.sum(blocks, axis=2)
    total = jnp.sum(sums, axis=1)
    block, before = _first(sums, uniforms * total)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _first(inside, uniforms * total - before)
    return (block * BLOCK + place).astype(jnp.int32), total


def _first(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index of each row whose cumulative weight exceeds the target, and the weight before it."""
    cumulative = jnp.cumsum(weights, axis=1)
    positive = weights > 0
    # By rounding none may; then it is the last that has weight.
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    over = (cumulative > target[:, None]) & positive
    index = jnp.where(jnp.any(over, axis=1), jnp.argmax(over, axis=1), last)
    before = jnp.where(index > 0, jnp.take_along_axis(cumulative, jnp.maximum(index - 1, 0)[:, None], axis=1)[:, 0], 0)
    return index, before
