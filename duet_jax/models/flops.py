"""Model FLOPs of a training, by formula (PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import numpy as np

from duet_jax.models.llama import LlamaConfig
from duet_jax.models.lora import LoraConfig, widths


def training_flops(config: LlamaConfig, lora: LoraConfig | None, lengths: np.ndarray) -> float:
    """Floating-point operations that one pass over sequences needs, forward and backward.

    Only matrix products count, a multiplication and an addition as two. The backward pass costs twice the forward one;
    through a frozen matrix, whose gradient nobody needs, as much as it. It ends at the lowest layer with adapters,
    below which nothing is trained. What an implementation adds is not counted: padding, and what is computed again to
    save memory.

    Where we differ from the paper: attention counts the pairs of tokens that see each other, about half of all, and
    the output head every token but a sequence's last, after which nothing is predicted.

    Args:
      config: shape of the decoder.
      lora: adapters that are trained on a frozen decoder; None when all parameters are.
      lengths: tokens of each sequence, `[n]`.
    """
    lengths = np.asarray(lengths, np.float64)
    tokens, layers = lengths.sum(), config.num_layers
    shapes = widths(config)
    layer = sum(features_in * features_out for features_in, features_out in shapes.values())
    products = 2 * tokens * layer
    head = 2 * (tokens - len(lengths)) * config.hidden_size * config.vocab_size
    seen = lengths if config.sliding_window is None else np.minimum(lengths, config.sliding_window)
    pairs = (seen * (seen + 1) / 2 + (lengths - seen) * seen).sum()
    # Queries with keys, and weights with values.
    attention = 2 * 2 * pairs * config.num_heads * config.head_dim
    if lora is None:
        return float(3 * (layers * (products + attention) + head))
    adapted = range(layers) if lora.layers is None else lora.layers
    adapters = 2 * tokens * len(adapted) * lora.rank * sum(sum(shapes[name]) for name in lora.targets)
    reached = layers - min(adapted)
    return float(2 * head + layers * (products + attention) + reached * (products + 2 * attention) + 3 * adapters)
