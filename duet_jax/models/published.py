"""The shape of a model without its weights: of a folder's config.json, or of a well-known model by its hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duet_jax.errors import ModelError
from duet_jax.models.llama import LlamaConfig
from duet_jax.models.load import PACKAGE, load
from duet_jax.models.weights import parse_config, read_config

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
# What the config.json of each of these says. Their repositories ask for a licence first, so that a machine that only
# compiles has no access to them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_3 | _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3 | _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_3 | _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3 | _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3 | _LLAMA_70B,
}


def read_shape(source: str) -> LlamaConfig:
    """Shape of the model that `load` would load.

    Of a folder only config.json is read, of a hub name that is not in `PUBLISHED` only that file is fetched. A .gguf
    file is read whole.

    Raises:
      ModelError: nothing is found there, or it is not of our family.
    """
    if source in PUBLISHED:
        return parse_config(PUBLISHED[source], source=source)
    path = Path(source).expanduser()
    if path.is_dir():
        return parse_config(read_config(path), source=str(path / "config.json"))
    if source.startswith((PACKAGE, ".", "/", "~")) or source.endswith(".gguf") or source.count("/") != 1:
        return load(source).config
    import huggingface_hub

    try:
        raw = json.loads(Path(huggingface_hub.hf_hub_download(source, "config.json")).read_text(encoding="utf-8"))
    # Offline, unknown and private names fail with exceptions of several libraries.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"The config.json of {source} could not be had from the Hugging Face hub ({type(error).__name__}: "
            f"{reason}); a folder that holds it will do, or one of {', '.join(PUBLISHED)}."
        ) from error
    return parse_config(raw, source=f"{source}/config.json")
