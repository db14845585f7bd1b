"""Models in GGUF files: metadata to our configuration and tokenizer, quantised blocks to numbers.

Reading the container and dequantising are the `gguf` package's. Llama files hold q and k with each head's rotary
pairs side by side; ours, like Hugging Face's, hold them as two halves, so these rows are put back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from duet_jax.errors import ModelError
from duet_jax.models.llama import LlamaConfig, Params
from duet_jax.models.rope import RopeScaling, rope_frequencies
from duet_jax.models.tokenizer import Tokenizer
from duet_jax.models.weights import Tensors, stack

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers.attention_norm": "blk.{}.attn_norm.weight",
    "layers.q.kernel": "blk.{}.attn_q.weight",
    "layers.q.bias": "blk.{}.attn_q.bias",
    "layers.k.kernel": "blk.{}.attn_k.weight",
    "layers.k.bias": "blk.{}.attn_k.bias",
    "layers.v.kernel": "blk.{}.attn_v.weight",
    "layers.v.bias": "blk.{}.attn_v.bias",
    "layers.o.kernel": "blk.{}.attn_output.weight",
    "layers.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.mlp_norm": "blk.{}.ffn_norm.weight",
    "layers.gate.kernel": "blk.{}.ffn_gate.weight",
    "layers.up.kernel": "blk.{}.ffn_up.weight",
    "layers.down.kernel": "blk.{}.ffn_down.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
# How a vocabulary of byte-level BPE splits text before merging.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a file says a token is. An unknown token is no text either.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
LLAMA3_SPLITS = ("llama-bpe", "llama3", "llama-v3")


def read(path: Path, *, dtype: Any) -> tuple[LlamaConfig, Params, Tokenizer]:
    """Configuration, parameters and tokenizer of a GGUF file.

    Raises:
      ModelError: the file is damaged, or of an architecture, quantisation or tokenizer that is not supported.
    """
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(field, tensors, path)
    permuted = field("general.architecture") == "llama"

    def values(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{path}: tensor {name} is quantised as {tensor.tensor_type.name}, which cannot be read."
            ) from error
        array = array.reshape(tensor.shape[::-1])
        if permuted and ".attn_q." in name:
            return _halves(array, config.num_heads)
        if permuted and ".attn_k." in name:
            return _halves(array, config.num_kv_heads)
        return array

    shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in tensors.items()}
    shapes.pop(ROPE_FACTORS, None)
    params = stack(config, Tensors(shapes, values, str(path)), NAMES, dtype=dtype)
    return config, params, _tokenizer(field, path)


def _config(field: Callable[..., Any], tensors: dict[str, Any], path: Path) -> LlamaConfig:
    kind = field("general.architecture")
    if kind not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}.")

    def of_kind(name: str, default: Any = None) -> Any:
        value = field(f"{kind}.{name}", default)
        if value is None:
            raise ModelError(f"{path} lacks the metadata {kind}.{name}.")
        return value

    heads, size = int(of_kind("attention.head_count")), int(of_kind("embedding_length"))
    scaling = of_kind("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"{path}: RoPE scaling {scaling!r} is not supported; supported are none and linear.")
    rope = None
    if scaling == "linear":
        rope = RopeScaling("linear", float(of_kind("rope.scaling.factor")))
    if NAMES["embedding"] not in tensors:
        raise ModelError(f"{path} lacks the tensor {NAMES['embedding']}.")
    head_dim = int(of_kind("attention.key_length", size // heads))
    if int(of_kind("rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(f"{path}: rotary embedding of part of a head is not supported.")
    kv_heads = of_kind("attention.head_count_kv", heads)
    if not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise ModelError(f"{path}: {heads} attention heads must be a multiple of its {kv_heads} key-value heads.")
    config = LlamaConfig(
        vocab_size=int(tensors[NAMES["embedding"]].shape[1]),
        hidden_size=size,
        intermediate_size=int(of_kind("feed_forward_length")),
        num_layers=int(of_kind("block_count")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest(of_kind("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(of_kind("rope.freq_base", 10000.0)),
        rope_scaling=rope,
        qkv_bias=NAMES["layers.q.bias"].format(0) in tensors,
        qk_norm=NAMES["layers.q_norm"].format(0) in tensors,
        tie_embeddings=NAMES["head"] not in tensors,
        max_length=int(of_kind("context_length")),
        sliding_window=field(f"{kind}.attention.sliding_window"),
    )
    if ROPE_FACTORS in tensors:
        return _with_llama3_rope(config, np.asarray(tensors[ROPE_FACTORS].data, np.float32), path)
    return config


def _shortest(value: float) -> float:
    """The decimal number that a float32 was written for: 1e-5, and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _with_llama3_rope(config: LlamaConfig, factors: np.ndarray, path: Path) -> LlamaConfig:
    """Llama 3.x files hold what its scaling divides each frequency by, not the rule; it is found again here."""

    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", float(factors.max())))
    expected = np.asarray(rope_frequencies(config) / rope_frequencies(scaled))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError(f"{path}: the RoPE factors in {ROPE_FACTORS} are not those of Llama 3; not supported.")
    return scaled


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs (0, 1), (2, 3), ... of each head's rows as two halves."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(field: Callable[..., Any], path: Path) -> Tokenizer:
    kind = field("tokenizer.ggml.model")
    tokens = field("tokenizer.ggml.tokens")
    if tokens is None or kind not in ("gpt2", "llama"):
        raise ModelError(f"{path}: its tokenizer is of kind {kind!r}; supported are gpt2 (BPE) and llama (SPM).")
    backend = _bpe(field, tokens, path) if kind == "gpt2" else _sentencepiece(field, tokens)
    types = field("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    ends = [field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos_ids = tuple(dict.fromkeys(int(end) for end in ends if end is not None))
    bos_id = field("tokenizer.ggml.bos_token_id")
    pad_id = field("tokenizer.ggml.padding_token_id")
    # Files may leave the flag out; these two kinds were trained with BOS.
    wants_bos = kind == "llama" or field("tokenizer.ggml.pre") in LLAMA3_SPLITS
    add_bos = bos_id is not None and bool(field("tokenizer.ggml.add_bos_token", wants_bos))
    if add_bos:
        # For other tools that read this tokenizer once it is saved; ours ask `add_bos`.
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=next(iter(eos_ids), 0) if pad_id is None else int(pad_id),
        chat_template=field("tokenizer.chat_template"),
        add_bos=add_bos,
    )


