"""Makes small random reward models and scores conversations with transformers; called as a script by its test.

python classifier_reference.py --make KIND FOLDER
python classifier_reference.py FOLDER CONVERSATIONS.json SCORES.npy
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers

SHAPE = dict(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    num_labels=1,
)


def make(kind: str, folder: str) -> None:
    """A random model; padding of "Qwen2" is the end of text, as in many reward models."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, pad_token_id=2 if kind == "Qwen2" else 0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def scores(folder: str, conversations: list[list[dict[str, str]]]) -> np.ndarray:
    """Logits of conversations, all in one batch padded on the right."""
    # AutoTokenizer would take Qwen2's own splitting for this tokenizer of characters.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    tokenizer.pad_token_id = model.config.pad_token_id
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(*sys.argv[2:])
    else:
        with open(sys.argv[2]) as file:
            np.save(sys.argv[3], scores(sys.argv[1], json.load(file)))
