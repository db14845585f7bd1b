"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves convention, and how they are stretched."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from duet_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    `linear` divides positions by `factor`; `llama3` divides only the low frequencies and blends in between
    (the Llama 3.1 release).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


def rope_frequencies(config: LlamaConfig) -> Array:
    """Angle per position of each rotary pair, float32 `[head_dim // 2]`, radians."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_length * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotation(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines, float32 `[B, T, 1, head_dim // 2]`, of the angles at positions `[B, T]`."""
    # Once for all layers: inside of them they would be computed again for every element that is rotated.
    angles = positions.astype(jnp.float32)[..., None, None] * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, by: tuple[Array, Array]) -> Array:
    """Rotary embedding of `x [B, T, N, H]` by `rotation`, halves convention."""
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
