"""Random projections of per-example gradients whose inner products are those of the gradients, on average.

All of them are made of the fixed random words of `kernels.signs`, so that equal seeds mean equal projections on
every machine. A parameter is a matrix `[rows, cols]` flattened row by row; its gradient for one example is
`x^T d`, with x `[T, rows]` and d `[T, cols]`. Every parameter adds its part to one vector of width k, except
under `Kronecker`, whose parts are kept side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.kernels import rademacher, signs
from duet_jax.kernels.count_sketch import count_sketch
from duet_jax.kernels.dispatch import Implementation
from duet_jax.kernels.gradient_sketch import gradient_sketch

GRADIENT_VALUES = 1 << 22  # float32 values of the gradients of a batch that exist at a time, where one is made


class Blocks(NamedTuple):
    """A gradient `[rows, cols]` in `number` blocks of `size` rows, the last of them filled up with zeros."""

    rows: int
    cols: int
    size: int
    number: int

    def pad(self, array: Array, axis: int) -> Array:
        """Fills `axis`, of length `rows`, up to whole blocks with zeros."""
        missing = self.size * self.number - self.rows
        return jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])

    def take(self, padded: Array, first: Any, axis: int) -> Array:
        """The block from row `first` on."""
        return jax.lax.dynamic_slice_in_dim(padded, first, self.size, axis)

    def add_up(self, part: Callable[[Any], Any]) -> Any:
        """Sum of `part(first_row)`, a tree of arrays, over the blocks."""
        if self.number == 1:
            return part(0)
        shapes = jax.eval_shape(part, jax.ShapeDtypeStruct((), jnp.int32))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.fori_loop(
            0, self.number, lambda i, total: jax.tree.map(jnp.add, total, part(i * self.size)), zeros
        )


def blocks(rows: int, cols: int, batch: int, multiple: int) -> Blocks:
    """Blocks small enough to bound the memory; where there are several, of a multiple of `multiple` rows."""
    most = max(GRADIENT_VALUES // (batch * cols), 1)
    if rows <= max(most, multiple):
        return Blocks(rows, cols, rows, 1)
    number = -(-rows // max(most // multiple * multiple, multiple))
    even = [n for n in range(number, 2 * number) if rows % (n * multiple) == 0]
    if even:
        return Blocks(rows, cols, rows // even[0], even[0])
    count = -(-rows // number // multiple) * multiple
    return Blocks(rows, cols, count, -(-rows // count))


def product(x: Array, d: Array) -> Array:
    """Gradients float32 `[B, rows, cols]` of `x [B, T, rows]` and `d [B, T, cols]`, of one dtype."""
    over_tokens = (((1,), (1,)), ((0,), (0,)))
    if 8 * d.shape[2] <= x.shape[2]:
        # The narrow factor first: XLA for CPUs is slow at the other way, to which it would turn this back. Of wide
        # factors the turned gradient would be a second copy of something large.
        turned = jax.lax.dot_general(d, x, over_tokens, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(turned).swapaxes(1, 2)
    return jax.lax.dot_general(x, d, over_tokens, preferred_element_type=jnp.float32)


def _by_blocks(projection: Projection, name: str, layer: Any, x: Array, d: Array) -> Array:
    plan = blocks(x.shape[-1], d.shape[-1], x.shape[0], projection.row_multiple(d.shape[-1]))
    x = plan.pad(x, -1)
    return plan.add_up(lambda i: projection.project_dense(name, layer, product(plan.take(x, i, -1), d), i))


class Projection(Protocol):
    """What all projections have. `per_layer`: the parts of layers and parameters are not added, but kept apart."""

    @property
    def name(self) -> str: ...

    @property
    def per_layer(self) -> bool: ...

    def width(self, rows: int, cols: int) -> int:
        """Length of what one parameter contributes."""
        ...

    def row_multiple(self, cols: int) -> int:
        """A block of rows may begin at multiples of this."""
        ...

    def project(self, name: str, layer: Any, x: Array, d: Array) -> Array:
        """Projects per-example gradients that are given by their factors.

        Args:
          name: of the parameter.
          layer: its layer; may be traced.
          x: `[B, T, rows]`.
          d: `[B, T, cols]`, of the dtype of `x`.

        Returns:
          float32 `[B, width]`.
        """
        ...

    def project_dense(self, name: str, layer: Any, gradient: Array, first_row: Any = 0) -> Array:
        """Projects rows of per-example gradients, `[B, some rows, cols]`, from `first_row` on; they add up."""
        ...


@dataclasses.dataclass(frozen=True)
class CountSketch:
    """Row-shift CountSketch, see `kernels.count_sketch`: as accurate as dense signs and by far the cheapest.

    `implementation` chooses between two ways to the same numbers, see `kernels.gradient_sketch`.
    """

    k: int = 8192
    seed: int = 0
    implementation: Implementation | None = dataclasses.field(default=None, repr=False)
    name = "count_sketch"
    per_layer = False

    def __post_init__(self) -> None:
        _check(self)

    def width(self, rows: int, cols: int) -> int:
        del rows, cols
        return self.k

    def row_multiple(self, cols: int) -> int:
        return self.k // math.gcd(self.k, cols)

    def project(self, name: str, layer: Any, x: Array, d: Array) -> Array:
        plain = partial(_by_blocks, self, name, layer)
        stream = signs.stream(name, layer)
        return gradient_sketch(x, d, self.seed, stream, self.k, implementation=self.implementation, plain=plain)

    def project_dense(self, name: str, layer: Any, gradient: Array, first_row: Any = 0) -> Array:
        batch, rows, cols = gradient.shape
        stream = signs.stream(name, layer)
        return count_sketch(gradient.reshape(batch, rows * cols), self.seed, stream, self.k, first_row * cols)


@dataclasses.dataclass(frozen=True)
class Rademacher:
    """Dense random signs over `sqrt(k)`: the reference, and what LESS uses. Costs k operations a coordinate.

    `implementation` chooses between two ways to the same numbers, see `kernels.rademacher`.
    """

    k: int = 8192
    seed: int = 0
    implementation: Implementation | None = dataclasses.field(default=None, repr=False)
    name = "rademacher"
    per_layer = False

    def __post_init__(self) -> None:
        _check(self)

    def width(self, rows: int, cols: int) -> int:
        del rows, cols
        return self.k

    def row_multiple(self, cols: int) -> int:
        del cols
        return 1

    def matrix(self, name: str, layer: Any, count: int, first: Any = 0) -> Array:
        """Signs float32 `[count, k]` of the coordinates from `first` on."""
        return rademacher.matrix(self.seed, signs.stream(name, layer), self.k, count, first)

    def project(self, name: str, layer: Any, x: Array, d: Array) -> Array:
        return _by_blocks(self, name, layer, x, d)

    def project_dense(self, name: str, layer: Any, gradient: Array, first_row: Any = 0) -> Array:
        batch, rows, cols = gradient.shape
        flat, start = gradient.reshape(batch, rows * cols), jnp.asarray(first_row, jnp.uint32) * cols
        stream = signs.stream(name, layer)
        sums = rademacher.signed_sums(flat, self.seed, stream, self.k, start, implementation=self.implementation)
        return sums * self.k**-0.5


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """`(x P_in)^T (d P_out)` of each parameter, kept apart: the two-sided projection of LoGra and bergson.

    Nothing of the size of a gradient is made, but a stored number is worth less than one of a CountSketch, because
    gradients of single examples have low rank. A factor no wider than `side` is left as it is.
    """

    side: int = 16
    seed: int = 0
    name = "kronecker"
    per_layer = True

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"The projection has side={self.side}; it must be at least 1.")

    def width(self, rows: int, cols: int) -> int:
        return min(rows, self.side) * min(cols, self.side)

    def row_multiple(self, cols: int) -> int:
        del cols
        # More rows than `side` in every block: one with fewer is known to be a whole parameter.
        return 32 * (self.side // 32 + 1)

    def matrix(self, end: str, name: str, layer: Any, count: int, first: Any = 0) -> Array | None:
        """Signs over `sqrt(side)`, float32 `[count, side]`, of a factor's coordinates; None where it is narrow."""
        if count <= self.side:
            return None
        start = jnp.asarray(first, jnp.uint32) * self.side
        flat = signs.signs(self.seed, signs.stream(f"{name}|{end}", layer), count * self.side, start)
        return flat.reshape(count, self.side) * self.side**-0.5

    def project(self, name: str, layer: Any, x: Array, d: Array) -> Array:
        before = self.matrix("in", name, layer, x.shape[-1])
        after = self.matrix("out", name, layer, d.shape[-1])
        x, d = x.astype(jnp.float32), d.astype(jnp.float32)
        narrow = product(x if before is None else x @ before, d if after is None else d @ after)
        return narrow.reshape(x.shape[0], -1)

    def project_dense(self, name: str, layer: Any, gradient: Array, first_row: Any = 0) -> Array:
        before = self.matrix("in", name, layer, gradient.shape[1], first_row)
        after = self.matrix("out", name, layer, gradient.shape[2])
        narrow = gradient if after is None else gradient @ after
        narrow = narrow if before is None else jnp.einsum("bro,rs->bso", narrow, before)
        return narrow.reshape(gradient.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class KroneckerSketch:
    """`Kronecker`, then a CountSketch of all parameters' parts into one vector: for the largest models."""

    k: int = 8192
    side: int = 64
    seed: int = 0
    name = "kronecker_sketch"
    per_layer = False

    def __post_init__(self) -> None:
        _check(self)
        Kronecker(self.side)

    def width(self, rows: int, cols: int) -> int:
        del rows, cols
        return self.k

    def row_multiple(self, cols: int) -> int:
        return Kronecker(self.side).row_multiple(cols)

    def project(self, name: str, layer: Any, x: Array, d: Array) -> Array:
        return self._sketch(name, layer, Kronecker(self.side, self.seed).project(name, layer, x, d))

    def project_dense(self, name: str, layer: Any, gradient: Array, first_row: Any = 0) -> Array:
        narrow = Kronecker(self.side, self.seed).project_dense(name, layer, gradient, first_row)
        return self._sketch(name, layer, narrow)

    def _sketch(self, name: str, layer: Any, narrow: Array) -> Array:
        return count_sketch(narrow, self.seed, signs.stream(name, layer), self.k)


def _check(projection: CountSketch | Rademacher | KroneckerSketch) -> None:
    if projection.k < 32 or projection.k % 32:
        raise ValueError(f"The projection has k={projection.k}; it must be a positive multiple of 32.")
