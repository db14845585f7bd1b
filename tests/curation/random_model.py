"""A decoder of random weights that a text makes some difference to, and classifiers that begin with it."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from duet_jax import models
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.models import llama
from tests.small import shape

TOKENIZER = CharacterTokenizer(string.printable[:95] + "\n")
SHAPE = shape(TOKENIZER, num_layers=1)


@cache
def params() -> llama.Params:
    found = llama.init(SHAPE, key=jax.random.key(0))
    found["embedding"] = found["embedding"] * 20
    return found


@jax.jit
def padded_states(params: llama.Params, ids: jax.Array) -> jax.Array:
    return llama.hidden_states(SHAPE, params, ids)


def last_state(text: str) -> np.ndarray:
    """The final hidden state of a text's last token."""
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    row = np.zeros((1, SHAPE.max_length), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(padded_states(params(), row))[0, len(ids) - 1]


def save(folder: Path) -> Path:
    models.save(models.Model(SHAPE, params(), TOKENIZER, "random", ""), folder)
    return folder


def save_classifier(folder: Path, score: np.ndarray, labels: dict[Any, str] | None = None) -> Path:
    """With a score for each label, `[labels, 16]`, which a checkpoint need not name."""
    save(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": score}, folder / "model.safetensors")
    if labels is not None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"id2label": labels}))
    return folder
