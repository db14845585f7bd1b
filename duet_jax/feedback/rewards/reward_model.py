"""A reward model: a decoder of our family with a sequence-classification head of one label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax.data import Encoded, Example
from duet_jax.data.example import plain_text
from duet_jax.feedback.rewards.readout import Readout, resident_dtype
from duet_jax.feedback.rewards.reward import Reward
from duet_jax.models.classifier import read_classifier


def reward_model(folder: str | Path, *, batch_size: int = 8, dtype: str = "float32") -> Reward:
    """The logit that transformers' `LlamaForSequenceClassification` (Qwen2, ...) gives a prompt with its reply.

    The text is the conversation by the tokenizer's chat template, the reply as the assistant's message; without a
    template the prompt, a newline and the reply, after BOS where the tokenizer adds one. As in transformers, the
    logit is that of the last token which is not padding; where padding and end of text are the same id, a reply's
    end of text is passed over too.

    Args:
      folder: Hugging Face folder with `score.weight` of shape [1, hidden].
      batch_size: replies in a forward pass.
      dtype: of the model's matrix products.

    Raises:
      ModelError: there is no such model.
    """
    read = read_classifier(Path(folder).expanduser(), dtype=resident_dtype(dtype))
    tokenizer, score = read.tokenizer, read.score
    fingerprint = models.fingerprint(read.config, {**read.params, "score": score})
    model = models.Model(read.config, read.params, tokenizer, str(folder), fingerprint)
    readout = Readout(model, jnp.asarray(score, jnp.float32), batch_size, jnp.dtype(dtype))

    def function(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        texts = [_text(*pair, tokenizer) for pair in zip(replies, examples, strict=True)]
        # A rendered chat has all the special tokens that it should have.
        special = tokenizer.chat_template is None
        tokens = tuple(np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts, add_special=special))
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        encoded = Encoded(tokens, lengths, tuple(example.id for example in examples))
        return readout(encoded, [_last(ids, read.pad_id) for ids in tokens])[:, 0].tolist()

    return Reward(
        name="reward_model",
        low=-math.inf,
        high=math.inf,
        needs_label=False,
        identity=f"reward model {readout.identity}, padding {read.pad_id}",
        function=function,
    )


def _text(reply: str, example: Example, tokenizer: models.Tokenizer) -> str:
    if tokenizer.chat_template is None:
        return f"{plain_text(example.prompt)}\n{reply}"
    prompt = example.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.render_chat([*messages, {"role": "assistant", "content": reply}])


def _last(ids: np.ndarray, pad_id: int | None) -> int:
    """Place of the last token that is not padding; 0 where there is none, as in transformers."""
    found = np.flatnonzero(ids != pad_id) if pad_id is not None else np.arange(len(ids))
    return int(found[-1]) if len(found) else 0
