"""Weights and configurations in the Hugging Face layout, to and from our parameter tree.

`stack` fills the tree from any source of named tensors, one stacked kind of layer at a time, so that loading
needs the parameters once, plus one kind. GGUF files share it (`gguf_file.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duet_jax.errors import ModelError
from duet_jax.models.llama import LlamaConfig, Params, shapes
from duet_jax.models.rope import RopeScaling
from duet_jax.models.tokenizer import read_json

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")

# Where each leaf of the tree lies in a Hugging Face file. Kernels lie there as [out, in].
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.o.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.down.kernel": "model.layers.{}.mlp.down_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Named tensors of a file or of several, read one at a time.

    Attributes:
      shapes: shape of every tensor in the source's own layout (kernels `[out, in]`).
      read: a tensor's values, any float dtype.
      source: what errors call the source.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    source: str


def stack(config: LlamaConfig, tensors: Tensors, names: Mapping[str, str], *, dtype: Any) -> Params:
    """Fills the parameter tree of `llama.init` from named tensors.

    Args:
      config: shape of the network, which says which tensors there must be.
      tensors: exactly those tensors.
      names: for each leaf (`"layers.q.kernel"`) the tensor's name, with `{}` for the layer.
      dtype: dtype of the parameters.

    Raises:
      ModelError: a tensor is missing, unexpected or of another shape than the configuration says.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(config, dtype))
    plan = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape) for path, leaf in leaves]
    _check(tensors, _expected(plan, names, config.num_layers))
    arrays = []
    for leaf, shape in plan:
        kernel = leaf.endswith(".kernel")
        stacked = np.empty(shape, np.dtype(dtype))
        if leaf.startswith("layers."):
            for layer in range(config.num_layers):
                values = tensors.read(names[leaf].format(layer))
                stacked[layer] = values.T if kernel else values
        else:
            stacked[...] = tensors.read(names[leaf])
        arrays.append(jnp.asarray(stacked))
    return jax.tree_util.tree_unflatten(tree, arrays)


def _expected(
    plan: Iterable[tuple[str, tuple[int, ...]]], names: Mapping[str, str], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the leaves of `plan` are made of."""
    expected = {}
    for leaf, shape in plan:
        if leaf.startswith("layers."):
            one = shape[:0:-1] if leaf.endswith(".kernel") else shape[1:]
            expected.update({names[leaf].format(layer): one for layer in range(num_layers)})
        else:
            expected[names[leaf]] = shape
    return expected


def _check(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        found = tensors.shapes.get(name)
        if found is None:
            raise ModelError(f"{tensors.source} lacks the tensor {name}, expected with shape {list(shape)}.")
        if tuple(found) != shape:
            raise ModelError(
                f"{tensors.source}: tensor {name} has shape {list(found)}, but the configuration expects {list(shape)}."
            )
    unexpected = sorted(set(tensors.shapes) - set(expected))
    if unexpected:
        raise ModelError(
            f"{tensors.source} has {len(unexpected)} tensors that its configuration has no place for, "
            f"first {unexpected[0]} of shape {list(tensors.shapes[unexpected[0]])}."
        )


def read_folder(folder: Path, *, dtype: Any) -> tuple[LlamaConfig, Params]:
    """Configuration and parameters of a Hugging Face folder with safetensors weights."""
    config = parse_config(read_config(folder), source=str(folder / "config.json"))
    tensors = open_safetensors(folder)
    kept = used_shapes(tensors)
    head, embedding = NAMES["head"], NAMES["embedding"]
    if config.tie_embeddings and head in kept:
        if not np.array_equal(tensors.read(head), tensors.read(embedding)):
            raise ModelError(
                f"{folder}: config.json ties the output to the embedding, but {head} differs from {embedding}."
            )
        del kept[head]
    return config, stack(config, dataclasses.replace(tensors, shapes=kept), NAMES, dtype=dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder. Raises ModelError where there is none."""
    raw = read_json(folder / "config.json")
    if not raw:
        raise ModelError(f"{folder} has no config.json; expected a Hugging Face model folder.")
    return raw


def used_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors but those that old or wider formats carry without effect."""
    kept = dict(tensors.shapes)
    for name in tensors.shapes:
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old files carry
            del kept[name]
        elif re.fullmatch(r"model\.layers\.\d+\.self_attn\.o_proj\.bias", name):
            # `attention_bias` gives the output projection a bias as well, which our decoder has not.
            if np.any(tensors.read(name)):
                raise ModelError(f"{tensors.source}: {name} is not zero, and a bias after attention is not supported.")
            del kept[name]
    return kept


def open_safetensors(folder: Path) -> Tensors:
    """All tensors of `model.safetensors` or of the shards in `model.safetensors.index.json`."""
    index_path = folder / "model.safetensors.index.json"
    index = read_json(index_path).get("weight_map", {})
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise ModelError(f"{index_path}: weight_map must give the file of each tensor.")
    paths = sorted({folder / Path(shard).name for shard in index.values()})
    if not paths:
        paths = [folder / "model.safetensors"]
    files, where = [], {}
    for path in paths:
        if not path.is_file():
            raise ModelError(
                f"{folder} lacks the weight file {path.name}; weights must be safetensors "
                "(pickled .bin files are never read)."
            )
        try:
            file = safe_open(str(path), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
        files.append(file)
        where.update({name: file for name in file.keys()})  # noqa: SIM118 (not a mapping)
    lost = sorted(set(index) - set(where))
    if lost:
        raise ModelError(f"{folder}: the index names {lost[0]}, but no shard holds it.")
    found = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    return Tensors(found, lambda name: where[name].get_tensor(name), str(folder))


def parse_config(raw: Mapping[str, Any], *, source: str = "config.json") -> LlamaConfig:
    """A Hugging Face `config.json` as our configuration.

    Raises:
      ModelError: the architecture, its activation or its RoPE type is not supported, or a size is missing.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelError(f"{source}: model_type {kind!r} is not supported; supported are {', '.join(MODEL_TYPES)}.")
    _refuse_variants(raw, source)

    def size(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{source}: {key} must be a positive integer, not {value!r}.")
        return value

    heads, kv_heads = size("num_attention_heads"), size("num_key_value_heads", raw.get("num_attention_heads"))
    if heads % kv_heads:
        raise ModelError(f"{source}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
    theta, scaling = _rope(raw, source)
    return LlamaConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size("head_dim", 128 if kind == "qwen3" else size("hidden_size") // heads),
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6, source),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias", False)),
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_length=size("max_position_embeddings", 2048),
        sliding_window=_sliding_window(raw, source),
    )


def _positive(raw: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{source}: {key} must be a positive number, not {value!r}.")
    return float(value)


def _refuse_variants(raw: Mapping[str, Any], source: str) -> None:
    """Variants of a supported family that would load but compute something else."""
    required = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False,),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, 1.0),
    }
    for key, accepted in required.items():
        if raw.get(key, accepted[0]) not in accepted:
            raise ModelError(f"{source}: {key}={raw[key]!r} is not supported; it must be {accepted[0]!r} or absent.")


