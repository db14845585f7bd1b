"""One decoder for the Llama family: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3.

The `flax.nnx` modules below define parameters and forward pass; the functions after them are the same network
as pure functions of `(config, params)`, which is what the rest of the library calls. Layers are stacked on axis
0 and scanned, so that compile time does not grow with depth. Reading weight files is in `weights.py` and
`gguf_file.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from duet_jax.distributed.place import embed, spread
from duet_jax.models.attention import causal_attention
from duet_jax.models.linear import Taps, matmul, untapped
from duet_jax.models.lora import Lora, adapt
from duet_jax.models.packed import KEEP, keep, pack, unpack
from duet_jax.models.rope import RopeScaling, rotate, rotation

Params = dict[str, Any]
Remat = Literal["none", "products", "full"]
# Queries [B, T, N, H], keys and values [B, T, K, H] of new tokens to mixed values [B, T, N, H].
Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a decoder. Hashable: it is a static argument of every compiled function."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_length: int = 2048
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.")


def rms_norm(x: Array, scale: Array, eps: float, dtype: jnp.dtype) -> Array:
    """Root-mean-square normalisation over the last axis, computed in float32, returned in `dtype`."""
    x = x.astype(jnp.float32)
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(dtype)


def gated(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, computed in float32: rounding every step to bfloat16 is slower and less accurate."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class Linear(nnx.Module):
    """A kernel `[in, out]` and, where the family has one, a bias `[out]`."""

    def __init__(self, features_in: int, features_out: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs):
        scale = features_in**-0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (features_in, features_out), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), dtype))

    def __call__(self, name: str, x: Array, adapter: dict[str, Array] | None, pass_: Pass) -> Array:
        y = pass_.tap(name, x, matmul(x, self.kernel[...], pass_.dtype))
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(y.dtype)
        if adapter is not None:
            y = y + adapt(x, adapter, pass_.dtype, lambda factor, x, y: pass_.tap(f"{name}.{factor}", x, y))
        return y


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is common to all layers of one forward pass, and what watches the products of this layer."""

    dtype: Any
    rotation: tuple[Array, Array]
    remat: Remat = "none"
    tap: Callable[[str, Array, Array], Array] = untapped
    mesh: Mesh | None = None


