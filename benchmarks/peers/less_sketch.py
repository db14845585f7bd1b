"""The way of LESS: one backward pass an example, then TRAK's BasicProjector, on gradients of LoRA factors.

Run by a Python that has torch, transformers, peft and traker (`benchmarks/sketching_peers.py --peer-python`). As in the
published code of LESS: batches of one, gradients of all factors in one vector, 16 of them projected at a time to 8192
dimensions by random signs that are drawn anew for every 128 of the dimensions. The time is the same for each of these
blocks, so `blocks` of the 64 are measured and the rest is calculated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from trak.projectors import BasicProjector, ProjectionType
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sketching_process import Meter, answer  # noqa: E402

BLOCK = 128
TOGETHER = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def speed(request: dict) -> dict:
    folder, dtype = Path(request["folder"]), DTYPES[request["dtype"]]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    model.eval()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = json.loads((folder / "examples.json").read_text())["train"]
    pairs = list(zip(found["tokens"], found["prompts"], strict=True))[: request["less_examples"]]

    def gradient(ids: list[int], prompt: int) -> torch.Tensor:
        tokens = torch.tensor([ids])
        labels = tokens.clone()
        labels[:, : max(prompt, 1)] = -100
        model(input_ids=tokens, labels=labels).loss.backward()
        whole = torch.cat([factor.grad.reshape(-1) for factor in factors])
        model.zero_grad(set_to_none=True)
        return whole

    size = gradient(*pairs[0]).numel()
    whole, blocks = request["k"] // BLOCK, request["less_blocks"]
    projector = BasicProjector(
        grad_dim=size,
        proj_dim=BLOCK * blocks,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
        dtype=dtype,
        block_size=BLOCK,
    )
    with Meter() as backward:
        gradients = [gradient(*pair) for pair in pairs]
    with Meter() as projecting:
        # The cost hardly depends on how many there are: a stack is filled up with copies to what LESS projects.
        stack = torch.stack([gradients[i % len(gradients)] for i in range(TOGETHER)])
        projector.project(stack, model_id=0)
    tokens, labels = sum(len(ids) for ids, _ in pairs), sum(len(ids) - max(n, 1) for ids, n in pairs)
    return {
        "backward": {**backward.report(), "examples": len(pairs), "tokens": tokens, "labels": labels},
        "projection": {**projecting.report(), "examples": TOGETHER, "times": whole / blocks},
        "size": size,
        "bytes": request["k"] * 2,
    }


if __name__ == "__main__":
    answer({"speed": speed})
