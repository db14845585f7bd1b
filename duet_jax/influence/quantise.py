"""Rows of sketches in few bits, and inner products taken on the codes.

    format    bytes a row  error of a coordinate
    float32   4 k          none
    bfloat16  2 k          2**-9 of it
    int8      k + 4        (largest of the row / 127) / sqrt(12)
    int4      k / 2 + 4    (largest of the row / 7) / sqrt(12)
    1bit      k / 8 + 4    sqrt(1 - 2 / pi) of the root mean square, for Gaussian rows

Codes of less than a byte are packed in planes: byte i holds the coordinates i, i + w, i + 2 w, ... (w bytes a row), the
first in its lowest bits. So a plane is unpacked without moving anything, and meets a contiguous part of the queries.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

RowFormat = Literal["float32", "bfloat16", "int8", "int4", "1bit"]
FORMATS: tuple[str, ...] = get_args(RowFormat)

_DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8, "int4": np.uint8, "1bit": np.uint8}
_PLANES = {"float32": 1, "bfloat16": 1, "int8": 1, "int4": 2, "1bit": 8}
_LARGEST = {"int8": 127, "int4": 7}
# Below it, the inverse of a scale would overflow; a gradient this small is none.
_LEAST = 1e-30
# The sum of as many products of int8 codes is below 2**31.
_INTEGER_TERMS = 2**17
_BLOCK = 1024


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("format",))
@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded rows; row i is `scales[i]` times its codes.

    Attributes:
      codes: `[n, w]`, see `layout`.
      scales: float32 `[n]`; ones where the format needs none, 0 for a row of zeros.
      format: one of `FORMATS`.
    """

    codes: Any
    scales: Any
    format: str

    @property
    def k(self) -> int:
        """Coordinates of a row."""
        return self.codes.shape[-1] * _PLANES[self.format]