class Block(nnx.Module):
    """One pre-norm decoder layer: attention, then a gated feed-forward network."""

    def __init__(self, config: LlamaConfig, dtype: Any, *, rngs: nnx.Rngs):
        self.config = config
        size, head = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * head, config.num_kv_heads * head
        bias = config.qkv_bias
        self.attention_norm = nnx.Param(jnp.ones((size,), dtype))
        self.q = Linear(size, queries, bias=bias, dtype=dtype, rngs=rngs)
        self.k = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.v = Linear(size, keys, bias=bias, dtype=dtype, rngs=rngs)
        self.o = Linear(queries, size, bias=False, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((head,), dtype))
            self.k_norm = nnx.Param(jnp.ones((head,), dtype))
        self.mlp_norm = nnx.Param(jnp.ones((size,), dtype))
        self.gate = Linear(size, config.intermediate_size, bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(size, config.intermediate_size, bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(config.intermediate_size, size, bias=False, dtype=dtype, rngs=rngs)

    def _heads(self, x: Array, adapters: dict, pass_: Pass) -> tuple[Array, Array, Array]:
        config = self.config
        split = (*x.shape[:2], -1, config.head_dim)
        q = self.q("q", x, adapters.get("q"), pass_).reshape(split)
        k = self.k("k", x, adapters.get("k"), pass_).reshape(split)
        v = self.v("v", x, adapters.get("v"), pass_).reshape(split)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.rms_norm_eps, q.dtype)
            k = rms_norm(k, self.k_norm[...], config.rms_norm_eps, k.dtype)
        return keep(rotate(q, pass_.rotation)), keep(rotate(k, pass_.rotation)), keep(v)

    def __call__(
        self,
        x: Array,
        adapters: dict,
        pass_: Pass,
        attend: Attend | None = None,
    ) -> Array:
        """Residual stream `[B, T, D]` float32 in and out; `attend` takes the place of causal attention."""
        config = self.config
        normed = rms_norm(x, self.attention_norm[...], config.rms_norm_eps, pass_.dtype)
        q, k, v = self._heads(normed, adapters, pass_)
        mixed = causal_attention(q, k, v, config.sliding_window) if attend is None else attend(q, k, v)
        mixed = mixed.reshape(*x.shape[:2], -1)
        x = x + keep(self.o("o", mixed, adapters.get("o"), pass_)).astype(x.dtype)
        normed = rms_norm(x, self.mlp_norm[...], config.rms_norm_eps, pass_.dtype)
        gate = keep(self.gate("gate", normed, adapters.get("gate"), pass_))
        up = keep(self.up("up", normed, adapters.get("up"), pass_))
        return x + self.down("down", gated(gate, up), adapters.get("down"), pass_).astype(x.dtype)


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm and (untied) output head."""

    def __init__(self, config: LlamaConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
        block_def = nnx.graphdef(nnx.eval_shape(lambda: Block(config, dtype, rngs=nnx.Rngs(0))))
        stacked = jax.vmap(lambda key: nnx.state(Block(config, dtype, rngs=nnx.Rngs(params=key))))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.layers = nnx.merge(block_def, stacked)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(
        self,
        tokens: Array,
        lora: Lora | None,
        dropout_key: Array | None,
        pass_: Pass,
        taps: Taps | None = None,
        attend: Attend | None = None,
    ) -> Array:
        """Final-norm hidden states float32 `[B, T, D]`."""
        block_def, layers = nnx.split(self.layers)

        def layer(x: Array, inputs: tuple) -> tuple[Array, None]:
            params, adapters, key, watched = inputs
            if key is not None:
                adapters = {
                    name: {**adapter, "key": jax.random.fold_in(key, i)}
                    for i, (name, adapter) in enumerate(sorted(adapters.items()))
                }
            this = pass_
            if taps is not None:
                this = dataclasses.replace(pass_, tap=lambda name, x, y: taps.observe(name, watched, x, y))
            return spread(pass_.mesh, nnx.merge(block_def, params)(x, adapters, this, attend)), None

        if pass_.remat != "none":
            layer = jax.checkpoint(layer, policy=KEEP if pass_.remat == "products" else None)
        adapters = {} if lora is None else lora.adapters()
        keys = None
        if lora is not None and dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_layers)
        x = embed(pass_.mesh, self.embedding[...], tokens).astype(jnp.float32)
        watched = None if taps is None else taps.layers
        x, _ = jax.lax.scan(layer, x, (layers, adapters, keys, watched))
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps, jnp.float32)


@lru_cache(maxsize=64)
def _graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))


def _module(config: LlamaConfig, params: Params) -> Llama:
    abstract = nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    own = {name: leaf for name, leaf in params.items() if name != "head" or not config.tie_embeddings}
    nnx.replace_by_pure_dict(abstract, own)
    return nnx.merge(_graph(config), abstract)


def init(config: LlamaConfig, *, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: kernels normal with standard deviation `in ** -0.5`, embeddings 0.02, norms 1."""
    return nnx.to_pure_dict(nnx.state(Llama(config, dtype, rngs=nnx.Rngs(params=key))))


def shapes(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """The tree of `init` with a `jax.ShapeDtypeStruct` at each leaf."""
    return jax.eval_shape(lambda: init(config, key=jax.random.key(0), dtype=dtype))


def frozen(params: Params, compute_dtype: Any) -> Params:
    """The same parameters for passes that do not train them: kernels and output head rounded to `compute_dtype` once.

    Every product rounds its kernel anyway, under rematerialisation three times a pass. On CPUs bfloat16 is packed. A
    head that is shared with the embedding gets an array of its own, so that the embedding stays as it is.
    """
    if jnp.dtype(compute_dtype).itemsize >= 4:
        return params

    def rounded(leaf: Array) -> Array:
        return leaf if leaf.dtype == jnp.uint16 else pack(leaf.astype(compute_dtype))

    def of_layers(path: tuple, leaf: Array) -> Array:
        return rounded(leaf) if path[-1].key == "kernel" else leaf

    layers = jax.tree_util.tree_map_with_path(of_layers, params["layers"])
    return {**params, "layers": layers, "head": rounded(params["head"] if "head" in params else params["embedding"])}


def output_head(params: Params) -> Array:
    """Rows that score each token of the vocabulary, `[vocab, hidden]`: `logits = hidden @ head.T`."""
    return unpack(params["head"] if "head" in params else params["embedding"])


def hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens: Array,
    *,
    lora: Lora | None = None,
    dropout_key: Array | None = None,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "none",
    taps: Taps | None = None,
    positions: Array | None = None,
    attend: Attend | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Final-norm hidden states of whole sequences.

    Args:
      config: static shape of the network.
      params: tree of `init`.
      tokens: int32 `[B, T]`, padded on the right: causal attention keeps padding from the tokens before it.
      lora: adapters added to the linear layers.
      dropout_key: key of LoRA dropout; none in evaluation.
      compute_dtype: dtype of matrix products; they accumulate in float32, as does the residual stream.
      remat: what a backward pass computes again rather than keeps: nothing ("none"; keeps every intermediate, which
        is slow on CPUs), all but the products and attention ("products"), or whole layers ("full").
      taps: watches the products of all layers.
      positions: int32 `[B, T]` of the tokens; None: one after the other, from 0.
      attend: takes the place of causal attention.
      mesh: the parameters lie on it by `distributed.rules`, and so do the sequences; None for one device.

    Returns:
      float32 `[B, T, D]`.
    """
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    pass_ = Pass(compute_dtype, rotation(config, positions), remat, mesh=mesh)
    return _module(config, params)(tokens, lora, dropout_key, pass_, taps=taps, attend=attend)
