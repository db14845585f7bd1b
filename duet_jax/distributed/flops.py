"""Floating-point operations of a traced function: those of its matrix products, with every loop counted out.

The compiler's own count takes the body of a loop once, and a decoder is a loop over its layers. Products are all but a
few parts in a thousand of what a decoder computes, and what it computes again for the backward pass is in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def count(traced: ClosedJaxpr) -> float:
    """Operations of all devices together; a multiplication and an addition are two.

    A `while` loop, whose number of runs nobody knows, counts as if it ran once; of a `cond` the dearest branch counts.
    Inside `shard_map` every device does the work of its own shapes. What no result needs, such as gradients of frozen
    kernels, is not counted: the compiler leaves it out.
    """
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inside = sum(map(_count, _called(params)))
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)
        elif name == "scan":
            total += params["length"] * inside
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        elif name == "shard_map":
            sizes = [params["mesh"].shape[axis] for axis in params["newly_manual_axes"]]
            total += math.prod(sizes) * inside
        else:
            total += inside
    return total


def _called(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Functions that an equation calls once: of jit, remat, custom derivatives and loops."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
