"""Decoders with a sequence-classification head: of one label, as reward models have it, or of several."""

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
      score: `[labels, hidden]`, their weights, in their stored dtype.
      labels: their names (`id2label` of config.json), or LABEL_0, LABEL_1, ... as in transformers.
      tokenizer: its tokenizer.
      pad_id: the id that transformers takes for padding, if the folder names one.
    """

    config: LlamaConfig
    params: Params
    score: np.ndarray
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    pad_id: int | None


def read_classifier(
    folder: Path, *, dtype: Any, labels: int | tuple[int, ...] = 1, kind: str = "reward model"
) -> Classifier:
    """Reads a Hugging Face folder with safetensors weights.

    Args:
      folder: which.
      dtype: of the parameters.
      labels: how many there must be, or may be.
      kind: what the model is, for messages.

    Raises:
      ModelError: the folder is no model of ours, or there is no `score.weight` with a row for each label.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no {kind} at {folder}; give a Hugging Face folder with {SCORE}.")
    raw = read_config(folder)
    config = dataclasses.replace(parse_config(raw, source=str(folder / "config.json")), tie_embeddings=True)
    tensors = open_safetensors(folder)
    kept = used_shapes(tensors)
    kept.pop(NAMES["head"], None)
    found = kept.pop(SCORE, None)
    counts = (labels,) if isinstance(labels, int) else labels
    if found not in [(count, config.hidden_size) for count in counts]:
        there = "is not there" if found is None else f"has shape {list(found)}"
        either = " or ".join(map(str, counts))
        raise ModelError(
            f"{folder} is no {kind}: the tensor {SCORE} {there}; it must have the shape "
            f"[{either}, {config.hidden_size}] of a sequence classifier with num_labels {either}."
        )
    params = stack(config, dataclasses.replace(tensors, shapes=kept), NAMES, dtype=dtype)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(config, tokenizer, str(folder))
    given = raw.get("id2label") or {}
    names = tuple(str(given.get(str(number), f"LABEL_{number}")) for number in range(found[0]))
    return Classifier(config, params, tensors.read(SCORE), names, tokenizer, raw.get("pad_token_id"))
