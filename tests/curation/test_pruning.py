"""Wanda: the specification's numbers, and input norms against the model's own forward pass."""

from __future__ import annotations

import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax.curation.pruning import input_norms, prune, prune_all
from duet_jax.data import Encoded
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.feedback import Deployed, Engine
from duet_jax.models import llama
from duet_jax.models.linear import Taps
from tests.small import shape

TOKENIZER = CharacterTokenizer(string.ascii_lowercase)
CONFIG = shape(TOKENIZER, max_length=16)
NAMES = {"q", "k", "v", "o", "gate", "up", "down"}


def test_by_hand() -> None:
    weights, inputs = np.array([1, -2, 0.5]), np.array([[2, 0, 3], [0, 1, 4]])
    norms = np.sqrt((inputs**2).sum(0))
    np.testing.assert_allclose(np.abs(weights) * norms, [2, 2, 2.5])
    # Two weights are worth least: the first goes.
    kernel = jnp.array(np.stack([weights, weights[::-1]], axis=1), jnp.float32)
    pruned = np.asarray(prune(kernel, jnp.array(norms, jnp.float32), 1))
    np.testing.assert_array_equal(pruned[:, 0], [0, -2, 0.5])
    np.testing.assert_array_equal(pruned[:, 1], [0, -2, 1])


def test_norms_and_sparsity_of_a_model() -> None:
    params = llama.init(CONFIG, key=jax.random.key(0))
    engine = Engine(models.Model(CONFIG, params, TOKENIZER, "random", ""), False, (6, 9))
    rng = np.random.default_rng(0)
    tokens = tuple(rng.integers(3, CONFIG.vocab_size, size).astype(np.int32) for size in (5, 9, 3))
    encoded = Encoded(tokens, np.ones(3, np.int32), tuple("abc"))
    norms = input_norms(Deployed(engine, params), encoded, batch_size=2)
    assert set(norms) == NAMES

    # The decoder itself, an example at a time, run as Python so that a tap may look at values.
    squares: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}

    def observe(name: str, layer: None, x: jax.Array, y: jax.Array) -> jax.Array:
        squares[name].append(np.square(np.asarray(x, np.float64)).sum((0, 1)))
        return y

    with jax.disable_jit():
        for ids in tokens:
            llama.hidden_states(CONFIG, params, jnp.asarray(ids[None]), taps=Taps(observe))
    for name, values in norms.items():
        expected = np.sqrt(np.array(squares[name]).reshape(len(tokens), CONFIG.num_layers, -1).sum(0))
        np.testing.assert_allclose(values, expected, rtol=1e-5)

    pruned = prune_all(params, norms, 0.29)
    for name, values in norms.items():
        before, after = params["layers"][name]["kernel"], np.asarray(pruned["layers"][name]["kernel"])
        gone = after == 0
        assert (gone.sum(1) == int(0.29 * after.shape[1])).all()
        np.testing.assert_array_equal(after[~gone], np.asarray(before)[~gone])
        worth = np.abs(np.asarray(before)) * np.asarray(values)[:, :, None]
        assert (np.where(gone, worth, -np.inf).max(1) <= np.where(gone, np.inf, worth).min(1)).all()
    assert pruned["embedding"] is params["embedding"]
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        compiled.append(event)

    # Another candidate set compiles nothing anew.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        prune_all(params, norms, 0.29)
        again = len(compiled)
        prune_all(params, norms, 0.5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert again == 0 < len(compiled)
