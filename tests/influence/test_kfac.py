"""K-FAC and EK-FAC against whole gradients and whole matrices."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.influence import kfac
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.influence.kfac import Damping
from duet_jax.influence.projections import CountSketch
from duet_jax.models import llama
from duet_jax.models import lora as adapters

CONFIG = llama.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
CHOSEN = adapters.LoraConfig(rank=3, alpha=6.0, targets=("q", "down"))
ROWS, LENGTH = 6, 7
LORA = ExampleGradients(CONFIG, remat="none")


@lru_cache(maxsize=1)
def problem():
    """A decoder with adapters, and sequences of which the last is padding."""
    rng = np.random.default_rng(0)
    params, factors = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32),
        (llama.shapes(CONFIG), jax.eval_shape(lambda: adapters.init(CONFIG, CHOSEN, key=jax.random.key(0)).factors)),
    )
    lora = dataclasses.replace(adapters.without_factors(CONFIG, CHOSEN), factors=factors)
    tokens = rng.integers(0, 11, (ROWS, LENGTH)).astype(np.int32)
    starts = np.array([1, 2, 3, 5, 1, LENGTH])
    return params, lora, tokens, (np.arange(LENGTH) >= starts[:, None]).astype(np.float32)


@lru_cache(maxsize=2)
def whole(gradients, drawn=False):
    """Gradients of loss sums `{name: [B, L, rows, cols]}` the long way, for true or for fixed other labels."""
    params, lora, tokens, weights = problem()

    def loss(trainable, tokens, labels, weights):
        base, adapter = params, None
        if gradients.target == "full":
            base = trainable
        else:
            adapter = dataclasses.replace(lora, factors=trainable)
        hidden = llama.hidden_states(CONFIG, base, tokens[None], lora=adapter)[0, :-1]
        log_probs = jax.nn.log_softmax(hidden @ params["embedding"].T)[jnp.arange(LENGTH - 1), labels[1:]]
        return -jnp.sum(weights[1:] * log_probs)

    trainable = params if gradients.target == "full" else lora.factors
    used = labels() if drawn else tokens
    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))(trainable, tokens, used, weights)
    rows = [gradients.named(jax.tree.map(lambda x, b=b: np.asarray(x[b], np.float64), found)) for b in range(ROWS)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@lru_cache(maxsize=1)
def labels():
    params, lora, tokens, _ = problem()
    return np.asarray(kfac.sample_labels(LORA)(params, lora, tokens, jax.random.fold_in(jax.random.key(3), 0)))


@lru_cache(maxsize=2)
def fitted(target):
    params, lora, tokens, weights = problem()
    gradients = dataclasses.replace(LORA, target=target)
    if target == "full":
        halves = [(tokens[:3], weights[:3]), (tokens[3:], weights[3:])]
        return gradients, kfac.fit(gradients, params, None, halves, key=None)
    return gradients, kfac.fit(gradients, params, lora, [(tokens, weights)], key=jax.random.key(3))


def turned(eigen, gradient):
    return np.einsum("lri,blrc,lco->blio", eigen.inputs, gradient, eigen.outputs)


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("target", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_corrected_eigenvalues_are_those_of_whole_gradients(target):
    """For drawn labels in one batch and true ones in two; rows without weight are no examples."""
    gradients, curvature = fitted(target)
    named = whole(gradients, drawn=target == "lora")
    assert set(curvature) == set(named)
    for name, eigen in curvature.items():
        close(eigen.values, np.mean(turned(eigen, named[name])[:5] ** 2, axis=0))
        for basis in eigen[:2]:
            close(np.einsum("lri,lrj->lij", basis, basis), np.stack([np.eye(basis.shape[1])] * 2))


def grid():
    """Gradients x d^T of every pair of 5 inputs and 4 derivatives: their second moment is a Kronecker product."""
    rng = np.random.default_rng(1)
    x, d = rng.normal(size=(5, 4)) * [1, 2, 3, 0.5], rng.normal(size=(4, 3)) * [0.3, 1, 2]
    pairs = np.repeat(x, 4, axis=0)[:, None, :], np.tile(d, (5, 1))[:, None, :]
    return tuple(jnp.asarray(array, jnp.float32) for array in pairs)


@pytest.mark.parametrize("damping", [Damping(), Damping(0.0), Damping(absolute=0.7)])
def test_both_invert_a_fisher_matrix_that_is_a_kronecker_product(damping):
    x, d = grid()
    eigen = kfac.fit_layer(x, d)
    close(eigen.values, kfac.fit_layer(x, d, corrected=False).values)
    vectors = np.einsum("btr,btc->brc", x, d).reshape(20, -1).astype(np.float64)
    fisher = vectors.T @ vectors / 20
    added = damping.absolute if damping.absolute is not None else damping.relative * np.trace(fisher) / 12
    target = np.random.default_rng(2).normal(size=(2, 1, 4, 3)).astype(np.float32)
    expected = np.linalg.solve(fisher + added * np.eye(12), target.reshape(2, 12).T).T.reshape(target.shape)
    close(kfac.precondition({"q": eigen}, {"q": target}, damping)["q"], expected, 1e-4)


@pytest.mark.slow
def test_preconditioned_targets_and_whitened_sketches_give_the_same_influences():
    params, lora, tokens, weights = problem()
    gradients, curvature = fitted("lora")
    named, damping, projection = whole(gradients), Damping(0.2), CountSketch(512, 5)
    targets = {name: array[:2].astype(np.float32) for name, array in named.items()}
    white, expected = {}, 0
    for name, eigen in curvature.items():
        added = 0.2 * np.mean(eigen.values, axis=(1, 2), keepdims=True)
        white[name] = turned(eigen, named[name]) * (np.asarray(eigen.values, np.float64) + added) ** -0.5
        expected = expected + np.einsum("blrc,qlrc->bq", white[name], white[name][:2])
    solved = kfac.precondition(curvature, targets, damping)
    sums = dataclasses.replace(gradients, reduction="sum")
    found = sums.inner_products()(params, lora, tokens, weights, targets=solved).values
    close(found, expected)
    # A store of plain sketches against a projected, preconditioned target.
    rows = kfac.project(projection, {name: array.astype(np.float32) for name, array in named.items()})
    close(rows @ kfac.project(projection, solved).T, expected, 0.3)
    sketched = kfac.whitened_sketch(sums, projection, curvature, damping)(params, lora, tokens, weights).values
    close(sketched, kfac.project(projection, {name: jnp.asarray(a, jnp.float32) for name, a in white.items()}))
    close(sketched @ sketched[:2].T, expected, 0.3)


def test_totals_and_fisher_products():
    params, lora, tokens, weights = problem()
    named = whole(LORA, drawn=True)
    sums = dataclasses.replace(LORA, reduction="sum", micro_batch=3)
    found = kfac.total_gradient(sums)(params, lora, tokens, weights, labels=labels()).values
    for name, array in named.items():
        close(found[name], array.sum(axis=0))
    multiply = kfac.fisher_product(LORA, params, lora, tokens, weights, labels())
    v = {name: jnp.asarray(array[0], jnp.float32) for name, array in whole(LORA).items()}
    along = sum(np.einsum("blrc,lrc->b", named[name], v[name]) for name in v) / 5
    product = jax.jit(multiply)(v)
    for name, array in named.items():
        close(product[name], np.einsum("b,blrc->lrc", along, array))


def test_labels_are_drawn_from_the_model():
    params, lora, tokens, _ = problem()
    tokens = np.tile(tokens[:1, :3], (4000, 1))
    drawn = np.asarray(kfac.sample_labels(LORA)(params, lora, tokens, jax.random.key(0)))
    assert (drawn[:, 0] == tokens[:, 0]).all()
    hidden = llama.hidden_states(CONFIG, params, tokens[:1], lora=lora)[0]
    expected = np.asarray(jax.nn.softmax(hidden @ params["embedding"].T))
    for place in (1, 2):
        found = np.bincount(drawn[:, place], minlength=11) / 4000
        assert np.abs(found - expected[place - 1]).max() < 4 * 0.5 / np.sqrt(4000)


def test_layers_without_gradients_stay_without_influence():
    eigen = kfac._decompose({"x": np.zeros((1, 3, 3)), "d": np.zeros((1, 2, 2)), "tokens": np.zeros(1)}, 4)
    found = kfac.precondition({"q": eigen}, {"q": jnp.ones((1, 1, 3, 2))})["q"]
    np.testing.assert_array_equal(found, 0)
    # So do parameters that the curvature leaves out.
    np.testing.assert_array_equal(kfac.precondition({}, {"k": jnp.ones((1, 1, 3, 2))})["k"], 0)


def test_what_cannot_be_done_is_said():
    params, lora, tokens, weights = problem()
    with pytest.raises(ValueError, match="head=False"):
        kfac.total_gradient(dataclasses.replace(LORA, target="full", head=True))
    with pytest.raises(ValueError, match="not a generator"):
        kfac.fit(LORA, params, lora, iter([]), key=None)
    with pytest.raises(ValueError, match="all of the parameters down.a"):
        kfac.precondition(fitted("lora")[1], {})
