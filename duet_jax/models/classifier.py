"""Decoders with a sequence-classification head of one label, which is what reward models are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duet_jax.errors import ModelError
from duet_jax.models.llama import LlamaConfig, Params
from duet_jax.models.load import check_vocabulary
from duet_jax.models.tokenizer import Tokenizer, read_tokenizer
from duet_jax.models.weights import NAMES, open_safetensors, parse_config, read_config, stack, used_shapes

SCORE = "score.weight"


class Classifier(NamedTuple):
    """What a folder of transformers' `LlamaForSequenceClassification` (Mistral, Qwen2, Qwen3) holds.

    Attributes:
      config: shape of the decoder.
      params: its parameters; the output head is tied, as there is none.
      score: `[1, hidden]`, weights of the label, in their stored dtype.
      tokenizer: its tokenizer.
      pad_id: the id that transformers takes for padding, if the folder names one.
    """

    config: LlamaConfig
    params: Params
    score: np.ndarray
    tokenizer: Tokenizer
    pad_id: int | None


def read_classifier(folder: Path, *, dtype: Any) -> Classifier:
    """Reads a Hugging Face folder with safetensors weights; parameters in `dtype`.

    Raises:
      ModelError: the folder is no model of ours, or there is no `score.weight` of one row.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no reward model at {folder}; give a Hugging Face folder with {SCORE}.")
    raw = read_config(folder)
    config = dataclasses.replace(parse_config(raw, source=str(folder / "config.json")), tie_embeddings=True)
    tensors = open_safetensors(folder)
    kept = used_shapes(tensors)
    kept.pop(NAMES["head"], None)
    found = kept.pop(SCORE, None)
    if found != (1, config.hidden_size):
        there = "is not there" if found is None else f"has shape {list(found)}"
        raise ModelError(
            f"{folder} is no reward model: the tensor {SCORE} {there}; it must have the shape "
            f"[1, {config.hidden_size}] of a sequence classifier with num_labels 1."
        )
    params = stack(config, dataclasses.replace(tensors, shapes=kept), NAMES, dtype=dtype)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(config, tokenizer, str(folder))
    return Classifier(config, params, tensors.read(SCORE), tokenizer, raw.get("pad_token_id"))
