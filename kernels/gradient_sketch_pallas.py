"""The Pallas kernel of `gradient_sketch`, for TPUs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.count_sketch import SHIFTS
from duet_jax.kernels.gradient_sketch import LANES, ROWS_AT_A_TIME, VMEM_BYTES, Plan
from duet_jax.kernels.signs import words
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def sign_planes(plan: Plan, k: int, seed: Any, stream: Any) -> Array:
    """Signs uint32 `[tiles, n, k / 128, 128]`: bit t of plane m belongs to row `32 m + t` of a tile's sketch rows.

    The bits of the random words, in the order in which a kernel needs only a shift and a mask to have them.
    """
    groups = -(-plan.sketch_rows // 32)
    row = jnp.arange(plan.tiles, dtype=jnp.uint32)[:, None] * jnp.uint32(plan.sketch_rows)
    row = row + jnp.arange(groups * 32, dtype=jnp.uint32)
    index = row[..., None] * jnp.uint32(k // 32) + jnp.arange(k // 32, dtype=jnp.uint32)
    # Hashed once: fused into the sum below, the hash would run for every bit.
    hashed = jax.lax.optimization_barrier(words(seed, stream, index))
    bits = hashed.reshape(plan.tiles, groups, 32, k // LANES, LANES // 32, 1) >> jnp.arange(32, dtype=jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32)[:, None, None, None]
    return jnp.sum((bits & 1) << places, axis=2, dtype=jnp.uint32).reshape(plan.tiles, groups, k // LANES, LANES)


def fused(plan: Plan, x: Array, d: Array, seed: Any, stream: Any, k: int) -> Array:
    """`gradient_sketch` by the kernel."""
    batch, tokens, rows = x.shape
    cols, height = d.shape[2], k // LANES
    sketch_row = jnp.arange(plan.tiles * plan.sketch_rows, dtype=jnp.uint32)
    shifts = (words(seed, stream + jnp.uint32(SHIFTS), sketch_row) % k).astype(jnp.int32)
    planes = sign_planes(plan, k, seed, stream)
    scratch = [
        pltpu.VMEM((plan.rows, tokens), x.dtype),
        pltpu.VMEM((plan.sketch_rows * height, LANES), jnp.float32),
        *[pltpu.VMEM((2 * height, LANES), jnp.float32)] * ROWS_AT_A_TIME,
    ]
    if cols % LANES:
        scratch.append(pltpu.VMEM((-(-cols // LANES), plan.rows, LANES), jnp.float32))
    buffers = None if plan.prefetch else pl.Buffered(1)
    out = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.tiles),
            in_specs=[
                pl.BlockSpec((1, tokens, plan.rows), lambda b, i, _: (b, 0, i)),
                pl.BlockSpec((1, tokens, cols), lambda b, i, _: (b, 0, 0), pipeline_mode=buffers),
                pl.BlockSpec((1, *planes.shape[1:]), lambda b, i, _: (i, 0, 0, 0)),
            ],
            out_specs=pl.BlockSpec((1, height, LANES), lambda b, i, _: (b, 0, 0)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, height, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + (8 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * tokens * rows * cols,
            bytes_accessed=x.nbytes + d.nbytes + batch * (planes.nbytes + 4 * k),
            transcendentals=0,
        ),
        name="gradient_sketch",
    )(shifts, x, d, planes)
    return out.reshape(batch, k)


def _kernel(
    plan: Plan,
    shifts: Any,
    x_ref: Any,
    d_ref: Any,
    planes_ref: Any,
    out_ref: Any,
    xt_ref: Any,
    flat_ref: Any,
    *scratch: Any,
) -> None:
    """One tile of one example: its product, as consecutive coordinates, then signs, rotation and sum."""
    tile, height = pl.program_id(1), out_ref.shape[1]
    totals, segments_ref = scratch[:ROWS_AT_A_TIME], scratch[ROWS_AT_A_TIME:]
    cols = d_ref.shape[2]
    used = plan.rows * cols // LANES

    @pl.when(tile == 0)
    def _() -> None:
        for total_ref in totals:
            total_ref[...] = jnp.zeros_like(total_ref)
        if used < flat_ref.shape[0]:
            flat_ref[used:] = jnp.zeros((flat_ref.shape[0] - used, LANES), jnp.float32)

    xt_ref[...] = x_ref[0].T
    if cols % LANES:
        _lay_out_pairs(xt_ref, d_ref, flat_ref, segments_ref[0])
    else:
        _lay_out_rows(xt_ref, d_ref, flat_ref)

    lane = jax.lax.broadcasted_iota(jnp.int32, (height, LANES), 1)

    def add(total_ref: Any, plane: Array, row: Any) -> None:
        value = flat_ref[pl.ds(pl.multiple_of(row * height, height), height), :]
        flips = (plane << jnp.uint32(31 - (row & 31))) & jnp.uint32(0x80000000)
        value = pltpu.bitcast(pltpu.bitcast(value, jnp.uint32) ^ flips, jnp.float32)
        shift = shifts[tile * plan.sketch_rows + row]
        # A rotation of k coordinates: along lanes, with what leaves a line entering the next, then of lines.
        down, along = shift >> 7, shift & (LANES - 1)
        turned = pltpu.roll(value, along, 1)
        turned = jnp.where(lane < along, pltpu.roll(turned, 1, 0), turned)
        # Two turns of the circle, folded once at the end.
        total_ref[pl.ds(down, height), :] += turned

    def add_several(i: Any, _: None) -> None:
        first = i * ROWS_AT_A_TIME
        plane = planes_ref[0, first >> 5]
        for n, total_ref in enumerate(totals):
            add(total_ref, plane, first + n)

    whole = plan.sketch_rows // ROWS_AT_A_TIME
    jax.lax.fori_loop(0, whole, add_several, None)
    for row in range(whole * ROWS_AT_A_TIME, plan.sketch_rows):
        add(totals[0], planes_ref[0, row >> 5], row)

    @pl.when(tile == plan.tiles - 1)
    def _() -> None:
        total = functools.reduce(jnp.add, [total_ref[...] for total_ref in totals])
        out_ref[0] = total[:height] + total[height:]


def _product(xt_ref: Any, d_ref: Any, first: Any, width: int) -> Array:
    """Columns of the tile of the gradient, from `first` on."""
    return jnp.dot(xt_ref[...], d_ref[0, :, pl.ds(first, width)], preferred_element_type=jnp.float32)


def _lay_out_rows(xt_ref: Any, d_ref: Any, flat_ref: Any) -> None:
    """Each row of the gradient is a whole number of lines of 128: a column of lines goes to every so many-th line."""
    rows, lines = xt_ref.shape[0], d_ref.shape[2] // LANES
    at_a_time = next(n for n in (4, 3, 2, 1) if lines % n == 0)

    def step(i: Array, _: None) -> None:
        first = i * at_a_time
        product = _product(xt_ref, d_ref, pl.multiple_of(first * LANES, LANES), at_a_time * LANES)
        for n in range(at_a_time):
            flat_ref[pl.ds(first + n, rows, lines), :] = product[:, n * LANES : (n + 1) * LANES]

    jax.lax.fori_loop(0, lines // at_a_time, step, None)


def _lay_out_pairs(xt_ref: Any, d_ref: Any, flat_ref: Any, segments_ref: Any) -> None:
    """Two rows of the gradient are a whole number of lines: the second one begins in the middle of a line."""
    rows, cols = xt_ref.shape[0], d_ref.shape[2]
    whole, half, pairs, lines = cols // LANES, LANES // 2, rows // 2, 2 * cols // LANES
    for n in range(whole):
        segments_ref[n] = _product(xt_ref, d_ref, n * LANES, LANES)
    segments_ref[whole, :, :half] = _product(xt_ref, d_ref, whole * LANES, half)
    lane = jax.lax.broadcasted_iota(jnp.int32, (pairs, LANES), 1)
    for n in range(whole):
        flat_ref[pl.ds(n, pairs, lines), :] = segments_ref[n, pl.ds(0, pairs, 2), :]
    before = segments_ref[whole, pl.ds(0, pairs, 2), :]
    for n in range(whole + 1):
        turned = pltpu.roll(segments_ref[n, pl.ds(1, pairs, 2), :], half, 1)
        flat_ref[pl.ds(whole + n, pairs, lines), :] = jnp.where(lane < half, before, turned)
        before = turned
