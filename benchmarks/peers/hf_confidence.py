"""The plan of benchmarks/confidence.py done with transformers; run by a Python with torch and transformers.

Reads a JSON request from standard input: sampled answers by `generate` (the samples of a prompt share nothing but the
batch, as there), then a forward pass over every question, in batches of like length, reading the letters' logits at the
last token alone. Writes a line of JSON: seconds of all, and the letters' probabilities.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 16


def main() -> None:
    request = json.load(sys.stdin)
    folder = request["folder"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[request["dtype"]]).eval()
    rows = request["rows"]
    run(tokenizer, model, rows[:2], request)  # Warms up.
    began = time.perf_counter()
    answers = run(tokenizer, model, rows, request)
    found = {"seconds": time.perf_counter() - began, "answers": answers}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**found, "versions": versions}))


@torch.inference_mode()
def run(tokenizer, model, rows: list[dict], request: dict) -> list[dict]:
    sample(tokenizer, model, [row["sample"] for row in rows], request)
    texts = [text for row in rows for text in row["letters"]]
    letters = read(tokenizer, model, texts, ["A", "B", "C"])
    read(tokenizer, model, [text for row in rows for text in row["contradictions"]], ["A", "B"])
    likelihood(tokenizer, model, rows)
    count = len(rows[0]["letters"])
    return [{"options": letters[i * count : (i + 1) * count]} for i in range(len(rows))]


def batches(ids: list[list[int]], size: int) -> list[list[int]]:
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(ids: list[list[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, ids))
    rows = [[pad] * (longest - len(one)) + one if left else one + [pad] * (longest - len(one)) for one in ids]
    ones = [
        [0] * (longest - len(one)) + [1] * len(one) if left else [1] * len(one) + [0] * (longest - len(one))
        for one in ids
    ]
    return torch.tensor(rows), torch.tensor(ones)


def sample(tokenizer, model, texts: list[str], request: dict) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for rows in batches(ids, max(request["batch_size"] // request["samples"], 1)):
        tokens, mask = padded([ids[row] for row in rows], tokenizer.pad_token_id, left=True)
        model.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=request["samples"],
            max_new_tokens=request["max_new_tokens"],
            eos_token_id=[*request["stop"], tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )


def read(tokenizer, model, texts: list[str], words: list[str]) -> list[list[float]]:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    first = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    found: list[list[float]] = [[] for _ in ids]
    for rows in batches(ids, BATCH):
        tokens, mask = padded([ids[row] for row in rows], tokenizer.pad_token_id, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1, first]
        for row, values in zip(rows, torch.softmax(logits.double(), 1).tolist(), strict=True):
            found[row] = values
    return found


def likelihood(tokenizer, model, rows: list[dict]) -> None:
    prompts = [tokenizer.encode(row["prompt"], add_special_tokens=False) for row in rows]
    responses = [tokenizer.encode(row["response"], add_special_tokens=False) for row in rows]
    ids = [[*prompt, *response, tokenizer.eos_token_id] for prompt, response in zip(prompts, responses, strict=True)]
    for chosen in batches(ids, BATCH):
        tokens, mask = padded([ids[row] for row in chosen], tokenizer.pad_token_id, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        most = max(len(responses[row]) + 2 for row in chosen)
        logits = model(tokens, attention_mask=mask, position_ids=positions, logits_to_keep=most).logits
        targets = tokens[:, -most + 1 :, None]
        torch.log_softmax(logits[:, :-1].float(), 2).gather(2, targets).sum()


if __name__ == "__main__":
    main()
