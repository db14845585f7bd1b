"""Small benchmarks of the lm-evaluation-harness, and the log-probabilities that answer them, by definition."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from duet_jax.data.characters import CharacterTokenizer
from duet_jax.feedback import Deployed
from duet_jax.models import llama
from tests.small import shape, write_rows

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed")

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?:'\n")
CONFIG = shape(TOKENIZER, max_length=96)

QUESTIONS = [
    {"question": "Lily saw a big red ball in the park. She wanted to", "choices": ["play", "eat a stone", "fly"]},
    {"question": "Tom had a dog. The dog's name was", "choices": ["Max", "blue", "the sea and the sand"]},
    {"question": "One day a little girl went to the", "choices": ["park with her mom", "car", "why"]},
    {"question": "The cat sat on the mat and was very", "choices": ["happy", "sad", "of"]},
    {"question": "Once upon a", "choices": ["time", "tree", "the"]},
]
LETTERS = [{"question": row["question"], "answer": i % 3} for i, row in enumerate(QUESTIONS)]
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Tom and his dog went to the beach. They saw a big boat. " * 6,
    "A short one.",
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        [{**row, "answer": i % 3} for i, row in enumerate(QUESTIONS)],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "letters": (
        LETTERS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C"],
            "doc_to_target": "answer",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "cloze": (
        [{"text": text[:60].rstrip(), "last": text[60:90] or " end"} for text in TEXTS],
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{last}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
    "rolling": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
    ),
    "answer": (
        [{**row, "target": row["choices"][0]} for row in QUESTIONS],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": [".", "the"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


def write_task(folder: Path, name: str, **changes: Any) -> str:
    """Writes one of TASKS, changed, with its data, and returns the task file's path."""
    rows, fields = TASKS[name]
    data, path = write_rows(folder / f"{name}.jsonl", rows), folder / f"{name}.yaml"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **fields,
        **changes,
    }
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return str(path)


@jax.jit
def every_token(params: llama.Params, ids: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(llama.hidden_states(CONFIG, params, ids[None])[0] @ llama.output_head(params).T)


def next_log_probs(model: Deployed, ids: list[int]) -> np.ndarray:
    """Log-probabilities `[T, V]` after each of some ids, one text at a time, at one padded length."""
    return np.asarray(every_token(model.params, jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))[: len(ids)]


def log_probs(model: Deployed, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of a continuation, and whether each of its tokens is the likeliest."""
    every = next_log_probs(model, [*context, *continuation[:-1]])[-len(continuation) :]
    picked = every[np.arange(len(continuation)), continuation]
    return float(picked.sum()), bool((every.argmax(axis=1) == continuation).all())


def harness_model(model: Deployed, **options: Any) -> Any:
    from duet_jax.feedback.harness.model import HarnessModel

    return HarnessModel(model.engine, model, **options)
