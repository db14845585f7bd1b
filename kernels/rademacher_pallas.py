"""The Pallas kernel of `rademacher.signed_sums`, for TPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from duet_jax.kernels.signs import words
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
EXAMPLES = 256  # that share the signs of a tile
COORDINATES = 512  # of a tile
BITS_AT_A_TIME = 4


def fused(vectors: Array, seed: Any, stream: Any, k: int, first: Array) -> Array:
    """`signed_sums` by the kernel."""
    batch, count = vectors.shape
    groups = -(-k // (32 * LANES))
    # Words that no sum needs fill the last group.
    streams = words(seed, stream, jnp.arange(groups * LANES, dtype=jnp.uint32)).reshape(groups, 1, LANES)
    examples, coordinates = min(batch, EXAMPLES), min(count, COORDINATES)
    sums = pl.pallas_call(
        partial(_kernel, count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(batch, examples), groups, pl.cdiv(count, coordinates)),
            in_specs=[
                pl.BlockSpec((1, 1, LANES), lambda b, w, c, _: (w, 0, 0)),
                pl.BlockSpec((examples, coordinates), lambda b, w, c, _: (b, c)),
            ],
            out_specs=pl.BlockSpec((1, 32, examples, LANES), lambda b, w, c, _: (w, 0, b, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((groups, 32, batch, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * count * k,
            bytes_accessed=4 * batch * (count * groups + k),
            transcendentals=0,
        ),
        name="signed_sums",
    )(jnp.stack([jnp.asarray(seed, jnp.uint32), first]), streams, vectors)
    return sums.transpose(2, 0, 3, 1).reshape(batch, groups * LANES * 32)[:, :k]


def _kernel(count: int, seed_and_first: Any, streams_ref: Any, vectors_ref: Any, sums_ref: Any) -> None:
    """Adds a tile of coordinates to 32 x 128 sums: one hash makes a sign for each of 32 matrices `[C, 128]`."""
    step, coordinates = pl.program_id(2), vectors_ref.shape[1]

    @pl.when(step == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    values = vectors_ref[...]
    start = step * coordinates
    if count % coordinates:
        lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        values = jnp.where(lane < count - start, values, 0.0)
    line = jax.lax.broadcasted_iota(jnp.int32, (coordinates, LANES), 0) + start
    hashed = words(seed_and_first[0], streams_ref[0], line.astype(jnp.uint32) + seed_and_first[1])

    def multiply(i: Array, _: None) -> None:
        for n in range(BITS_AT_A_TIME):
            bit = i * BITS_AT_A_TIME + n
            signs = ((hashed << (31 - bit).astype(jnp.uint32)) & jnp.uint32(0x80000000)) | jnp.uint32(0x3F800000)
            sums_ref[0, bit] += jnp.dot(values, pltpu.bitcast(signs, jnp.float32), preferred_element_type=jnp.float32)

    jax.lax.fori_loop(0, 32 // BITS_AT_A_TIME, multiply, None)