def layout(format: str, k: int) -> tuple[np.dtype, int]:
    """Dtype and number w of the codes of a row of `k` coordinates.

    Raises:
      ValueError: an unknown format, or a `k` that fills no whole bytes.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no row format '{format}'; the formats are {', '.join(FORMATS)}")
    if k < 1 or k % _PLANES[format]:
        raise ValueError(f"rows of {k} coordinates fill no whole bytes in {format}; take a multiple of 32")
    return np.dtype(_DTYPES[format]), k // _PLANES[format]


def has_scales(format: str) -> bool:
    """Whether rows carry a scale each."""
    return format not in ("float32", "bfloat16")


@partial(jax.jit, static_argnames="format")
def encode(rows: Array, format: str) -> Rows:
    """Encodes rows float32 `[n, k]`.

    Symmetrical: minus a row has minus the codes (1bit: where no coordinate is 0). A row's codes and scale depend on
    nothing but the row. Dot products of 1bit rows with float queries are 2 / pi of the true ones and cosines
    sqrt(2 / pi), for Gaussian rows; neither changes an order.

    Raises:
      ValueError: see `layout`.
    """
    dtype, width = layout(format, rows.shape[-1])
    rows = jnp.asarray(rows, jnp.float32)
    if not has_scales(format):
        return Rows(rows.astype(dtype), jnp.ones(len(rows), jnp.float32), format)
    if format == "1bit":
        bits = (rows < 0).astype(jnp.uint8).reshape(-1, 8, width)
        codes = jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8)[:, None], axis=1, dtype=jnp.uint8)
        return Rows(codes, _mean_by_halves(jnp.abs(rows)), format)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    largest = jnp.where(largest > _LEAST, largest, 0)
    inverse = jnp.where(largest > 0, _LARGEST[format] / largest, 0)
    codes = jnp.round(rows * inverse[:, None]).astype(jnp.int8)
    if format == "int4":
        low, high = jnp.split(codes.astype(jnp.uint8) & 15, 2, axis=-1)
        codes = low | (high << 4)
    return Rows(codes, largest / _LARGEST[format], format)


def _mean_by_halves(x: Array) -> Array:
    """Mean over the last axis, added up in one fixed order, so that every device and batch finds the same bits."""
    count = x.shape[-1]
    total = jnp.pad(x, ((0, 0), (0, (1 << (count - 1).bit_length()) - count)))
    while total.shape[-1] > 1:
        total = jnp.add(*jnp.split(total, 2, axis=-1))
    return total[:, 0] * np.float32(1 / count)


def _bits(rows: Rows) -> Array:
    """The codes; of bfloat16 the bits, which XLA on CPU cuts up ten times faster."""
    return jax.lax.bitcast_convert_type(rows.codes, jnp.uint16) if rows.format == "bfloat16" else rows.codes


def _plane(codes: Array, format: str, number: Any, dtype: Any) -> Array:
    """Values `[n, w]` of the coordinates from `number` times w on."""
    if format == "int4":
        return (((codes >> (4 * number).astype(jnp.uint8)) & 15) ^ 8).astype(dtype) - 8
    if format == "1bit":
        return 1 - 2 * ((codes >> number.astype(jnp.uint8)) & 1).astype(dtype)
    if format == "bfloat16":
        return jax.lax.bitcast_convert_type(codes.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
    return codes.astype(dtype)


def _values(rows: Rows, dtype: Any) -> Array:
    numbers = jnp.arange(_PLANES[rows.format])[:, None]
    return _plane(_bits(rows)[:, None], rows.format, numbers, dtype).reshape(len(rows.codes), rows.k)


@jax.jit
def decode(rows: Rows) -> Array:
    """Rows as float32 `[n, k]`."""
    return _values(rows, jnp.float32) * rows.scales[:, None]


@jax.jit
def dot(rows: Rows, queries: Rows | Array) -> Array:
    """Inner products float32 `[n, m]` of encoded rows `[n, k]` with queries `[m, k]`.

    Where both are int8 or int4, in integers: exact sums, the same on every device. Otherwise in float32. Either way a
    block of the codes is unpacked at a time.

    Raises:
      ValueError: the rows' k differ, or are too long for integer sums.
    """
    return _products(rows, queries)[0] * rows.scales[:, None] * _scales(queries)


@jax.jit
def unit_dot(rows: Rows, queries: Rows | Array) -> Array:
    """Inner products of encoded rows, each divided by its norm, with queries, as `dot`; 0 for a row of zeros."""
    products, squares = _products(rows, queries)
    # Scales cancel, but for that of a 1bit row of zeros.
    return products * _inverse_root(jnp.where(rows.scales > 0, squares, 0))[:, None] * _scales(queries)


@jax.jit
def cosine(rows: Rows, queries: Rows | Array) -> Array:
    """Cosines float32 `[n, m]` of encoded rows with queries, as `dot`; 0 where either is zero."""
    plain = decode(queries) if isinstance(queries, Rows) else queries
    return unit_dot(rows, queries) * _inverse_root(jnp.sum(jnp.square(plain), axis=-1))


def _scales(queries: Rows | Array) -> Array | float:
    return queries.scales if isinstance(queries, Rows) else 1.0


def _inverse_root(squares: Array) -> Array:
    return jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def _products(rows: Rows, queries: Rows | Array) -> tuple[Array, Array]:
    """Inner products float32 `[n, m]` of codes, and squared norms float32 `[n]` of the rows' codes."""
    bits = _bits(rows)
    n, width = bits.shape
    planes, dtype = _PLANES[rows.format], jnp.float32
    if isinstance(queries, Rows):
        if rows.format in _LARGEST and queries.format in _LARGEST:
            dtype = jnp.int8
            if rows.k > _INTEGER_TERMS:
                raise ValueError(f"integer products of k = {rows.k} overflow; k may be {_INTEGER_TERMS} at most")
        queries = _values(queries, dtype)
    if queries.shape[-1] != rows.k:
        raise ValueError(f"rows of k = {rows.k} meet queries of k = {queries.shape[-1]}; sketch both with the same k")
    # Blocks that stay in a processor's cache: unpacked whole, the codes would go through memory several times.
    size = max(size for size in range(1, min(width, _BLOCK) + 1) if width % size == 0)
    blocks = width // size
    parts = jnp.asarray(queries, dtype).reshape(-1, planes, blocks, size).transpose(1, 2, 0, 3)

    def add(totals: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        number, query = part
        codes = jax.lax.dynamic_slice_in_dim(bits, number % blocks * size, size, axis=1)
        plane = _plane(codes, rows.format, number // blocks, dtype)
        product = jax.lax.dot_general(
            plane,
            query,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=totals[0].dtype,
        )
        return (totals[0] + product, totals[1] + jnp.sum(jnp.square(plane.astype(jnp.float32)), axis=1)), None

    total = jnp.zeros((n, parts.shape[2]), jnp.int32 if dtype == jnp.int8 else jnp.float32)
    xs = jnp.arange(planes * blocks), parts.reshape(planes * blocks, -1, size)
    products, squares = jax.lax.scan(add, (total, jnp.zeros(n, jnp.float32)), xs)[0]
    return products.astype(jnp.float32), squares
