"""Model files: what is written is read back, in every format, and what cannot be read says why."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duet_jax import models
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import ModelError
from duet_jax.models import llama

CONFIG = llama.LlamaConfig(
    vocab_size=36,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=128,
)
TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .?!\n")


def model(config: llama.LlamaConfig = CONFIG) -> models.Model:
    params = llama.init(config, key=jax.random.key(0))
    return models.Model(config, params, TOKENIZER, "test", models.fingerprint(config, params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_read_back_bit_by_bit(tmp_path, dtype):
    one = model()
    one = dataclasses.replace(one, params=jax.tree.map(lambda x: x.astype(dtype), one.params))
    models.save(one, tmp_path / "m")
    two = models.load(tmp_path / "m", dtype=jnp.dtype(dtype))
    assert two.config == one.config
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert two.fingerprint == models.fingerprint(one.config, one.params)
    assert two.tokenizer.encode("hello you", add_special=True) == TOKENIZER.encode("hello you", add_special=True)
    assert two.tokenizer.decode(TOKENIZER.encode("hello you")) == "hello you"
    models.save(one, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is left beside it"


def test_fingerprint_tells_models_apart():
    one = model()
    changed = jax.tree.map(lambda x: x, one.params)
    changed["norm"] = changed["norm"].at[3].add(1e-6)
    assert models.fingerprint(CONFIG, changed) != one.fingerprint
    assert models.fingerprint(dataclasses.replace(CONFIG, rope_theta=5e4), one.params) != one.fingerprint


def broken(tmp_path, change):
    models.save(model(), tmp_path / "m")
    change(tmp_path / "m")
    return tmp_path / "m"


def edit_json(name: str, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def edit_tensors(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edit_json("config.json", model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (edit_json("config.json", num_hidden_layers=3), "lacks the tensor model.layers.2"),
        (edit_json("config.json", hidden_size=32), "has shape"),
        (edit_json("config.json", num_attention_heads="x"), "must be a positive integer"),
        (edit_json("config.json", rope_scaling={"rope_type": "yarn", "factor": 2}), "RoPE type 'yarn'"),
        (edit_tensors(lambda t: t.pop("model.norm.weight")), "lacks the tensor model.norm.weight"),
        (edit_tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "no place for, first extra"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks the weight file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not a readable safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_broken_folders_say_what_is_wrong(tmp_path, change, sentence):
    with pytest.raises(ModelError, match=sentence):
        models.load(broken(tmp_path, change))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no model at .*none.gguf"):
        models.load(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="pip install no-such-package-here"):
        models.load("package:no-such-package-here")
    with pytest.raises(ModelError, match="must ship exactly one model; it has none"):
        models.load("package:numpy")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="a folder or a .gguf file"):
        models.load(tmp_path / "model.bin")
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(ModelError, match="not a readable GGUF"):
        models.load(tmp_path / "bad.gguf")


def test_a_hub_name_offline_is_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand much more text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"some/model .*could not be had .*no connection\)\.$"):
        models.load("some/model")


def test_tokenizer_of_another_model_is_refused(tmp_path):
    models.save(model(), tmp_path / "m")
    CharacterTokenizer("".join(map(chr, range(200, 400)))).save(tmp_path / "m")
    with pytest.raises(ModelError, match="do not belong together"):
        models.load(tmp_path / "m")
