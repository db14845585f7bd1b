"""A tap changes nothing and leaves, as its accumulator's derivative, what its rule makes of the layer's gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.influence import projections
from duet_jax.influence.features import FrozenAdam, Gradient, RankOne, Sign
from duet_jax.influence.projections import CountSketch
from duet_jax.influence.tap import Context, InnerProducts, SecondMoments, Sketch, SquaredNorm, tap

LAYERS, BATCH, TOKENS, SIZE = 3, 4, 6, 10
X = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, SIZE))
KERNELS = jax.random.normal(jax.random.key(1), (LAYERS, SIZE, SIZE)) / 3


def run(kernels, accumulator=None, rule=None, contexts=None, x=X, remat=False):
    """Per-example losses of a small network, a scan over layers, tapped where there is a rule."""

    def layer(x, inputs):
        kernel, context = inputs
        y = x @ kernel
        if rule is not None:
            y = tap(rule, "q", accumulator, context, x, y)
        return jnp.tanh(y), None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (kernels, contexts))
    return jnp.sum(jnp.square(x[:, 1:]), axis=(1, 2))


def gradients():
    """`[B, L, rows, cols]` the long way."""
    return jax.vmap(lambda x: jax.grad(lambda k: run(k, x=x[None])[0])(KERNELS))(X)


def tapped(rule, contexts=None, remat=False, targets=0):
    contexts = Context(jnp.arange(LAYERS)) if contexts is None else contexts
    zeros = rule.zeros(BATCH, SIZE, SIZE, targets)
    return jax.jit(jax.grad(lambda a: run(KERNELS, a, rule, contexts, remat=remat).sum()))(zeros)


@pytest.mark.parametrize("remat", [False, True])
def test_the_accumulators_derivative_is_the_sketch_of_all_layers(remat):
    projection = CountSketch(64, 3)
    whole = gradients()
    expected = sum(projection.project_dense("q", layer, whole[:, layer]) for layer in range(LAYERS))
    np.testing.assert_allclose(tapped(Sketch(projection), remat=remat), expected, rtol=1e-5, atol=1e-5)


def test_a_tap_changes_neither_values_nor_other_gradients():
    rule, contexts = Sketch(CountSketch(64)), Context(jnp.arange(LAYERS))
    zeros = rule.zeros(BATCH, SIZE, SIZE, 0)
    np.testing.assert_array_equal(run(KERNELS, zeros, rule, contexts), run(KERNELS))
    plain = jax.grad(lambda k: run(k).sum())(KERNELS)
    beside = jax.grad(lambda k: run(k, zeros, rule, contexts).sum())(KERNELS)
    np.testing.assert_allclose(beside, plain, rtol=1e-6)


@pytest.mark.parametrize("feature", [Gradient(), Sign(), FrozenAdam(), RankOne()], ids=lambda f: f.name)
def test_exact_norms_and_inner_products(feature):
    moments = jnp.square(jax.random.normal(jax.random.key(4), (LAYERS, SIZE, SIZE)))
    state = jax.vmap(feature.prepare, in_axes=(0, 0, None))(moments, moments, jnp.asarray(10))
    targets = jax.random.normal(jax.random.key(5), (LAYERS, 2, SIZE, SIZE))
    contexts = Context(jnp.arange(LAYERS), state, targets)
    whole = jnp.stack(
        [feature.dense(gradients()[:, i], jax.tree.map(lambda s, i=i: s[i], state)) for i in range(LAYERS)], axis=1
    )
    norms = tapped(SquaredNorm(feature), contexts)
    np.testing.assert_allclose(norms, jnp.sum(jnp.square(whole), axis=(1, 2, 3)), rtol=1e-5)
    products = tapped(InnerProducts(feature), contexts, targets=2)
    np.testing.assert_allclose(products, jnp.einsum("blrc,lqrc->bq", whole, targets), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 30])
def test_both_ways_to_a_norm_agree(tokens):
    """Few tokens: from products of tokens. Many: from the gradient."""
    x = jax.random.normal(jax.random.key(0), (BATCH, tokens, 24))
    d = jax.random.normal(jax.random.key(1), (BATCH, tokens, 12))
    expected = jnp.sum(jnp.square(jnp.einsum("btr,btc->brc", x, d)), axis=(1, 2))
    np.testing.assert_allclose(SquaredNorm().of_factors("q", Context(0), x, d), expected, rtol=1e-5)


def test_features_with_state_in_blocks(monkeypatch):
    """Moments and targets are cut like the gradient."""
    monkeypatch.setattr(projections, "GRADIENT_VALUES", 2 * 8 * 32)
    x = jax.random.normal(jax.random.key(0), (2, 5, 75))
    d = jax.random.normal(jax.random.key(1), (2, 5, 8))
    scale = jax.random.uniform(jax.random.key(2), (75, 8)) + 0.1
    targets = jax.random.normal(jax.random.key(3), (3, 75, 8))
    feature = FrozenAdam()
    context = Context(0, feature.prepare(scale, scale, jnp.asarray(5)), targets)
    whole = feature.dense(jnp.einsum("btr,btc->brc", x, d), context.state)
    found = InnerProducts(feature).of_factors("q", context, x, d)
    np.testing.assert_allclose(found, jnp.einsum("brc,qrc->bq", whole, targets), rtol=1e-4, atol=1e-4)
    sketch = Sketch(CountSketch(64), feature).of_factors("q", context, x, d)
    np.testing.assert_allclose(sketch, CountSketch(64).project_dense("q", 0, whole), rtol=1e-4, atol=1e-4)


def test_second_moments_count_the_tokens_that_matter():
    x = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, 5))
    d = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, 3)).at[:, 4:].set(0.0)
    found = SecondMoments().of_factors("q", Context(0), x, d)
    np.testing.assert_allclose(found["x"], jnp.einsum("bti,btj->ij", x[:, :4], x[:, :4]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["d"], jnp.einsum("bti,btj->ij", d, d), rtol=1e-5, atol=1e-5)
    assert found["tokens"] == BATCH * 4


def test_half_precision_factors_add_up_in_single():
    rule = Sketch(CountSketch(64))
    x, d = X.astype(jnp.bfloat16), (X + 1).astype(jnp.bfloat16)
    exact = jnp.einsum("btr,btc->brc", x.astype(jnp.float32), d.astype(jnp.float32))
    found = rule.of_factors("q", Context(1), x, d)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, CountSketch(64).project_dense("q", 1, exact), rtol=1e-4, atol=1e-3)
