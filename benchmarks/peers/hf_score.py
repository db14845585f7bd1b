"""transformers' log-probabilities of responses, for benchmarks/scoring.py; run by a Python with torch and transformers.

Reads a JSON request from standard input, writes one line of JSON: seconds of one pass over all examples, and the
summed log-probability of each response.
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
    order = list(range(len(request["tokens"])))
    if request["sorted"]:
        order.sort(key=lambda row: -len(request["tokens"][row]))
    batches = [order[first : first + request["rows"]] for first in range(0, len(order), request["rows"])]
    run(model, request, batches[-1:])  # Warms up.
    began = time.perf_counter()
    found = run(model, request, batches)
    seconds = time.perf_counter() - began
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    log_probs = [found[row] for row in range(len(order))]
    print(json.dumps({"seconds": seconds, "log_probs": log_probs, "versions": versions}))


@torch.inference_mode()
def run(model: torch.nn.Module, request: dict, batches: list[list[int]]) -> dict[int, float]:
    found = {}
    for rows in batches:
        tokens = [request["tokens"][row] for row in rows]
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [request["pad_id"]] * (longest - len(row)) for row in tokens])
        attended = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        logits = model(ids, attention_mask=attended, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        position = torch.arange(1, longest)[None]
        first = torch.tensor([max(request["prompts"][row], 1) for row in rows])[:, None]
        scored = (position >= first) & (attended[:, 1:] == 1)
        found.update(zip(rows, (-losses * scored).sum(1).tolist(), strict=True))
    return found


if __name__ == "__main__":
    main()
