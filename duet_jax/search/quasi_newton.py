"""Minimisation of smooth functions of a few variables inside compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Longest step in any direction, and the decrease that a step must bring (Nocedal & Wright 2006, equation 3.6a).
LONGEST, DECREASE = 1.0, 1e-4


class Found(NamedTuple):
    """Where a minimisation stands.

    Attributes:
      point: `[p]`, the lowest found.
      value: of the function there.
      slope: `[p]`, its gradient.
      carry: what goes with the point.
      inverse: `[p, p]`, of the Hessian, as far as it is known; a negative corner: not at all.
      step: `[p]`, to try next.
    """

    point: Array
    value: Array
    slope: Array
    carry: Any
    inverse: Array
    step: Array


def minimise(
    function: Callable[[Array, Any], tuple[Array, Any]],
    start: Array,
    carry: Any,
    evaluations: int,
    inverse: Array | None = None,
) -> Found:
    """BFGS (Nocedal & Wright 2006, algorithm 6.1) with one evaluation an iteration and no line search.

    A step that does not lower the value enough is tried again shorter, from the same point. So the loop has no
    branch and no inner loop, compiles once, and runs under `vmap`: line searches that nest loops take seconds to
    compile, and one of them hung under `vmap` on a CPU.

    Args:
      function: of a point `[p]` and something carried from the last accepted point (say, where an inner iteration
        ended); returns the value, and what to carry on.
      start: `[p]`.
      carry: of the first evaluation.
      evaluations: how many times the function is evaluated with its gradient.
      inverse: `[p, p]`, a guess of the inverse Hessian.
    """
    differentiate = jax.value_and_grad(function, has_aux=True)
    identity = jnp.eye(start.shape[0], dtype=start.dtype)

    def iterate(at: Found, _: None) -> tuple[Found, None]:
        trial = at.point + at.step
        (value, carry), slope = differentiate(trial, at.carry)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        # The first evaluation is of the start itself: there the step is 0 and any finite value is accepted.
        expected = at.slope @ at.step
        better = value <= at.value + DECREASE * expected
        change = slope - at.slope
        curvature = at.step @ change
        # Before the first update the identity is scaled to the curvature met (equation 6.20).
        fresh = at.inverse[0, 0] < 0
        scale = jnp.where(curvature > 0, curvature / jnp.maximum(change @ change, 1e-30), 1.0)
        inverse = jnp.where(fresh, scale * identity, at.inverse)
        rho = 1.0 / jnp.where(curvature > 1e-12, curvature, 1.0)
        left = identity - rho * jnp.outer(at.step, change)
        updated = left @ inverse @ left.T + rho * jnp.outer(at.step, at.step)
        inverse = jnp.where(better & (curvature > 1e-12), updated, at.inverse)
        ahead = jnp.where(inverse[0, 0] < 0, -slope, -inverse @ slope)
        longest = jnp.max(jnp.abs(ahead))
        ahead = ahead * jnp.minimum(1.0, LONGEST / jnp.maximum(longest, 1e-30))
        # Where a parabola through what is known has its minimum, kept between a tenth and a half.
        excess = value - at.value - expected
        shorter = jnp.where(excess > 0, -expected / jnp.maximum(2.0 * excess, 1e-30), 0.1)
        back = at.step * jnp.clip(jnp.where(jnp.isfinite(shorter), shorter, 0.1), 0.1, 0.5)
        pick = lambda new, old: jnp.where(better, new, old)  # noqa: E731
        kept = jax.tree.map(pick, carry, at.carry)
        return Found(
            pick(trial, at.point), pick(value, at.value), pick(slope, at.slope), kept, inverse, pick(ahead, back)
        ), None

    zero = jnp.zeros_like(start)
    # A negative corner marks an inverse Hessian that is not known yet.
    guess = -identity if inverse is None else inverse
    begin = Found(start, jnp.full((), jnp.inf, start.dtype), zero, carry, guess, zero)
    return jax.lax.scan(iterate, begin, None, length=evaluations)[0]
