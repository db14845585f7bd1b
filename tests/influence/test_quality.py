"""Examples that were spoilt on purpose are found by what they do to clean ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

from duet_jax.influence import inverse, kfac
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.models import llama


def test_wrong_labels_of_a_logistic_regression_are_found():
    rng = np.random.default_rng(1)
    truth, x = rng.normal(size=6), rng.normal(size=(800, 6))
    y = (rng.random(800) < 1 / (1 + np.exp(-4 * x @ truth))).astype(np.float64)
    wrong = np.arange(200) < 30
    y[:200][wrong] = 1 - y[:200][wrong]
    rows = np.split(np.arange(800), [200])
    train, clean = ((jnp.asarray(x[s], jnp.float32), jnp.asarray(y[s], jnp.float32)) for s in rows)

    def loss(w, example):
        return jax.nn.softplus(example[0] @ w) - example[1] * (example[0] @ w)

    def mean(w, batch):
        return jnp.mean(jax.vmap(loss, (None, 0))(w, batch)) + 0.005 * jnp.sum(w**2)

    w, derivatives = jnp.zeros(6), jax.jit(lambda w: (inverse.hessian(mean, w, train), jax.grad(mean)(w, train)))
    for _ in range(8):
        w -= inverse.explicit_solve(*derivatives(w))
    target = jax.grad(lambda w: jnp.mean(jax.vmap(loss, (None, 0))(w, clean)))(w)
    solved = inverse.conjugate_gradients(inverse.hessian_product(mean, w, train), target).solution
    found = inverse.influences(loss, w, train, solved[None])[:, 0]
    assert roc_auc_score(wrong, found) > 0.9


MODEL = llama.LlamaConfig(
    vocab_size=12, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8
)


def sequences(rng, count, successors):
    """`[count, 8]`, steps of a Markov chain: the successor of a token, or any token once in eight."""
    tokens = rng.integers(0, 12, (count, 8)).astype(np.int32)
    for t in range(1, 8):
        follows = rng.random(count) < 7 / 8
        tokens[:, t] = np.where(follows, successors[tokens[:, t - 1]], tokens[:, t])
    return tokens


@pytest.mark.slow
def test_sequences_of_another_chain_in_a_language_models_training_data_are_found():
    """A model trained from scratch; influence on clean sequences by EK-FAC."""
    rng = np.random.default_rng(0)
    clean, foreign = rng.permutation(12), rng.permutation(12)
    bad = np.arange(96) < 12
    train = np.concatenate([sequences(rng, 12, foreign), sequences(rng, 84, clean)])
    tests = sequences(rng, 48, clean)
    weights = np.ones((96, 8), np.float32) * (np.arange(8) > 0)

    def loss(params):
        hidden = llama.hidden_states(MODEL, params, train)[:, :-1]
        log_probs = jax.nn.log_softmax(hidden @ llama.output_head(params).T)
        return -jnp.mean(jnp.take_along_axis(log_probs, train[:, 1:, None], axis=-1))

    optimiser = optax.adam(5e-3)

    def step(state, _):
        update, after = optimiser.update(jax.grad(loss)(state[0]), state[1])
        return (optax.apply_updates(state[0], update), after), None

    start = llama.init(MODEL, key=jax.random.key(0))
    params = jax.jit(lambda p: jax.lax.scan(step, (p, optimiser.init(p)), None, length=40)[0][0])(start)
    gradients = ExampleGradients(MODEL, target="full", remat="none")
    curvature = kfac.fit(gradients, params, None, [(train, weights)], key=jax.random.key(1))
    target = kfac.total_gradient(gradients)(params, None, tests, weights[:48]).values
    solved = kfac.precondition(curvature, {name: array[None] for name, array in target.items()})
    utilities = gradients.inner_products()(params, None, train, weights, targets=solved).values[:, 0]
    assert roc_auc_score(bad, -np.asarray(utilities)) > 0.9
