"""transformers' `generate`, for benchmarks/generation.py; run by a Python with torch and transformers.

Reads a JSON request from standard input, writes a line of JSON with the seconds of a step's products alone, and one for
each case and round: seconds and new tokens.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    request = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(request["folder"], dtype=DTYPES[request["dtype"]]).eval()
    print(json.dumps({"products_seconds": products(model, request["rows"])}), flush=True)
    for name in request["cases"]:
        case = request["cases"][name]
        for number in range(request["rounds"] + 1):
            began = time.perf_counter()
            tokens = run(model, case, request["pad_id"], number)
            if number:  # The first round warms up.
                found = {"case": name, "seconds": time.perf_counter() - began, "tokens": tokens}
                print(json.dumps({**found, "versions": versions()}), flush=True)


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


@torch.inference_mode()
def products(model: torch.nn.Module, rows: int) -> float:
    """Seconds of the products of so many rows with the weights of all linear layers, the best of several."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {size: torch.ones(rows, size, dtype=weights[0].dtype) for size in {w.shape[1] for w in weights}}
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.inference_mode()
def run(model: torch.nn.Module, case: dict, pad_id: int, seed: int) -> int:
    """New tokens of all replies, in batches of `rows`."""
    torch.manual_seed(seed)
    prompts, samples, eos = case["prompts"], case["samples"], case["eos_ids"]
    size, total = max(case["rows"] // samples, 1), 0
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        found = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=samples,
            max_new_tokens=case["max_new_tokens"],
            eos_token_id=eos or [-1],
            pad_token_id=pad_id,
        )[:, longest:]
        over = torch.isin(found, torch.tensor(eos or [-1])).int()
        # Up to and with the first end of text.
        total += int((over.cumsum(1) - over == 0).sum())
    return total


if __name__ == "__main__":
    main()
