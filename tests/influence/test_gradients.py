"""Tapped backward passes of the decoder equal `vmap(grad)` and then projecting, whatever the batch looks like.

The whole gradients are projected in NumPy, by the definitions: nothing of the library's projections is used for that.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zlib
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.influence import gradients as gradients_module
from duet_jax.influence import projections
from duet_jax.influence.any_loss import of_any_loss
from duet_jax.influence.features import Adam, FrozenAdam, Moments, RankOne, Sign
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.influence.projections import CountSketch, Kronecker, KroneckerSketch, Rademacher
from duet_jax.influence.tap import InnerProducts, SecondMoments, Sketch, SquaredNorm
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.linear import Taps

CONFIG = llama.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, qkv_bias=True, qk_norm=True)
ROWS, LENGTH = 6, 9
LORA = ExampleGradients(CONFIG)
FULL = ExampleGradients(CONFIG, target="full", head=True)


def drawn(tree, seed, change=lambda x: x):
    """Random values of the tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(change(rng.normal(size=x.shape)), jnp.float32), tree)


@lru_cache(maxsize=4)
def problem(config=CONFIG, targets=adapters.TARGETS):
    """A decoder with adapters that do something, and sequences with different numbers of labels."""
    params = drawn(llama.shapes(config), 0, lambda x: 0.25 * x)
    chosen = adapters.LoraConfig(rank=3, alpha=6.0, targets=targets)
    factors = jax.eval_shape(lambda: adapters.init(config, chosen, key=jax.random.key(1)).factors)
    factors = drawn(factors, 1, lambda x: 0.25 * x)
    lora = dataclasses.replace(adapters.without_factors(config, chosen), factors=factors)
    tokens = np.random.default_rng(2).integers(0, 50, (ROWS, LENGTH)).astype(np.int32)
    place, starts, ends = np.arange(LENGTH), np.array([1, 2, 5, 8, 3, 1]), np.array([9, 7, 9, 9, 4, 5])
    weights = ((place >= starts[:, None]) & (place < ends[:, None])) * np.linspace(0.5, 1.5, LENGTH)
    return params, lora, tokens, weights.astype(np.float32)


FEW = ("q", "down")  # adapters of tests whose subject is something else: fewer taps compile faster


def inputs(gradients, targets=adapters.TARGETS):
    params, lora, tokens, weights = problem(gradients.config, targets)
    return params, None if gradients.target == "full" else lora, tokens, weights


def loss_of(gradients, targets=adapters.TARGETS):
    """The loss as a function of what is differentiated and one example, without taps; and the former's value.

    Input embedding and head are two parameters here: the gradient of the head is that of the head alone.
    """
    params, lora, *_ = inputs(gradients, targets)

    def loss(trainable, example):
        tokens, weights = example
        base, adapter, head = params, lora, llama.output_head(params)
        if lora is None:
            base, head = {**params, "layers": trainable["layers"]}, trainable["head"]
        else:
            adapter = dataclasses.replace(lora, factors=trainable)
        hidden = llama.hidden_states(gradients.config, base, tokens[None], lora=adapter)[0]
        log_probs = jax.nn.log_softmax(hidden[:-1] @ head.T)[jnp.arange(LENGTH - 1), tokens[1:]]
        total = -jnp.sum(weights[1:] * log_probs)
        return total / jnp.sum(weights) if gradients.reduction == "mean" else total

    return loss, lora.factors if lora else {**params, "head": llama.output_head(params)}


@lru_cache(maxsize=8)
def whole(gradients, targets=adapters.TARGETS):
    """Losses `[B]`, and gradients `{name: [B, L, rows, cols]}` in double precision."""
    loss, trainable = loss_of(gradients, targets)
    *_, tokens, weights = inputs(gradients, targets)
    one = lambda example: jax.value_and_grad(loss)(trainable, example)  # noqa: E731
    losses, found = jax.jit(jax.vmap(one))((tokens, weights))
    named = {}
    for row in range(ROWS):
        for name, array in gradients.named(jax.tree.map(lambda x, row=row: np.asarray(x[row]), found)).items():
            named.setdefault(name, []).append(np.asarray(array, np.float64))
    return losses, {name: np.stack(arrays) for name, arrays in named.items()}


