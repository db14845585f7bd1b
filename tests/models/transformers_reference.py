"""Runs transformers on a model folder and keeps what it gives; called as a script by test_parity.py.

python transformers_reference.py MODEL_FOLDER REQUEST.json ANSWER.npz
python transformers_reference.py --make KIND FOLDER
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers

SHAPE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500.0,
)
KINDS = {
    "llama2": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
    "llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
    "mistral": ("Mistral", dict(sliding_window=7, head_dim=16)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def make(kind: str, folder: str) -> None:
    """Writes a small random model of a family, in two or more shards."""
    torch.manual_seed(0)
    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")


def warp(logits: torch.Tensor, options: dict) -> torch.Tensor:
    """Log-probabilities after the library's own truncations, in its order."""
    scores = transformers.TemperatureLogitsWarper(options["temperature"])(None, logits)
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in options:
            scores = warper(options[name])(None, scores)
    return scores.log_softmax(-1)


def answer(folder: str, request: dict) -> dict[str, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        found["logits"] = model(input_ids=torch.tensor(request["tokens"])).logits.numpy()
        if "prompt" in request:
            ids = torch.tensor([request["prompt"]])
            # -1 is no token: the reply goes on.
            ids = model.generate(ids, do_sample=False, max_new_tokens=64, eos_token_id=-1, pad_token_id=0)
            found["greedy"] = ids[0, len(request["prompt"]) :].numpy()
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            places = torch.arange(len(request["prompt"]) - 1, ids.shape[1] - 1)
            found["log_probs"] = log_probs[places, found["greedy"]].numpy()
            for i, options in enumerate(request["sampling"]):
                found[f"sampling{i}"] = warp(model(input_ids=ids).logits[0, -3:], options).numpy()
    if "texts" in request:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for i, text in enumerate(request["texts"]):
            found[f"text{i}"] = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        if "messages" in request:
            rendered = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
            found["chat"] = np.array(rendered)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(*sys.argv[2:])
    else:
        with open(sys.argv[2]) as file:
            np.savez(sys.argv[3], **answer(sys.argv[1], json.load(file)))
