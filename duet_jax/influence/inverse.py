"""Products with inverse Hessians, and the classic influence functions made of them, for any differentiable loss.

Koh and Liang 2017 (arXiv 1703.04730, equation 2): the influence of a training example z on the loss of a test example
is `-grad L(z_test)^T H^-1 grad L(z)`, with H the Hessian of the mean training loss. Below 0, more weight on z lowers
the test loss. `target` is always a tree like the parameters, for influences the gradient of the test loss; `product`
takes such a tree to another. Losses must have forward-mode derivatives, which functions of `jax.custom_vjp` lack; for
our decoder see `kfac`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

Product = Callable[[Any], Any]


class Solved(NamedTuple):
    """A solution x of `(H + damping) x = target`, and `|target - (H + damping) x| / |target|`."""

    solution: Any
    residual: Array


class Estimate(NamedTuple):
    """The mean of independent estimates, and its standard error relative to its norm; NaN for one estimate."""

    solution: Any
    error: Array


def hessian_product(loss: Callable[[Any, Any], Array], params: Any, batch: Any) -> Product:
    """`v -> H v` with H the Hessian of `loss(params, batch)`: one gradient's time and memory, about twice."""
    gradient = jax.grad(loss)
    return lambda v: jax.jvp(lambda p: gradient(p, batch), (params,), (v,))[1]


def gauss_newton_product(
    model: Callable[[Any, Any], Array], loss: Callable[[Array, Any], Array], params: Any, batch: Any
) -> Product:
    """`v -> J^T H_out J v` of the loss `loss(model(params, batch), batch)`: never indefinite for a convex `loss`.

    Args:
      model: `(params, batch) -> outputs`, of which J is the Jacobian.
      loss: `(outputs, batch) -> scalar`, with the Hessian H_out. For the cross-entropy of logits the product is that
        with the true Fisher matrix.
      params: where.
      batch: what both take.
    """
    outputs, push = jax.linearize(lambda p: model(p, batch), params)
    pull = jax.linear_transpose(push, params)
    of_outputs = hessian_product(loss, outputs, batch)
    return lambda v: pull(of_outputs(push(v)))[0]


def damped(product: Product, damping: Any) -> Product:
    """`v -> (H + damping) v`."""
    return lambda v: jax.tree.map(lambda h, x: h + damping * x, product(v), v)


def conjugate_gradients(
    product: Product, target: Any, *, damping: float = 0.0, tolerance: float = 1e-5, steps: int = 100
) -> Solved:
    """Solves `(H + damping) x = target` by conjugate gradients.

    `H + damping` must be positive definite: where H is not (networks away from a minimum), take the Gauss-Newton
    product or more damping. The residual says how far it came.

    Args:
      product: with H, symmetric.
      target: tree.
      damping: what is added to the diagonal.
      tolerance: relative residual to stop at.
      steps: products at most, besides one for the residual.
    """
    operator = damped(product, damping)
    solution, _ = jax.scipy.sparse.linalg.cg(operator, target, tol=tolerance, maxiter=steps)
    rest = jax.tree.map(jnp.subtract, target, operator(solution))
    return Solved(solution, optax.tree.norm(rest) / optax.tree.norm(target))


def largest_eigenvalue(product: Product, like: Any, *, key: Array, steps: int = 20) -> Array:
    """The largest absolute eigenvalue of H, from below, by power iteration; `like` is a tree of the right shapes."""

    def step(_: Any, vector: Any) -> Any:
        vector = product(vector)
        return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(vector), jnp.finfo(jnp.float32).tiny), vector)

    start = step(None, optax.tree.random_like(key, like, jax.random.normal))
    return optax.tree.norm(product(jax.lax.fori_loop(0, steps, step, start)))


