"""What tests of the whole need that is small: a decoder from scratch, and rows of JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duet_jax.models import llama

# Shape of a model that is made before it is asked or trained: `model: {scratch: ...}`.
SCRATCH = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes a row a line, and gives the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shape(tokenizer: Any, num_layers: int = 2, max_length: int = 512) -> llama.LlamaConfig:
    """Of such a decoder for the tokens of a tokenizer, with heads of 8."""
    sizes = SCRATCH | {"num_layers": num_layers, "head_dim": 8}
    return llama.LlamaConfig(vocab_size=tokenizer.vocab_size, max_length=max_length, **sizes)