def _rope(raw: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from old (`rope_scaling`) and new (`rope_parameters`) files."""
    fields = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(field, Mapping) for field in fields):
        raise ModelError(f"{source}: rope_scaling must be an object or absent, not {raw.get('rope_scaling')!r}.")
    rope = {**fields[0], **fields[1]}
    theta = _positive(rope, "rope_theta", _positive(raw, "rope_theta", 10000.0, source), source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError(
            f"{source}: RoPE type {kind!r} is not supported as {rope}; "
            f"supported are {', '.join(ROPE_TYPES)} over whole heads."
        )
    if kind == "default":
        return theta, None
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for name in names:
        if rope.get(name) is None:
            raise ModelError(f"{source}: RoPE type {kind!r} needs the field {name!r}.")
    factor, *rule = (_positive(rope, name, 1.0, source) for name in names)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    return theta, RopeScaling("llama3", factor, rule[0], rule[1], int(rule[2]))


def _sliding_window(raw: Mapping[str, Any], source: str) -> int | None:
    kind, window = raw["model_type"], raw.get("sliding_window")
    if kind == "llama":
        return None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ModelError(f"{source}: sliding_window must be a positive integer or null, not {window!r}.")
    if kind == "mistral":
        return raw.get("sliding_window", 4096)
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return None
    layers = raw["num_hidden_layers"]
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise ModelError(
            f"{source}: a sliding window in some layers only is not supported; set use_sliding_window to false."
        )
    return raw["sliding_window"] if kinds[0] == "sliding_attention" else None


def config_dict(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a configuration, under the model type that computes the same."""
    kind = "llama"
    if config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias:
        kind = "qwen2"
    elif config.sliding_window is not None:
        kind = "mistral"
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    raw: dict[str, Any] = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_dict(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "torch_dtype": dtype,
    }
    if kind == "mistral":
        raw["sliding_window"] = config.sliding_window
    elif kind != "llama":
        raw["attention_bias"] = config.qkv_bias
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["sliding_window"] = config.sliding_window
        raw["max_window_layers"] = 0
    return raw


def _rope_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


def write_folder(config: LlamaConfig, params: Params, folder: Path, *, token_ids: Mapping[str, Any]) -> None:
    """Writes `model.safetensors`, then `config.json` with `token_ids` (`bos_token_id`, ...) added.

    The configuration comes last: a folder that has one is complete.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        leaf = jax.tree_util.keystr(path, simple=True, separator=".")
        array = np.asarray(value)
        if not leaf.startswith("layers."):
            tensors[NAMES[leaf]] = array
            continue
        for layer, values in enumerate(array):
            values = values.T if leaf.endswith(".kernel") else values
            tensors[NAMES[leaf].format(layer)] = np.ascontiguousarray(values)
    if config.qk_norm and config.qkv_bias:
        # Qwen3's reader expects a bias here too wherever q, k and v have one.
        zeros = np.zeros(config.hidden_size, tensors[NAMES["norm"]].dtype)
        for layer in range(config.num_layers):
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = zeros.copy()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    raw = {**config_dict(config, str(tensors[NAMES["norm"]].dtype)), **token_ids}
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
