"""The one matrix product that every linear layer of our models goes through.

Inputs are rounded to the compute dtype and products are accumulated in float32, forwards and backwards. On
CPUs with bfloat16 dot products this is also the only form that XLA turns into them: a dot whose *result* is
bfloat16 runs at the float32 rate there, half as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.models.packed import unpack


class Taps(NamedTuple):
    """Something that watches every matrix product of a decoder's layers.

    Attributes:
      observe: `(name, layer, x, y) -> y`, called with the factors' name (`"q"`, or `"q.a"` and `"q.b"` of an
        adapter), this layer's slice of `layers`, the product's input `[B, T, in]` and its output `[B, T, out]`.
        It returns the output, changed in nothing but its derivative.
      layers: tree of arrays with a leading axis of layers, scanned over with them; None for none.
    """

    observe: Callable[[str, Any, Array, Array], Array]
    layers: Any = None


def untapped(name: str, x: Array, y: Array) -> Array:
    """What stands in the place of a tap when nobody watches."""
    del name, x
    return y


def _dot(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, kernel: Array, compute_dtype: jnp.dtype) -> Array:
    """`x @ kernel` in `compute_dtype` with float32 accumulation.

    Args:
      x: `[..., in]`, any float dtype.
      kernel: `[in, out]`, any float dtype, or packed.
      compute_dtype: dtype that both factors are rounded to, and that of the result.

    Returns:
      `[..., out]` in `compute_dtype`. Gradients have the dtypes of their arguments; their products also take
      `compute_dtype` factors and accumulate in float32.
    """
    return _product(x, kernel, compute_dtype)


def _product(x: Array, kernel: Array, compute_dtype: jnp.dtype) -> Array:
    contract = ((x.ndim - 1,), (0,))
    return _dot(x.astype(compute_dtype), unpack(kernel).astype(compute_dtype), contract).astype(compute_dtype)


def _forward(x: Array, kernel: Array, compute_dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    # The factors are kept as they came: under a scan over layers the kernel is then a slice of an input that
    # exists anyway, and an x shared by several products is kept once. Not `matmul` itself: a gradient would then have
    # no forward derivative, which products with the Hessian take.
    return _product(x, kernel, compute_dtype), (x, kernel)


def _backward(compute_dtype: jnp.dtype, factors: tuple[Array, Array], output_gradient: Array) -> tuple[Array, Any]:
    x, kernel = factors
    gradient = output_gradient.astype(compute_dtype)
    last = gradient.ndim - 1
    x_gradient = _dot(gradient, unpack(kernel).astype(compute_dtype), ((last,), (1,)))
    if kernel.dtype == jnp.uint16:
        # Packed kernels are frozen: words have no gradient.
        return x_gradient.astype(x.dtype), np.zeros(kernel.shape, jax.dtypes.float0)
    leading = tuple(range(last))
    kernel_gradient = _dot(x.astype(compute_dtype), gradient, (leading, leading))
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


matmul.defvjp(_forward, _backward)
