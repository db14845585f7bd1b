"""Hugging Face folders: configurations there and back, shards, memory, packages, and what saving may replace."""

from __future__ import annotations

import dataclasses
import json
import sys
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duet_jax import models
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import ModelError
from duet_jax.models import llama, rope, weights

CONFIG = llama.LlamaConfig(
    vocab_size=36, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)
LLAMA3 = rope.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
VARIANTS = {
    "llama2": {"tie_embeddings": False, "num_kv_heads": 4, "rms_norm_eps": 1e-6},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "linear": {"rope_scaling": rope.RopeScaling("linear", 2.0)},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen2": {"qkv_bias": True, "sliding_window": 5},
    "qwen3": {"qk_norm": True},
    "qwen3 with bias": {"qk_norm": True, "qkv_bias": True},
}


def model(config: llama.LlamaConfig = CONFIG) -> models.Model:
    params = llama.init(config, key=jax.random.key(0))
    return models.Model(config, params, CharacterTokenizer("abc"), "test", models.fingerprint(config, params))


def assert_same(one, two) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_there_and_back(tmp_path, name):
    one = model(dataclasses.replace(CONFIG, **VARIANTS[name]))
    models.save(one, tmp_path / "m")
    two = models.load(tmp_path / "m")
    assert two.config == one.config
    assert_same(one.params, two.params)
    assert two.fingerprint == one.fingerprint


def split(folder, shards: int) -> None:
    """What large models come as: the same tensors in several files, and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for i, name in enumerate(sorted(tensors)):
        where.setdefault(f"model-{i % shards + 1:05}-of-{shards:05}.safetensors", {})[name] = tensors[name]
    for file, part in where.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in where.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_model(tmp_path):
    one = model()
    models.save(one, tmp_path / "m")
    split(tmp_path / "m", 3)
    assert models.load(tmp_path / "m").fingerprint == one.fingerprint
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.lost.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="names model.lost.weight, but no shard holds it"):
        models.load(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks the weight file model-00002-of-00003"):
        models.load(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": ["model.norm.weight"]}))
    with pytest.raises(ModelError, match="weight_map must give the file of each tensor"):
        models.load(tmp_path / "m")


def test_a_tied_model_may_repeat_its_head_but_not_another(tmp_path):
    models.save(model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert models.load(tmp_path / "m").fingerprint == model().fingerprint
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match="differs from model.embed_tokens.weight"):
        models.load(tmp_path / "m")


def test_reading_needs_the_parameters_and_one_kind_more(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=512, num_layers=8)
    one = model(config)
    models.save(one, tmp_path / "m")
    kinds = [leaf.nbytes for leaf in jax.tree.leaves(one.params)]
    weights.read_folder(tmp_path / "m", dtype=jnp.float32)  # what the first call alone allocates
    tracemalloc.start()
    try:
        weights.read_folder(tmp_path / "m", dtype=jnp.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < sum(kinds) + max(kinds) + 2**20


GOOD = {
    "model_type": "llama",
    "vocab_size": 36,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_absent_and_null_fields_take_the_defaults_of_the_family():
    config = weights.parse_config({**GOOD, "num_key_value_heads": None, "rms_norm_eps": None, "rope_scaling": None})
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope_theta) == (4, 8, 1e-6, 10000.0)
    assert not config.tie_embeddings and config.sliding_window is None
    assert weights.parse_config({**GOOD, "model_type": "mistral"}).sliding_window == 4096
    assert weights.parse_config({**GOOD, "model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen3 = weights.parse_config({**GOOD, "model_type": "qwen3"})
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    assert weights.parse_config({**GOOD, "model_type": "qwen2", "sliding_window": 9}).sliding_window is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, not True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, not 'small'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, not 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or absent"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE type 'linear' needs the field 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "RoPE type 'llama3' needs the field 'low_freq_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor must be a positive number"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "over whole heads"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window must be a positive integer or null"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "a sliding window in some layers only",
        ),
    ],
)
def test_configurations_that_cannot_be_had_say_why(fields, sentence):
    with pytest.raises(ModelError, match=sentence):
        weights.parse_config({**GOOD, **fields})


def test_saving_replaces_models_and_nothing_else(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    models.save(model(), folder)  # an empty folder is free
    models.save(dataclasses.replace(model(), config=CONFIG), folder)
    assert models.load(folder).fingerprint == model().fingerprint
    (folder / "config.json").unlink()
    file = tmp_path / "file"
    file.write_text("years of work")
    for taken in (folder, file):
        with pytest.raises(ModelError, match="is there already and is no model folder"):
            models.save(model(), taken)
    assert file.read_text() == "years of work"
    assert (folder / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"], "nothing is left beside them"


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    models.save(model(), tmp_path / "m")

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        models.save(model(), tmp_path / "m")
    assert models.load(tmp_path / "m").fingerprint == model().fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_package_is_read_but_not_run(tmp_path, monkeypatch):
    package, info = tmp_path / "ships_a_model", tmp_path / "ships_a_model-1.0.dist-info"
    info.mkdir()
    models.save(model(), package)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ships-a-model\nVersion: 1.0\n")
    files = [path.relative_to(tmp_path).as_posix() for path in package.iterdir()]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = models.load("package:ships-a-model")
    assert (found.source, found.fingerprint) == ("package:ships-a-model", model().fingerprint)
    with pytest.raises(ModelError, match="is not installed"):
        models.load("package:")


def test_the_hub_is_asked_for_one_copy_of_the_weights(tmp_path, monkeypatch):
    models.save(model(), tmp_path / "m")
    asked = {}

    def download(name, **patterns):
        asked.update(patterns, name=name)
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load("some/model").fingerprint == model().fingerprint
    files = ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"]
    unwanted = ["consolidated.safetensors", "pytorch_model.bin", "original/params.json", "README.md"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        [*files, *unwanted], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert asked["name"] == "some/model" and list(chosen) == files
