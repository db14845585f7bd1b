"""GGUF files: exact dequantisation, rotary row order, families, metadata, and how vocabularies split text."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import models
from duet_jax.errors import ModelError
from duet_jax.models import gguf_file, llama, rope

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", ".", "th", "the", "Ġthe", "an", "and"]
TOKENS = ["<pad>", "<bos>", "<eos>", *LETTERS]
VOCABULARY = {
    "model": "gpt2",
    "list": TOKENS,
    "types": [3, 3, 3] + [1] * len(LETTERS),
    "merges": ["t h", "th e", "Ġ the", "a n", "an d"],
}
CONFIG = llama.LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=128,
)
Kind = gguf.GGMLQuantizationType


def network(config: llama.LlamaConfig) -> dict:
    """Random parameters in which no bias is zero and no norm is one."""
    params = llama.init(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head's rows as neighbouring pairs, the order of `llama` files."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path, config, params, *, arch="llama", kind=Kind.F32, numbers=(), flags=(), change=None, vocabulary=VOCABULARY
):
    """A GGUF file of `params`; `change` edits the dictionary of float32 tensors before it is written."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for part, told in vocabulary.items():
        getattr(writer, f"add_tokenizer_{part}" if part in ("model", "pre") else f"add_token_{part}")(told)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in numbers:
        writer.add_uint32(name, value)
    for name, flag in flags:
        writer.add_bool(name, flag)
    tensors = {}
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf_name = jax.tree_util.keystr(leaf_path, simple=True, separator=".")
        name, values = gguf_file.NAMES[leaf_name], np.asarray(leaf, np.float32)
        if not leaf_name.startswith("layers."):
            tensors[name] = values
            continue
        for layer, one in enumerate(values):
            rows = one.T if leaf_name.endswith("kernel") else one
            if arch == "llama" and leaf_name.split(".")[1] in ("q", "k"):
                rows = to_pairs(rows, config.num_heads if ".q." in leaf_name else config.num_kv_heads)
            tensors[name.format(layer)] = rows
    if change is not None:
        change(tensors)
    for name, values in tensors.items():
        values = np.ascontiguousarray(values)
        if values.dtype != np.float32:
            writer.add_tensor(name, values)
            continue
        chosen = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_become_exactly_the_numbers_they_stand_for(tmp_path, name):
    kind, params = Kind[name], network(CONFIG)
    found = models.load(write(tmp_path / "m.gguf", CONFIG, params, kind=kind)).params

    def rounded(rows):
        return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(rows), kind), kind)

    np.testing.assert_array_equal(found["embedding"], rounded(np.asarray(params["embedding"])))
    for target in ("q", "k", "v", "o", "gate", "up", "down"):
        for layer in range(CONFIG.num_layers):
            rows = np.asarray(params["layers"][target]["kernel"][layer]).T
            np.testing.assert_array_equal(found["layers"][target]["kernel"][layer].T, rounded(rows), err_msg=target)
    np.testing.assert_array_equal(found["layers"]["attention_norm"], params["layers"]["attention_norm"])


def test_halves_turn_as_pairs_did():
    """Rotating neighbouring pairs and then reordering is reordering and then rotating halves."""
    heads, length = 3, 5
    pairs = np.random.default_rng(0).normal(size=(heads * 8, length)).astype(np.float32)
    angles = np.arange(length)[:, None] * np.array([1.0, 0.3, 0.1, 0.03])
    split = pairs.reshape(heads, 4, 2, length)
    cos, sin = np.cos(angles).T, np.sin(angles).T
    turned = np.stack([split[:, :, 0] * cos - split[:, :, 1] * sin, split[:, :, 1] * cos + split[:, :, 0] * sin], 2)
    expected = gguf_file._halves(turned.reshape(pairs.shape), heads)
    halves = gguf_file._halves(pairs, heads).reshape(heads, 8, length).transpose(2, 0, 1)
    found = rope.rotate(jnp.asarray(halves)[None], (jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]))[0]
    np.testing.assert_allclose(np.asarray(found).transpose(1, 2, 0).reshape(pairs.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(gguf_file._halves(to_pairs(pairs, heads), heads), pairs)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"tie_embeddings": False, "num_kv_heads": 4}),
        ("llama", {"qkv_bias": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 24}),
    ],
)
def test_every_family_is_recognised_by_its_tensors(tmp_path, arch, changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = network(config)
    found = models.load(write(tmp_path / "m.gguf", config, params, arch=arch))
    assert found.config == config
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def drop(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"vocabulary": {**VOCABULARY, "pre": "tekken"}}, "splits text as 'tekken'"),
        ({"numbers": [("llama.rope.dimension_count", 8)]}, "part of a head"),
        ({"change": drop("blk.1.ffn_up.weight")}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"change": drop("token_embd.weight")}, "lacks the tensor token_embd.weight"),
        ({"change": lambda t: t.update({"output_norm.weight": np.ones(7, np.float32)})}, "has shape"),
        ({"change": lambda t: t.update({"output_norm.weight": np.ones(64, np.int32)})}, "quantised as I32"),
        ({"change": lambda t: t.update({"extra": np.ones(3, np.float32)})}, "no place for, first extra"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, options, sentence):
    path = write(tmp_path / "m.gguf", CONFIG, network(CONFIG), **options)
    with pytest.raises(ModelError, match=sentence):
        models.load(path)


