"""The DPO loss of pairs and its gradient's norm by PyTorch and transformers; run by test_parity_preference.py."""

import json
import sys

import torch
import transformers

folder, request, answer = sys.argv[1:]
with open(request) as file:
    given = json.load(file)
network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_prob(tokens, prompt):
    ids = torch.tensor([tokens])
    found = torch.log_softmax(network(input_ids=ids).logits[0, :-1], dim=-1)
    return found.gather(1, ids[0, 1:, None])[prompt - 1 :, 0].sum()


log_probs = torch.stack([torch.stack([log_prob(*one) for one in pair]) for pair in given["pairs"]])
reference = torch.tensor(given["reference"])
ratios = log_probs - reference
if given["kind"] == "davir_dpo":
    ratios = ratios / reference.abs()
loss = -torch.nn.functional.logsigmoid(given["beta"] * (ratios[:, 0] - ratios[:, 1])).mean()
loss.backward()
norm = torch.sqrt(sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None))
with open(answer, "w") as file:
    json.dump({"log_probs": log_probs.tolist(), "loss": loss.item(), "norm": norm.item()}, file)