def mix(x):
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def words(seed, stream, index):
    with np.errstate(over="ignore"):
        stream, index, golden = np.uint32(stream), np.asarray(index, np.uint32), np.uint32(0x9E3779B9)
        first = mix(mix(np.uint32(seed) + golden) ^ stream)
        return mix(mix(index ^ first) + mix(first + golden))


def stream(name, layer, plus=0):
    return (int(mix(np.array([zlib.crc32(name.encode())], np.uint32))[0]) + layer + plus) % 2**32


def signs(seed, stream, count):
    bits = words(seed, stream, np.arange(-(-count // 32)))[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return 1 - 2.0 * bits.reshape(-1)[:count]


def sketched(flat, seed, k, name, layer):
    """CountSketch of `[B, n]`, coordinate by coordinate."""
    c = np.arange(flat.shape[1])
    shifts = words(seed, stream(name, layer, 0x5BD1E995), c // k) % k
    out = np.zeros((len(flat), k))
    for row, values in zip(out, flat * signs(seed, stream(name, layer), len(c)), strict=True):
        np.add.at(row, (c % k + shifts) % k, values)
    return out


def narrowed(gradient, side, seed, name, layer):
    for axis, end in ((1, "in"), (2, "out")):
        size = gradient.shape[axis]
        if size > side:
            matrix = signs(seed, stream(f"{name}|{end}", layer), size * side).reshape(size, side) / np.sqrt(side)
            gradient = np.moveaxis(np.tensordot(gradient, matrix, (axis, 0)), -1, axis)
    return gradient.reshape(len(gradient), -1)


def projected(projection, name, layer, gradient):
    """One projection of one parameter's gradients `[B, rows, cols]`."""
    flat = gradient.reshape(len(gradient), -1)
    if isinstance(projection, CountSketch):
        return sketched(flat, projection.seed, projection.k, name, layer)
    if isinstance(projection, Kronecker):
        return narrowed(gradient, projection.side, projection.seed, name, layer)
    if isinstance(projection, KroneckerSketch):
        narrow = narrowed(gradient, projection.side, projection.seed, name, layer)
        return sketched(narrow, projection.seed, projection.k, name, layer)
    c, own = np.arange(flat.shape[1]), stream(name, layer)
    bits = [
        words(projection.seed, words(projection.seed, own, block), c)[:, None] >> np.arange(32, dtype=np.uint32)
        & np.uint32(1)
        for block in range(projection.k // 32)
    ]
    return flat @ (1 - 2.0 * np.concatenate(bits, axis=1)) / np.sqrt(projection.k)


def expected_sketch(projection, named):
    parts = {
        (name, layer): projected(projection, name, layer, array[:, layer])
        for name, array in sorted(named.items())
        for layer in range(array.shape[1])
    }
    return np.concatenate(list(parts.values()), axis=1) if projection.per_layer else sum(parts.values())


def close(found, expected, tolerance=1e-5):
    """Distance of each example's row, relative to its length."""
    found, expected = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, expected))
    assert found.shape == expected.shape
    lengths = np.linalg.norm(expected, axis=1)
    assert (lengths > 0).all()
    assert (np.linalg.norm(found - expected, axis=1) / lengths).max() < tolerance


KINDS = {
    "lora": LORA,
    "lora sums, nothing made again": dataclasses.replace(LORA, remat="none", reduction="sum"),
    "full tied": FULL,
    "full untied, products kept": dataclasses.replace(FULL, config=UNTIED, remat="products"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_equal_those_of_whole_gradients(kind):
    """All linear layers, adapters whose second factor is not zero, the head; losses as sums and means."""
    gradients = KINDS[kind]
    losses, named = whole(gradients)
    assert len(named) == (14 if gradients.target == "lora" else 8)
    found = gradients.sketch(CountSketch(256, 7))(*inputs(gradients))
    close(found.values, expected_sketch(CountSketch(256, 7), named))
    close(found.losses, losses)


OTHERS = [Rademacher(128, 3), Kronecker(4, 3), KroneckerSketch(128, 6, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("projection", OTHERS, ids=lambda p: p.name)
def test_other_projections(projection):
    for gradients in (LORA, FULL):
        found = gradients.sketch(projection)(*inputs(gradients, FEW))
        close(found.values, expected_sketch(projection, whole(gradients, FEW)[1]))


def moments(gradients, targets):
    _, trainable = loss_of(gradients, targets)
    first = drawn(trainable, 5, lambda x: 1e-2 * x)
    second = drawn(trainable, 6, lambda x: 1e-3 * np.abs(x) + 1e-6)
    return Moments(first, second, np.int32(20))


def rank_one(g, m, v):
    v = v / (1 - 0.999**20)
    return g / np.sqrt(v.mean(2, keepdims=True) * v.mean(1, keepdims=True) / v.mean((1, 2), keepdims=True))


FORMULAS = {
    Sign(): lambda g, m, v: np.sign(g),
    Adam(): lambda g, m, v: (
        (0.9 * m + 0.1 * g) / (1 - 0.9**21) / (np.sqrt((0.999 * v + 0.001 * g**2) / (1 - 0.999**21)) + 1e-8)
    ),
    Adam("less_code"): lambda g, m, v: (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8),
    FrozenAdam(): lambda g, m, v: g / (np.sqrt(v / (1 - 0.999**20)) + 1e-8),
    RankOne(): rank_one,
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FORMULAS, ids=lambda f: f.name)
def test_features_are_their_formulas_on_whole_gradients(feature):
    # A sign of an entry that rounds to zero is nobody's: the head, whose gradient has many, has no signs here.
    for gradients in (LORA,) if isinstance(feature, Sign) else (LORA, FULL):
        state = moments(gradients, FEW)
        first, second = gradients.named(state.first), gradients.named(state.second)
        named = {
            name: np.asarray(FORMULAS[feature](g, *(np.asarray(x[name], np.float64) for x in (first, second))))
            for name, g in whole(gradients, FEW)[1].items()
        }
        found = gradients.sketch(CountSketch(256, 7), feature)(*inputs(gradients, FEW), moments=state)
        close(found.values, expected_sketch(CountSketch(256, 7), named), 2e-5)


def test_gradients_in_blocks(monkeypatch):
    """No gradient is whole in memory, that of the head neither: 100 values for each example at a time."""
    monkeypatch.setattr(projections, "GRADIENT_VALUES", ROWS * 100)
    gradients_module.program_of.cache_clear()
    found = dataclasses.replace(FULL, micro_batch=None).sketch(CountSketch(32, 7))(*inputs(FULL))
    close(found.values, expected_sketch(CountSketch(32, 7), whole(FULL)[1]))


@pytest.mark.parametrize("gradients", [LORA, FULL], ids=["lora", "full"])
def test_norms_and_inner_products_are_exact(gradients):
    named = whole(gradients, FEW)[1]
    norms = gradients.squared_norms()(*inputs(gradients, FEW)).values
    np.testing.assert_allclose(norms, sum(np.sum(g**2, axis=(1, 2, 3)) for g in named.values()), rtol=1e-5)
    targets = drawn({name: np.zeros((2, *g.shape[1:])) for name, g in named.items()}, 8)
    found = gradients.inner_products()(*inputs(gradients, FEW), targets=targets).values
    close(found, sum(np.einsum("blrc,qlrc->bq", g, targets[name]) for name, g in named.items()), 1e-4)


def test_second_moments_of_the_layers():
    """Against inputs and derivatives of one kernel's output, taken by a tap of the test's own."""
    gradients = ExampleGradients(CONFIG, target="full", micro_batch=2)
    params, _, tokens, weights = inputs(gradients)
    found = gradients.second_moments()(params, None, tokens, weights).values
    # Before the last layer, tokens up to the last label matter; in it, those that a label is predicted from.
    before_last_label = sum(np.flatnonzero(row).max() for row in weights)
    expected = [before_last_label, before_last_label, np.count_nonzero(weights)]
    np.testing.assert_array_equal(found["down"]["tokens"], expected)

    def nudged(nudge):
        taps = Taps(lambda name, layer, x, y: y + layer if name == "down" else y, nudge)
        hidden = llama.hidden_states(CONFIG, params, tokens, taps=taps)
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ params["embedding"].T)
        return -jnp.sum(weights[:, 1:] * jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0])

    d = jax.jit(jax.grad(nudged))(jnp.zeros((3, ROWS, LENGTH, 16)))
    close(found["down"]["d"], np.einsum("lbti,lbtj->lij", d, d), 1e-4)
    assert found["down"]["x"].shape == (3, 24, 24)


def sketches(gradients, rows=slice(None), pad=0, **extra):
    params, lora, tokens, weights = inputs(gradients, FEW)
    tokens, weights = (np.pad(x[rows], [(0, 0), (0, pad)]) for x in (tokens, weights))
    return gradients.sketch(CountSketch(256, 7))(params, lora, tokens, weights, **extra).values


@pytest.mark.parametrize("gradients", [LORA, pytest.param(FULL, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_an_example_does_not_depend_on_its_batch(gradients):
    """Batch size, order, padding, micro-batches."""
    expected = expected_sketch(CountSketch(256, 7), whole(gradients, FEW)[1])
    for rows in (np.array([2]), np.array([5, 5, 3, 1, 0])):
        close(sketches(gradients, rows), expected[rows])
    close(sketches(dataclasses.replace(gradients, micro_batch=2), pad=7), expected)


def test_labels_of_their_own_and_none():
    params, lora, tokens, weights = inputs(LORA, FEW)
    weights = weights.copy()
    weights[1] = 0
    compute = LORA.sketch(CountSketch(256, 7))
    found = compute(params, lora, tokens, weights, labels=tokens)
    np.testing.assert_array_equal(found.values[1], 0)
    assert found.losses[1] == 0 and np.isfinite(found.values).all()
    other = compute(params, lora, tokens, weights, labels=(tokens + 1) % 50)
    assert np.abs(other.values - found.values)[[0, 2, 3, 4, 5]].max(axis=1).min() > 1e-3


def test_half_precision_is_near():
    """A forward and backward pass in bfloat16 keeps the direction of each example's gradient."""
    half = sketches(dataclasses.replace(LORA, compute_dtype=jnp.bfloat16))
    exact = expected_sketch(CountSketch(256, 7), whole(LORA, FEW)[1])
    cosines = np.sum(half * exact, 1) / np.linalg.norm(half, axis=1) / np.linalg.norm(exact, axis=1)
    assert half.dtype == jnp.float32 and cosines.min() > 0.999


def test_gradients_of_layers_are_never_kept():
    """Six more layers cost a hundredth of what their kernels' gradients would."""
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=256)
    rows = jax.ShapeDtypeStruct((8, 4), jnp.int32), jax.ShapeDtypeStruct((8, 4), jnp.float32)

    def memory(layers):
        deep = dataclasses.replace(config, num_layers=layers)
        compute = ExampleGradients(deep, target="full", remat="full").sketch(CountSketch(64))
        return compute.lower(llama.shapes(deep), None, *rows).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) - memory(2) < 6 * 8 * (3 * 64 * 256 * 4) / 100


def test_any_loss_gives_the_same():
    loss, trainable = loss_of(LORA, FEW)
    *_, tokens, weights = inputs(LORA, FEW)
    state = moments(LORA, FEW)
    compute = of_any_loss(loss, Sketch(CountSketch(256, 7), FrozenAdam()), chunk=4, named=LORA.named)
    found = compute(trainable, (tokens, weights), moments=state)
    tapped = LORA.sketch(CountSketch(256, 7), FrozenAdam())(*inputs(LORA, FEW), moments=state)
    close(found.values, tapped.values)
    close(found.losses, tapped.losses)


def test_any_loss_on_any_tree():
    """A small regression with a scalar, a vector and a matrix: its leaves are parameters of one layer."""
    params = {"layer": {"w": np.ones((5, 3), np.float32), "b": np.zeros(3, np.float32)}, "scale": np.float32(1)}
    x = drawn(np.zeros((7, 5)), 0)

    def loss(params, example):
        return jnp.sum(jnp.square(params["scale"] * jnp.tanh(example @ params["layer"]["w"]) + params["layer"]["b"]))

    found = of_any_loss(loss, Sketch(CountSketch(32)), chunk=3)(params, x).values
    gradients = jax.vmap(lambda e: jax.grad(loss)(params, e))(x)
    arrays = {"layer.b": gradients["layer"]["b"], "layer.w": gradients["layer"]["w"], "scale": gradients["scale"]}
    named = {name: np.asarray(a, np.float64).reshape(7, 1, -1, 1) for name, a in arrays.items()}
    close(found, expected_sketch(CountSketch(32), named))
    norms = of_any_loss(loss, SquaredNorm(), chunk=3)(params, x).values
    np.testing.assert_allclose(norms, sum(np.sum(a**2, axis=(1, 2, 3)) for a in named.values()), rtol=1e-5)


def test_mistakes_are_named():
    params, lora, tokens, weights = inputs(LORA, FEW)
    with pytest.raises(ValueError, match="no adapters were given"):
        LORA.sketch(CountSketch(32))(params, None, tokens, weights)
    with pytest.raises(ValueError, match="6 examples does not split into micro-batches of 4"):
        dataclasses.replace(LORA, micro_batch=4).sketch(CountSketch(32))(params, lora, tokens, weights)
    with pytest.raises(ValueError, match="'adam_paper' needs the optimiser's moments"):
        LORA.sketch(CountSketch(32), Adam())(params, lora, tokens, weights)
    with pytest.raises(ValueError, match="need targets for exactly the parameters down.a, down.b"):
        LORA.inner_products()(params, lora, tokens, weights)
    with pytest.raises(ValueError, match="set head=False"):
        FULL.second_moments()
    with pytest.raises(ValueError, match="need the factors"):
        of_any_loss(lambda p, e: p, SecondMoments())
    with pytest.raises(ValueError, match="need targets"):
        of_any_loss(lambda p, e: jnp.sum(p), InnerProducts())(jnp.ones(3), tokens)


def test_examples_spread_over_devices(tmp_path):
    """Four devices of the host give the rows, losses and second moments of one."""
    code = f"""
import dataclasses, importlib.util, jax, numpy as np
assert len(jax.devices()) == 4
spec = importlib.util.spec_from_file_location("shared", {__file__!r})
t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
kind = dataclasses.replace(t.FULL, mesh=mesh)
params, lora, tokens, weights = t.inputs(kind)
tokens, weights = (np.concatenate([x, x[:2]]) for x in (tokens, weights))
out = kind.sketch(t.CountSketch(256, 7))(params, lora, tokens, weights)
assert len(out.values.sharding.device_set) == 4
kind = dataclasses.replace(t.LORA, mesh=mesh)
params, lora, tokens, weights = t.inputs(kind, ("down",))
sums = kind.second_moments()(params, lora, tokens[:4], weights[:4]).values["down.b"]["d"]
found = {{"values": out.values, "losses": out.losses, "sums": sums}}
np.savez({str(tmp_path / "found.npz")!r}, **found)
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)
    found = np.load(tmp_path / "found.npz")
    rows = np.array([*range(ROWS), 0, 1])
    losses, named = whole(FULL)
    close(found["values"], expected_sketch(CountSketch(256, 7), named)[rows])
    close(found["losses"], losses[rows])
    params, lora, tokens, weights = inputs(LORA, ("down",))
    sums = LORA.second_moments()(params, lora, tokens[:4], weights[:4]).values["down.b"]["d"]
    close(found["sums"], sums)
