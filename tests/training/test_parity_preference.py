"""A step on pairs against PyTorch's autodiff of a transformers model, in this Python or that of DUET_TORCH_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from duet_jax import models
from duet_jax.config import PreferenceLoss, TrainingConfig
from duet_jax.data import Example, encode
from duet_jax.data.preferences import Pairs, gather_pairs
from duet_jax.training.preference_trainer import PreferenceTrainer
from duet_jax.training.sft import Trainer

pytestmark = pytest.mark.parity
PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"
PROMPTS = ("Once upon a time", "The dog")
CHOSEN = ("there was a little girl who liked to play.", "ran to the park.")
REJECTED = ("the the the", "was very sad, and did not want to go home with his mom and dad.")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the tiny trained model is not here")
@pytest.mark.parametrize(("kind", "beta"), [("dpo", 0.3), ("davir_dpo", 20.0)])
def test_loss_and_gradient_are_those_of_pytorch(kind, beta, tmp_path):
    if subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode != 0:
        pytest.skip("torch and transformers are not installed")
    model = models.load(STORIES)

    def side(replies):
        examples = [Example(str(i), *pair) for i, pair in enumerate(zip(PROMPTS, replies, strict=True))]
        return encode(examples, model.tokenizer, chat=False, max_length=64)

    pairs = Pairs(side(CHOSEN), side(REJECTED))
    reference = -2.0 * pairs.response_tokens - np.array([[0.5, 3.0], [1.0, 2.0]])
    sides = (pairs.chosen, pairs.rejected)
    request = {
        "kind": kind,
        "beta": beta,
        "reference": reference.tolist(),
        "pairs": [[(part.tokens[i].tolist(), int(part.prompt_lengths[i])) for part in sides] for i in range(2)],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("dpo_reference.py")
    arguments = [str(STORIES), str(tmp_path / "request.json"), str(tmp_path / "answer.json")]
    subprocess.run([PYTHON, str(script), *arguments], check=True)
    expected = json.loads((tmp_path / "answer.json").read_text())

    settings = TrainingConfig(method="full", learning_rate=1e-3, batch_size=2, micro_batch_size=1)
    sequences = Trainer(model.config, lambda: model.params, settings, (64,), model.tokenizer.pad_id)
    subject = PreferenceTrainer(sequences, PreferenceLoss(kind=kind, beta=beta))
    batch = gather_pairs(pairs, np.arange(2), 64, 2, model.tokenizer.pad_id)
    _, metrics = subject.step(
        sequences.start(jax.random.key(0)),
        None,
        sequences.dials,
        batch.tokens,
        batch.mask,
        np.asarray(reference, np.float32),
        np.float32(1e-3),
        jax.random.key(0),
        np.int32(0),
    )
    np.testing.assert_allclose(metrics.log_probs, expected["log_probs"], rtol=1e-4)
    np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics.gradient_norm, expected["norm"], rtol=1e-3)
