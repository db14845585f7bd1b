"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) as an overlay on a frozen decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.models.linear import matmul, untapped
from duet_jax.models.packed import keep

if TYPE_CHECKING:
    from duet_jax.models.llama import LlamaConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers get adapters, and how large.

    `alpha / rank` scales the product of the two factors. `layers` are indices from 0, all when None.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of all layers, stacked like the decoder's own parameters.

    Attributes:
      factors: `{target: {"a": [L, in, rank], "b": [L, rank, out]}}`, the trainable part.
      scale: float32 `[L]`, `alpha / rank`, and 0 in layers without adapters, whose factors then get no
        gradient.
      dropout: probability that an input of an adapter is dropped where a key is given.
    """

    factors: dict[str, dict[str, Array]]
    scale: Array | np.ndarray
    dropout: Array | float = 0.0

    def adapters(self) -> dict[str, dict[str, Any]]:
        """One tree per target with a leading layer axis, ready to be scanned over."""
        rate = jnp.full(self.scale.shape, self.dropout, jnp.float32)
        return {
            name: {**factors, "scale": jnp.asarray(self.scale), "dropout": rate}
            for name, factors in self.factors.items()
        }


def widths(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Features into and out of each linear map of a layer."""
    size, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return {
        "q": (size, queries),
        "k": (size, keys),
        "v": (size, keys),
        "o": (queries, size),
        "gate": (size, inner),
        "up": (size, inner),
        "down": (inner, size),
    }


def init(config: LlamaConfig, lora: LoraConfig, *, key: Array) -> Lora:
    """Adapters that change nothing yet: `a` uniform as in the reference code's Kaiming rule, `b` zero."""
    count, factors, found = config.num_layers, {}, widths(config)
    for i, name in enumerate(TARGETS):
        if name not in lora.targets:
            continue
        features_in, features_out = found[name]
        bound = features_in**-0.5
        shape = (count, features_in, lora.rank)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        factors[name] = {"a": a, "b": jnp.zeros((count, lora.rank, features_out))}
    return dataclasses.replace(without_factors(config, lora), factors=factors)


def without_factors(config: LlamaConfig, lora: LoraConfig) -> Lora:
    """The constants of adapters, for factors that come from elsewhere.

    Raises:
      ValueError: a layer that the decoder does not have.
    """
    count = config.num_layers
    chosen = list(range(count) if lora.layers is None else lora.layers)
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"LoRA layers are {chosen}; the model's layers are 0 to {count - 1}.")
    scale = np.zeros(count, np.float32)
    scale[chosen] = lora.alpha / lora.rank
    return Lora({}, scale, lora.dropout)


def adapt(
    x: Array,
    adapter: dict[str, Any],
    compute_dtype: Any,
    tap: Callable[[str, Array, Array], Array] = untapped,
) -> Array:
    """What one layer's adapter adds to its output: `scale * dropout(x) @ a @ b`, `[..., out]`.

    `tap` sees the products with `"a"` (before the scale) and `"b"`.
    """
    key = adapter.get("key")
    if key is not None:
        kept = 1.0 - adapter["dropout"]
        mask = jax.random.bernoulli(key, kept, x.shape)
        x = jnp.where(mask, x / kept.astype(x.dtype), jnp.zeros((), x.dtype))
    narrow = tap("a", x, keep(matmul(x, adapter["a"], compute_dtype))) * adapter["scale"].astype(compute_dtype)
    return tap("b", narrow, matmul(narrow, adapter["b"], compute_dtype))


def merge(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Parameters of the plain decoder that computes what the adapted one does (dropout off)."""
    layers = dict(params["layers"])
    for name, factors in lora.factors.items():
        update = jnp.einsum("lir,lro,l->lio", factors["a"], factors["b"], lora.scale)
        kernel = layers[name]["kernel"]
        layers[name] = {**layers[name], "kernel": (kernel + update).astype(kernel.dtype)}
    return {**params, "layers": layers}