def lissa(
    product: Callable[[Any, Any], Any],
    target: Any,
    draw: Callable[[Array], Any],
    *,
    key: Array,
    scale: float,
    depth: int,
    repeats: int = 1,
    damping: float = 0.0,
) -> Estimate:
    """Solves `(H + damping) x = target` with products of small batches (LiSSA, Agarwal et al. 2017, section 4.1).

    The Neumann series `h_j = target + h_{j-1} - (H_j + damping) h_{j-1} / scale`, `x = h_depth / scale`, with H_j the
    Hessian of a fresh batch. It converges where all eigenvalues of `H + damping` lie between 0 and twice `scale`, by
    about `exp(-depth * smallest / scale)`. Not to be called under `jax.jit`, for it looks at what it found.

    Args:
      product: `(v, batch) -> H_batch v`.
      target: tree.
      draw: gives a batch for a key, such as random rows.
      key: of all batches.
      scale: somewhat above the largest eigenvalue that a batch's `H + damping` has, see `largest_eigenvalue`.
      depth: terms of the series.
      repeats: independent series; their mean is the estimate.
      damping: what is added to the diagonal.

    Raises:
      ValueError: the series diverged; or `scale` is not positive, or `depth` or `repeats` below 1.
    """
    if not scale > 0 or depth < 1 or repeats < 1:
        raise ValueError(f"LiSSA has scale={scale}, depth={depth}, repeats={repeats}; all must be positive.")

    def step(h: Any, key: Array) -> tuple[Any, None]:
        hh = damped(lambda v: product(v, draw(key)), damping)(h)
        return jax.tree.map(lambda t, h, hh: t + h - hh / scale, target, h, hh), None

    def series(key: Array) -> tuple[Any, Array]:
        keys = jax.random.split(key, depth)
        half = jax.lax.scan(step, target, keys[: depth // 2])[0]
        whole = jax.lax.scan(step, half, keys[depth // 2 :])[0]
        return optax.tree.scale(1 / scale, whole), optax.tree.norm(whole) / optax.tree.norm(half)

    solutions, growth = jax.lax.map(series, jax.random.split(key, repeats))
    # The second half of a convergent series of falling terms at most doubles it; twice that is left for noise.
    if not np.all(np.asarray(growth) < 4):
        raise ValueError(
            f"LiSSA diverged: the second half of the series made it {float(np.max(growth)):.3g} times as long. Raise "
            f"scale={scale} above the largest eigenvalue of a batch's Hessian, or damping={damping} above minus the "
            "smallest."
        )
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), solutions)
    squares = optax.tree.norm(jax.tree.map(jnp.subtract, solutions, mean), squared=True)
    error = jnp.sqrt(squares / (repeats - 1) / repeats) if repeats > 1 else jnp.nan
    return Estimate(mean, error / optax.tree.norm(mean))


def hessian(loss: Callable[[Any, Any], Array], params: Any, batch: Any) -> Array:
    """The whole Hessian `[P, P]`, parameters in the order of `jax.flatten_util.ravel_pytree`: for small models."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda p: loss(unravel(p), batch))(flat)


def explicit_solve(matrix: Array, target: Any, *, damping: float = 0.0) -> Any:
    """Solves `(matrix + damping) x = target` in float64 on the host, `matrix` `[P, P]` as `hessian` gives it."""
    flat, unravel = ravel_pytree(target)
    whole = np.asarray(matrix, np.float64) + damping * np.eye(len(flat))
    return unravel(jnp.asarray(np.linalg.solve(whole, np.asarray(flat, np.float64)), flat.dtype))


def influences(loss: Callable[[Any, Any], Array], params: Any, examples: Any, solved: Any, *, chunk: int = 64) -> Array:
    """Influences of training examples on targets: `-<grad L(z), H^-1 target>`.

    Derivatives along the solved vectors, in forward mode: no gradient of an example is made.

    Args:
      loss: `(params, example) -> scalar`.
      params: where.
      examples: tree of arrays with a leading axis of N examples.
      solved: `H^-1 target` of Q targets: a tree like `params` with a leading axis Q.
      chunk: examples at a time.

    Returns:
      `[N, Q]`.
    """

    def one(example: Any) -> Array:
        _, push = jax.linearize(lambda p: loss(p, example), params)
        return -jax.vmap(push)(solved)

    return jax.lax.map(one, examples, batch_size=chunk)
