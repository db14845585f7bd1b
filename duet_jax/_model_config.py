"""The part of a configuration that says which model there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, require


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A small decoder with random weights; its tokens are the characters of the data."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        whole = self.hidden_size % (2 * self.num_heads) == 0
        require(whole, "hidden_size", self.hidden_size, f"a multiple of 2 x num_heads ({2 * self.num_heads})")
        shared = self.num_heads % self.num_kv_heads == 0
        require(shared, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: exactly one of `source` and `scratch`.

    Attributes:
      source: Hugging Face folder, .gguf file, "package:NAME" or a hub name.
      scratch: shape of a model that starts from random weights.
      dtype: of matrix products.
      chat: whether prompts go through the chat template; None: where the model has one.
      remat: what the backward pass computes again: all but the matrix products ("products", the fastest), whole layers
        ("full", needs the least memory), or nothing ("none").
    """

    source: str | None = None
    scratch: ScratchConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: bool | None = None
    remat: Literal["none", "products", "full"] = "products"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.scratch is None):
            found = "neither is given" if self.source is None else "both are given"
            raise FieldError("source", f"or scratch must describe the model, exactly one of them; {found}.")
        require(self.source != "", "source", self.source, "a folder, a .gguf file, package:NAME or a hub name")
