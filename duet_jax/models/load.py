"""One call for every place a model can come from, and one to write a model where other tools can read it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax.errors import ModelError
from duet_jax.models import gguf_file, weights
from duet_jax.models.llama import LlamaConfig, Params
from duet_jax.models.tokenizer import Tokenizer, read_tokenizer

PACKAGE = "package:"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder with everything that belongs to it.

    Attributes:
      config: its shape.
      params: its parameters, see `llama.init`.
      tokenizer: its tokenizer.
      source: where it came from, as the user wrote it.
      fingerprint: hash of shape and parameters, hexadecimal.
    """

    config: LlamaConfig
    params: Params
    tokenizer: Any
    source: str
    fingerprint: str


def load(source: str | Path, *, dtype: Any = jnp.float32) -> Model:
    """Loads a model of the Llama family with its tokenizer.

    Args:
      source: a Hugging Face folder (safetensors, one file or sharded); a .gguf file; `package:NAME`, the model
        that an installed Python package ships; or a name on the Hugging Face hub, such as `org/model`.
      dtype: dtype of the parameters.

    Raises:
      ModelError: nothing is found there, or it cannot be read as one of our models.
    """
    name = str(source)
    if name.startswith(PACKAGE):
        return _load_path(_in_package(name.removeprefix(PACKAGE)), name, dtype)
    path = Path(name).expanduser()
    if name and path.exists():
        return _load_path(path, name, dtype)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"There is no model at {name}; give a folder, a .gguf file, package:NAME or a hub name (org/model)."
        )
    return _load_path(_from_hub(name), name, dtype)


def save(model: Model, folder: str | Path) -> None:
    """Writes a Hugging Face folder (config.json, model.safetensors, tokenizer files), whole or not at all.

    A model that is already there is replaced; anything else is left alone.

    Raises:
      ModelError: `folder` is a file, or holds something that is no model.
    """
    target = Path(folder).resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        tokenizer = model.tokenizer
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": list(tokenizer.eos_ids) or None,
            "pad_token_id": tokenizer.pad_id,
        }
        weights.write_folder(model.config, model.params, beside, token_ids=ids)
        tokenizer.save(beside)
        beside.chmod(0o755)
        _move_into_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and (target / "config.json").is_file()):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ModelError(f"{target} is there already and is no model folder; save the model under another name.")


def _move_into_place(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    # The old model is deleted only when the new one has its name: killed in between, neither is lost.
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def fingerprint(config: Any, params: Any) -> str:
    """SHA-256 of a shape and a tree of parameters or other arrays, hexadecimal."""
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _load_path(path: Path, name: str, dtype: Any) -> Model:
    if path.is_dir():
        tokenizer = read_tokenizer(path)
        config, params = weights.read_folder(path, dtype=dtype)
    elif path.suffix == ".gguf":
        config, params, tokenizer = gguf_file.read(path, dtype=dtype)
    else:
        raise ModelError(f"{name} is no model; it must be a folder or a .gguf file.")
    check_vocabulary(config, tokenizer, name)
    return Model(config, params, tokenizer, name, fingerprint(config, params))


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer, name: str) -> None:
    """Raises a ModelError where a tokenizer has ids that a model has not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only "
            f"{config.vocab_size}; they do not belong together."
        )


def _in_package(name: str) -> Path:
    """The one model among the files of an installed package. The package is not imported."""
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: no name at all
        raise ModelError(f"The package {name} is not installed; install it with: pip install {name}") from None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    found = sorted(file for file in files if file.suffix == ".gguf")
    found = found or sorted({file.parent for file in files if file.suffix == ".safetensors"})
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"The package {name} must ship exactly one model; it has {there}.")
    return found[0]


def _from_hub(name: str) -> Path:
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "*.jinja"]
    # Some repositories hold the weights twice, the second time in their makers' own layout.
    twice = ["consolidated*", "original/*"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=twice))
    # Offline, unknown and private names fail with exceptions of several libraries.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"{name} is no file or folder here, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason})."
        ) from error