def _bpe(field: Callable[..., Any], tokens: list[str], path: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE, with the splitting that the file names."""
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges", [])]
    split = field("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    llama3 = split in LLAMA3_SPLITS
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama3))
    whole = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    if split in ("default", "gpt-2"):
        backend.pre_tokenizer = whole(use_regex=True)
    elif split in ("smollm", "starcoder", "refact", "command-r"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, whole(use_regex=True)])
    elif llama3 or split == "qwen2":
        numbers = r"\p{N}{1,3}" if llama3 else r"\p{N}"
        pattern = tokenizers.Regex("|".join((_LETTERS, numbers, _REST)))
        pieces = pre_tokenizers.Split(pattern, "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, whole(use_regex=False)])
        if not llama3:
            backend.normalizer = normalizers.NFC()
    else:
        raise ModelError(
            f"{path}: its tokenizer splits text as {split!r}, which is not supported; supported are default, "
            f"gpt-2, smollm, starcoder, refact, command-r, llama-bpe and qwen2."
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(field: Callable[..., Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: pieces have scores instead of merges, and unknown characters fall back to bytes."""
    scores = field("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    unknown = tokens[int(field("tokenizer.ggml.unknown_token_id", 0))]
    pairs = [(left, right) for *_, left, right in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(field("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend
