"""bfloat16 arrays that scans over layers read and write as what they are: as words of 16 bits.

XLA for CPUs has no bfloat16 slices: where a loop reads a layer's kernel from a stack of bfloat16 kernels, it first
converts all of the stack to float32, and where it writes what a layer keeps for the backward pass into such a stack, it
converts the whole stack to float32 and back, once a layer. Words are left alone. Other devices need none of this, and
there nothing is packed: a loop over packed kernels would begin with a copy of all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from duet_jax.distributed.target import platform

KEPT = "kept"


def pack(array: Array) -> Array:
    """On CPUs, a bfloat16 array as uint16; others unchanged."""
    words = array.dtype == jnp.bfloat16 and platform() == "cpu"
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if words else array


def unpack(array: Array) -> Array:
    """The inverse of `pack`."""
    return jax.lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def keep(x: Array) -> Array:
    """x, marked as worth keeping for the backward pass by `jax.checkpoint` with the policy `KEEP`."""
    return _with_derivative_of(checkpoint_name(pack(x), KEPT), x)


@jax.custom_jvp
def _with_derivative_of(kept: Array, x: Array) -> Array:
    """Unpacks `kept`. Words have no derivative, so that it is taken from x, whose value nobody reads."""
    del x
    return unpack(kept)


@_with_derivative_of.defjvp
def _jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _with_derivative_of(*primals), tangents[1]


KEEP: Any = jax.checkpoint_policies.save_only_these_names(KEPT)
