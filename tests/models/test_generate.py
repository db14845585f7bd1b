"""Cached greedy generation equals taking the best token of the full forward pass again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax.models import llama
from duet_jax.models.generate import make_generate

CONFIG = llama.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
LENGTHS = (5, 2, 1)


def reference(params, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        hidden = llama.hidden_states(CONFIG, params, jnp.asarray([ids]))
        ids.append(int(jnp.argmax(hidden[0, -1] @ llama.output_head(params).T)))
    return ids[len(prompt) :]


def test_equals_the_full_forward_pass_and_stops():
    params = llama.init(CONFIG, key=jax.random.key(0))
    params["embedding"] = params["embedding"] * 40
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 40, n).tolist() for n in LENGTHS]
    expected = [reference(params, prompt, 8) for prompt in prompts]
    tokens = np.zeros((3, 6), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    run = make_generate(CONFIG, max_new_tokens=8, stop_ids=(), pad_id=0)
    ids, counts = run(params, None, tokens, np.array(LENGTHS, np.int32))
    assert ids.tolist() == expected
    assert counts.tolist() == [8, 8, 8]

    stop = expected[0][3]
    stopping = make_generate(CONFIG, max_new_tokens=8, stop_ids=(stop,), pad_id=0)
    ids, counts = stopping(params, None, tokens, np.array(LENGTHS, np.int32))
    for row, reply in enumerate(expected):
        end = reply.index(stop) if stop in reply else 8
        assert counts[row] == end
        assert ids[row].tolist() == reply[:end] + [0] * (8 - end)
