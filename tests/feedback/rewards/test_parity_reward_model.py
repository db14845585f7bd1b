"""Reward models against transformers' sequence classifiers, which run in this Python or that of DUET_TORCH_PYTHON."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from duet_jax.config import RewardConfig
from duet_jax.data import Example
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.feedback.rewards import build_reward

pytestmark = pytest.mark.parity
PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("classifier_reference.py")
TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
REPLIES = ["yes", "", "a longer reply, of " + "many words " * 9, "no!", "x" * 150, "yes"]


@pytest.fixture(scope="module", autouse=True)
def transformers_there():
    found = subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("torch and transformers are not installed")


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_scores_are_those_of_transformers(kind, tmp_path):
    folder = tmp_path / "model"
    subprocess.run([PYTHON, str(SCRIPT), "--make", kind, str(folder)], check=True)
    CharacterTokenizer(string.printable[:96]).save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Are you?"})
    examples = [Example(str(i), turns if i % 2 else f"question {i}", "") for i in range(len(REPLIES))]
    conversations = [
        [*(turns if i % 2 else [{"role": "user", "content": f"question {i}"}]), {"role": "assistant", "content": reply}]
        for i, reply in enumerate(REPLIES)
    ]
    (tmp_path / "conversations.json").write_text(json.dumps(conversations))
    arguments = [str(folder), str(tmp_path / "conversations.json"), str(tmp_path / "scores.npy")]
    subprocess.run([PYTHON, str(SCRIPT), *arguments], check=True)
    expected = np.load(tmp_path / "scores.npy")
    found = build_reward(RewardConfig(kind="reward_model", model=str(folder), batch_size=4))(REPLIES, examples)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
