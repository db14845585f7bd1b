"""Products with Hessians, three ways to invert them, and influences against leaving examples out for real."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.influence import inverse
from duet_jax.influence.accuracy import spearman

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


MLP = {"a": drawn(3, 4), "b": [drawn(4, 2), drawn(2)]}
POINTS = (drawn(7, 3), jnp.asarray(RNG.integers(0, 2, 7)))


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"][0] + params["b"][1]


def cross_entropy(outputs, batch):
    return -jnp.mean(jax.nn.log_softmax(outputs)[jnp.arange(len(batch[1])), batch[1]])


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def test_products_equal_whole_matrices():
    v = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), MLP)
    loss = lambda params, batch: cross_entropy(logits(params, batch), batch)  # noqa: E731
    whole = np.asarray(inverse.hessian(loss, MLP, POINTS))
    np.testing.assert_allclose(flat(inverse.hessian_product(loss, MLP, POINTS)(v)), whole @ flat(v), atol=1e-5)
    start, unravel = jax.flatten_util.ravel_pytree(MLP)
    jacobian = np.asarray(jax.jacobian(lambda p: logits(unravel(p), POINTS).reshape(-1))(start), np.float64)
    outer = jax.hessian(lambda o: cross_entropy(o.reshape(7, 2), POINTS))(logits(MLP, POINTS).reshape(-1))
    expected = jacobian.T @ np.asarray(outer) @ jacobian
    found = flat(inverse.gauss_newton_product(logits, cross_entropy, MLP, POINTS)(v))
    np.testing.assert_allclose(found, expected @ flat(v), atol=1e-5)
    assert np.linalg.eigvalsh(expected).min() > -1e-6 > np.linalg.eigvalsh(whole).min()
    largest = inverse.largest_eigenvalue(inverse.hessian_product(loss, MLP, POINTS), MLP, key=jax.random.key(0))
    assert abs(largest / np.abs(np.linalg.eigvalsh(whole)).max() - 1) < 0.02


FEATURES, LABELS = drawn(60, 5), jnp.asarray(RNG.integers(0, 2, 60), jnp.float32)
DECAY = 0.01


def one(params, example):
    x, y = example
    return jax.nn.softplus(x @ params["w"]) - y * (x @ params["w"])


def logistic(params, batch):
    return jnp.mean(jax.vmap(one, (None, 0))(params, batch)) + DECAY / 2 * jnp.sum(params["w"] ** 2)


def newton(x, y, count):
    """Weights of a logistic regression whose losses are sums over `count`, in double precision."""
    x, y, w = np.asarray(x, np.float64), np.asarray(y, np.float64), np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-x @ w))
        curvature = (x.T * (p * (1 - p))) @ x / count + DECAY * np.eye(len(w))
        w -= np.linalg.solve(curvature, x.T @ (p - y) / count + DECAY * w)
    return w


FITTED = {"w": jnp.asarray(newton(FEATURES, LABELS, 60), jnp.float32)}
WHOLE = inverse.hessian_product(logistic, FITTED, (FEATURES, LABELS))


def on_batch(v, batch):
    return inverse.hessian_product(logistic, FITTED, batch)(v)


def rows(key):
    chosen = jax.random.randint(key, (20,), 0, 60)
    return FEATURES[chosen], LABELS[chosen]


def test_three_ways_to_invert_agree():
    target = {"w": drawn(5)}
    matrix = inverse.hessian(logistic, FITTED, (FEATURES, LABELS))
    expected = np.asarray(inverse.explicit_solve(matrix, target, damping=0.05)["w"])
    by_hand = np.linalg.solve(np.asarray(matrix) + 0.05 * np.eye(5), np.asarray(target["w"]))
    np.testing.assert_allclose(expected, by_hand, rtol=1e-4)
    solve = jax.jit(lambda t: inverse.conjugate_gradients(WHOLE, t, damping=0.05))
    found = solve(target)
    np.testing.assert_allclose(found.solution["w"], expected, rtol=1e-4)
    assert found.residual < 1e-5
    assert inverse.conjugate_gradients(WHOLE, target, steps=1).residual > 1e-3
    estimate = inverse.lissa(
        on_batch, target, rows, key=jax.random.key(1), scale=1.0, depth=150, repeats=8, damping=0.05
    )
    distance = np.linalg.norm(estimate.solution["w"] - expected) / np.linalg.norm(expected)
    assert distance < 4 * estimate.error < 0.3


def test_lissa_says_that_it_diverged():
    settings = {"key": jax.random.key(0), "depth": 60}
    with pytest.raises(ValueError, match="diverged: the second half .* Raise scale=0.05"):
        inverse.lissa(on_batch, FITTED, rows, scale=0.05, **settings)
    with pytest.raises(ValueError, match="diverged"):
        inverse.lissa(on_batch, FITTED, rows, scale=1.0, damping=-0.5, **settings)
    with pytest.raises(ValueError, match="must be positive"):
        inverse.lissa(on_batch, FITTED, rows, scale=0.0, **settings)


def test_leave_one_out_of_ridge_regression_is_exact():
    """With the leverage h of the example, which is an influence too: prediction changes by influence / n / (1 - h)."""
    x, y, n, decay = FEATURES[:20], drawn(20), 20, 0.1

    def squared(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2 + decay / 2 * jnp.sum(w**2)

    def single(w, example):
        return (example[0] @ w - example[1]) ** 2 / 2

    w = jnp.linalg.solve(x.T @ x / n + decay * jnp.eye(5), x.T @ y / n)
    multiply = inverse.hessian_product(squared, w, (x, y))
    solved = jax.lax.map(lambda t: inverse.conjugate_gradients(multiply, t, tolerance=1e-7).solution, x)
    leverage = -inverse.influences(lambda w, row: row @ w, w, x, solved) / n
    changes = -inverse.influences(single, w, (x, y), solved, chunk=7) / n / (1 - jnp.diag(leverage))[:, None]
    for i in range(n):
        keep = np.arange(n) != i
        a, b = np.asarray(x, np.float64)[keep], np.asarray(y, np.float64)[keep]
        without = np.linalg.solve(a.T @ a / n + decay * np.eye(5), a.T @ b / n)
        np.testing.assert_allclose(changes[i], x @ (without - np.asarray(w)), atol=2e-5)


def test_influences_rank_examples_as_leaving_them_out_does():
    tests = (drawn(4, 5), jnp.asarray([0.0, 1.0, 0.0, 1.0]))
    gradients = jax.vmap(jax.grad(one), (None, 0))(FITTED, tests)
    solved = jax.lax.map(lambda t: inverse.conjugate_gradients(WHOLE, t).solution, gradients)
    found = np.asarray(inverse.influences(one, FITTED, (FEATURES, LABELS), solved))
    before = np.asarray(jax.vmap(one, (None, 0))(FITTED, tests))
    changes = np.zeros((60, 4))
    for i in range(60):
        keep = np.arange(60) != i
        left = {"w": jnp.asarray(newton(FEATURES[keep], LABELS[keep], 60), jnp.float32)}
        changes[i] = np.asarray(jax.vmap(one, (None, 0))(left, tests)) - before
    correlations = [spearman(-found[:, j], changes[:, j]) for j in range(4)]
    assert min(correlations) > 0.97
    assert 0.7 < np.linalg.norm(found / 60) / np.linalg.norm(changes) < 1.1
    # By the gradients of examples themselves.
    singles = jax.vmap(jax.grad(one), (None, 0))(FITTED, (FEATURES, LABELS))["w"]
    np.testing.assert_allclose(found, -singles @ solved["w"].T, atol=1e-4)
