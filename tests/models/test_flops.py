"""Model FLOPs: a hand count, and the products of a traced forward pass."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from duet_jax.distributed.flops import count
from duet_jax.models import llama
from duet_jax.models.flops import training_flops
from duet_jax.models.lora import LoraConfig

SHAPE = llama.LlamaConfig(
    vocab_size=11, hidden_size=6, intermediate_size=10, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=2
)
# Features of q and o are 6 x 8, of k and v 6 x 4, of gate, up and down 6 x 10.
LAYER = 2 * 48 + 2 * 24 + 3 * 60


def test_all_parameters_by_hand() -> None:
    lengths = np.array([1, 4])
    products = 2 * 5 * 3 * LAYER + 2 * (0 + 3) * 6 * 11
    attention = 2 * 2 * (1 + 10) * 3 * 4 * 2
    assert training_flops(SHAPE, None, lengths) == 3 * (products + attention)


def test_adapters_by_hand() -> None:
    lora = LoraConfig(rank=5, targets=("k", "down"), layers=(0, 2))
    adapters = 2 * 4 * 2 * 5 * ((6 + 4) + (10 + 6))
    frozen = 2 * 4 * 3 * LAYER + 2 * 3 * 6 * 11
    attention = 2 * 2 * 10 * 3 * 4 * 2
    assert training_flops(SHAPE, lora, np.array([4])) == 2 * frozen + 3 * (adapters + attention)
    everywhere = dataclasses.replace(lora, layers=None)
    more = training_flops(SHAPE, everywhere, np.array([4])) - training_flops(SHAPE, lora, np.array([4]))
    assert more == 3 * adapters / 2


def test_nothing_goes_back_below_the_lowest_adapters() -> None:
    lora = LoraConfig(rank=5, targets=("k", "down"), layers=(1, 2))
    adapters = 2 * 4 * 2 * 5 * ((6 + 4) + (10 + 6))
    layer, head, attention = 2 * 4 * LAYER, 2 * 3 * 6 * 11, 2 * 2 * 10 * 4 * 2
    forward = 3 * (layer + attention) + head + adapters
    # Two of the three layers, and attention's products twice, since both of their factors have a gradient.
    backward = 2 * (layer + 2 * attention) + head + 2 * adapters
    assert training_flops(SHAPE, lora, np.array([4])) == forward + backward


def test_a_window_sees_fewer_pairs() -> None:
    window = dataclasses.replace(SHAPE, sliding_window=2)
    # Of five tokens the first sees one, and the others two.
    fewer = training_flops(SHAPE, None, np.array([5])) - training_flops(window, None, np.array([5]))
    assert fewer == 3 * 2 * 2 * (15 - 9) * 3 * 4 * 2
    short = np.array([1, 2])
    assert training_flops(window, None, short) == training_flops(SHAPE, None, short)


def test_a_traced_forward_pass_has_these_products() -> None:
    """XLA's attention computes all pairs of tokens, and the traced pass leaves the head out."""
    tokens = np.zeros((2, 7), np.int32)
    params = jax.eval_shape(lambda: llama.init(SHAPE, key=jax.random.key(0)))
    traced = jax.make_jaxpr(lambda params: llama.hidden_states(SHAPE, params, tokens))(params)
    head, unseen = 2 * 2 * 6 * 6 * 11, 2 * 2 * 2 * (7 * 7 - 7 * 8 / 2) * 3 * 4 * 2
    assert training_flops(SHAPE, None, np.array([7, 7])) == 3 * (count(traced) + head - unseen)