def test_heads_must_divide(tmp_path):
    odd = dataclasses.replace(CONFIG)
    object.__setattr__(odd, "num_kv_heads", 3)  # our own configuration refuses it
    path = write(tmp_path / "m.gguf", odd, {"embedding": network(CONFIG)["embedding"]})
    with pytest.raises(ModelError, match="4 attention heads must be a multiple of its 3"):
        models.load(path)


def test_a_cut_file_is_never_half_read(tmp_path):
    whole = write(tmp_path / "m.gguf", CONFIG, network(CONFIG)).read_bytes()
    for length in (0, 3, 20, 200, 1500, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            models.load(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["It", "'s", "Ġ12345", "Ġdays", "!!"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġdays", "!!"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġdays", "!!"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġdays", "!!"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path, pre, pieces):
    tokenizer = models.load(
        write(tmp_path / "m.gguf", CONFIG, network(CONFIG), vocabulary={**VOCABULARY, "pre": pre})
    ).tokenizer
    found = tokenizer.backend.pre_tokenizer.pre_tokenize_str("It's 12345 days!!")
    assert [piece for piece, _ in found] == pieces


def test_bos_is_added_where_the_file_or_its_kind_says_so(tmp_path):
    params, name = network(CONFIG), "tokenizer.ggml.add_bos_token"

    def tokenizer(flags=(), **vocabulary):
        path = write(tmp_path / "m.gguf", CONFIG, params, flags=flags, vocabulary={**VOCABULARY, **vocabulary})
        return models.load(path).tokenizer

    assert not tokenizer().add_bos
    assert tokenizer(pre="llama-bpe").add_bos, "Llama 3 files may leave the flag out"
    assert not tokenizer(pre="llama-bpe", flags=[(name, False)]).add_bos
    with_bos = tokenizer(flags=[(name, True)])
    assert with_bos.encode("th", add_special=True) == [1, TOKENS.index("th")]
    assert with_bos.encode("th") == [TOKENS.index("th")]
    # What other tools ask, who know nothing of our flag.
    assert with_bos.backend.encode("th").ids == [1, TOKENS.index("th")]


def test_byte_level_tokenizer(tmp_path):
    tokenizer = models.load(write(tmp_path / "m.gguf", CONFIG, network(CONFIG))).tokenizer
    ids = tokenizer.encode("and the cat<eos>")
    assert ids == [TOKENS.index(name) for name in ["and", "Ġthe", "Ġ", "c", "a", "t", "<eos>"]]
    assert tokenizer.decode(ids) == "and the cat"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), False)


def test_sentencepiece_tokenizer(tmp_path):
    pieces = ["▁", "a", "b", "c", "ab", "▁ab", "abc", "▁c"]
    scores = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    vocabulary = {
        "model": "llama",
        "list": tokens,
        "scores": [0.0] * 259 + scores,
        "types": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }
    config = dataclasses.replace(CONFIG, vocab_size=len(tokens))
    path = write(tmp_path / "m.gguf", config, network(config), vocabulary=vocabulary)
    tokenizer = models.load(path).tokenizer
    ids = tokenizer.encode("abc cé", add_special=True)
    # "▁ab" beats "abc" by score; é is no piece and falls back to its two bytes.
    assert [tokens[i] for i in ids] == ["<s>", "▁ab", "c", "▁c", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "abc cé"
    assert tokenizer.add_bos


def test_llama3_rope_rule_is_found(tmp_path):
    scaled = dataclasses.replace(CONFIG, rope_scaling=rope.RopeScaling("llama3", 8.0))
    factors = np.asarray(rope.rope_frequencies(CONFIG) / rope.rope_frequencies(scaled))
    assert gguf_file._with_llama3_rope(CONFIG, factors, tmp_path) == scaled
    with pytest.raises(ModelError, match="not those of Llama 3"):
        gguf_file._with_llama3_rope(CONFIG, factors[::-1].copy(), tmp_path)
