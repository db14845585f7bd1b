"""The decoder one token at a time: prompts fill a key/value cache, then every step adds a token to each row.

Layers are separate arrays here and the loop over them is unrolled, not scanned as in `llama`: a scan would copy each
layer's kernels out of the stack in every step, which costs as much as the step itself. What a step costs is reading
all kernels once, whatever the number of rows, and the rows' part of the cache.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from duet_jax.distributed.target import platform
from duet_jax.models.attention import cached_attention, causal_attention
from duet_jax.models.llama import Block, LlamaConfig, Params, Pass, rms_norm
from duet_jax.models.lora import Lora
from duet_jax.models.packed import unpack
from duet_jax.models.rope import rotation


class Decoder(NamedTuple):
    """Parameters as steps read them.

    Attributes:
      layers: of each layer, its parameters and its adapters; kernels in the compute dtype.
      embedding: `[vocab, hidden]`.
      norm: `[hidden]`, scale of the last normalisation.
      head: `[vocab, hidden]` in the compute dtype.
    """

    layers: tuple[tuple[Params, dict[str, Any]], ...]
    embedding: Array
    norm: Array
    head: Array


class Cache(NamedTuple):
    """Keys `[rows, kv_heads, head_dim, slots]` and values `[rows, kv_heads, slots, head_dim]` of each layer."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def cache_dtype(compute_dtype: Any) -> Any:
    """The compute dtype, but for CPUs float32: they have no bfloat16 slices, so that every step would convert all."""
    return jnp.float32 if platform() == "cpu" else jnp.dtype(compute_dtype)


@partial(jax.jit, static_argnames=("config", "compute_dtype"))
def unstack(config: LlamaConfig, params: Params, lora: Lora | None, compute_dtype: Any) -> Decoder:
    """One layer after the other, kernels and output head rounded to the compute dtype once."""

    def of_layer(number: int, path: tuple, leaf: Array) -> Array:
        leaf = leaf[number]
        return unpack(leaf).astype(compute_dtype) if path[-1].key == "kernel" else leaf

    adapters = {} if lora is None else lora.adapters()
    layers = tuple(
        (
            jax.tree_util.tree_map_with_path(partial(of_layer, number), params["layers"]),
            jax.tree.map(lambda leaf, number=number: leaf[number], adapters),
        )
        for number in range(config.num_layers)
    )
    head = unpack(params["embedding"] if config.tie_embeddings else params["head"])
    return Decoder(layers, params["embedding"], params["norm"], head.astype(compute_dtype))


def adapted(decoder: Decoder, lora: Lora | None) -> Decoder:
    """The same parameters, which are not copied, with other adapters or with none."""
    adapters = {} if lora is None else lora.adapters()
    layers = tuple(
        (params, jax.tree.map(lambda leaf, number=number: leaf[number], adapters))
        for number, (params, _) in enumerate(decoder.layers)
    )
    return decoder._replace(layers=layers)


def logits(decoder: Decoder, hidden: Array) -> Array:
    """Scores of all tokens, float32 `[rows, vocab]`, after hidden states `[rows, hidden]`."""
    return jax.lax.dot_general(
        hidden.astype(decoder.head.dtype),
        decoder.head,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def prefill(
    config: LlamaConfig, decoder: Decoder, tokens: Array, lengths: Array, compute_dtype: Any
) -> tuple[Array, Cache]:
    """Whole prompts through the network.

    Args:
      config: static shape of the network.
      decoder: see `unstack`.
      tokens: int32 `[rows, T]`, padded on the right.
      lengths: int32 `[rows]`, at least 1.
      compute_dtype: dtype of matrix products.

    Returns:
      The hidden state of each prompt's last token, float32 `[rows, hidden]`, and a cache of T slots. Slots of padding
      hold keys that no query sees: `step` overwrites a slot before it is attended to.
    """
    dtype = cache_dtype(compute_dtype)
    keys: list[Array] = []
    values: list[Array] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        keys.append(k.transpose(0, 2, 3, 1).astype(dtype))
        values.append(v.transpose(0, 2, 1, 3).astype(dtype))
        return causal_attention(q, k, v, config.sliding_window)

    pass_ = Pass(compute_dtype, rotation(config, jnp.arange(tokens.shape[1])[None]))
    x = decoder.embedding[tokens].astype(jnp.float32)
    for params, adapters in decoder.layers:
        x = block(config, params)(x, adapters, pass_, attend)
    last = x[jnp.arange(len(tokens)), lengths - 1]
    return rms_norm(last, decoder.norm, config.rms_norm_eps, jnp.float32), Cache(tuple(keys), tuple(values))


def step(
    config: LlamaConfig, decoder: Decoder, token: Array, position: Array, cache: Cache, compute_dtype: Any
) -> tuple[Array, Cache]:
    """One token a row through the network.

    Args:
      config: static shape of the network.
      decoder: see `unstack`.
      token: int32 `[rows]`.
      position: int32 `[rows]`, the slot that each token takes; the rows need not agree.
      cache: of the tokens before.
      compute_dtype: dtype of matrix products.

    Returns:
      float32 hidden states `[rows, hidden]`, and the cache with the tokens' keys and values.
    """
    rows = jnp.arange(len(token))
    keys: list[Array] = []
    values: list[Array] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        number = len(keys)
        keys.append(cache.keys[number].at[rows, :, :, position].set(k[:, 0].astype(cache.keys[number].dtype)))
        values.append(cache.values[number].at[rows, :, position].set(v[:, 0].astype(cache.values[number].dtype)))
        return cached_attention(q, keys[-1], values[-1], position + 1, config.sliding_window)

    pass_ = Pass(compute_dtype, rotation(config, position[:, None]))
    x = decoder.embedding[token][:, None].astype(jnp.float32)
    for params, adapters in decoder.layers:
        x = block(config, params)(x, adapters, pass_, attend)
    hidden = rms_norm(x[:, 0], decoder.norm, config.rms_norm_eps, jnp.float32)
    return hidden, Cache(tuple(keys), tuple(values))


@lru_cache(maxsize=64)
def _graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, jnp.float32, rngs=nnx.Rngs(0))))


def block(config: LlamaConfig, params: Params) -> Block:
    """A decoder layer of these parameters, which are one layer's."""
    abstract = nnx.state(nnx.eval_shape(lambda: Block(config, jnp.float32, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(abstract, params)
    return nnx.merge(_graph(config), abstract)
