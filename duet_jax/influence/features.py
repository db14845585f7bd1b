"""What is projected of a gradient g: the gradient itself, its signs, or the step an optimiser would make of it.

LESS (Xia et al. 2024, arXiv 2402.04333, section 3.1) compares Adam's steps of training examples with plain gradients
of the target. A feature maps each example's gradient, entry by entry, with the optimiser's moments at a checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array


class Moments(NamedTuple):
    """Adam's state at a checkpoint.

    Attributes:
      first: running means of gradients, a tree like the trainable parameters.
      second: of their squares.
      steps: int32 scalar, the steps done.
    """

    first: Any
    second: Any
    steps: Any


def moments(state: Any) -> Moments:
    """Finds Adam's moments in an optax state.

    Raises:
      ValueError: there are none.
    """
    # A schedule of the learning rate has a count of its own: what is wanted stands beside the moments.
    parts = jax.tree.leaves(state, is_leaf=lambda part: hasattr(part, "mu") and hasattr(part, "nu"))
    for part in parts:
        if hasattr(part, "mu") and hasattr(part, "nu"):
            return Moments(part.mu, part.nu, part.count)
    raise ValueError("The optimiser's state has no moments of Adam; the features of Adam need a run of Adam(W).")


class State(NamedTuple):
    """A feature's constants for one parameter: trees of arrays whose first axis is the parameter's, and others."""

    rows: Any = None
    whole: Any = None


class Feature(Protocol):
    """A map of gradients.

    `needs_moments`: `prepare` takes those of Adam. `factored`: the map can be made on the two factors of a gradient.
    `linear`: it is linear in the gradient, so that weighted sums of examples may be mapped as one.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_moments(self) -> bool: ...

    @property
    def factored(self) -> bool: ...

    @property
    def linear(self) -> bool: ...

    def prepare(self, first: Array, second: Array, count: Array) -> State:
        """The constants of one parameter `[rows, cols]` from its moments and the number of steps done."""
        ...

    def factors(self, x: Array, d: Array, state: State) -> tuple[Array, Array]:
        """The factors `[B, T, rows]` and `[B, T, cols]` of the mapped gradients, where `factored`."""
        ...

    def dense(self, gradient: Array, state: State) -> Array:
        """The mapped gradients, float32 `[B, rows, cols]`; `state.rows` holds the same rows."""
        ...


class _Stateless:
    needs_moments = False

    def prepare(self, first: Array, second: Array, count: Array) -> State:
        del first, second, count
        return State()

    def factors(self, x: Array, d: Array, state: State) -> tuple[Array, Array]:
        raise NotImplementedError("only factored features have factors")


@dataclasses.dataclass(frozen=True)
class Gradient(_Stateless):
    """The gradient as it is: what SGD follows."""

    name = "sgd"
    factored = True
    linear = True

    def factors(self, x: Array, d: Array, state: State) -> tuple[Array, Array]:
        del state
        return x, d

    def dense(self, gradient: Array, state: State) -> Array:
        del state
        return gradient


@dataclasses.dataclass(frozen=True)
class Sign(_Stateless):
    """The gradient's signs; 0 stays 0."""

    name = "sign"
    factored = False
    linear = False

    def dense(self, gradient: Array, state: State) -> Array:
        del state
        return jnp.sign(gradient)


@dataclasses.dataclass(frozen=True)
class Adam(_Stateless):
    """The step that Adam would make next of this example alone, before the learning rate.

    With moments m, v after t - 1 steps, g the example's gradient:

    `form="paper"` (LESS, equation in section 3.1): `m' / (sqrt(v') + eps)`,
    `m' = (b1 m + (1 - b1) g) / (1 - b1^t)`, `v' = (b2 v + (1 - b2) g^2) / (1 - b2^t)`.

    `form="less_code"`: what the published code of LESS computes, no correction of the bias and eps inside the root:
    `(b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)`. With its eps of 1e-8, entries below 1e-4 are hardly
    normalised.
    """

    form: Literal["paper", "less_code"] = "paper"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    needs_moments = True
    factored = False
    linear = False

    @property
    def name(self) -> str:
        return f"adam_{self.form}"

    def prepare(self, first: Array, second: Array, count: Array) -> State:
        t = count.astype(jnp.float32) + 1
        corrections = (1 - self.b1**t, 1 - self.b2**t) if self.form == "paper" else (jnp.ones(()), jnp.ones(()))
        return State((first, second), corrections)

    def dense(self, gradient: Array, state: State) -> Array:
        (m, v), (first_correction, second_correction) = state
        m = (self.b1 * m + (1 - self.b1) * gradient) / first_correction
        v = (self.b2 * v + (1 - self.b2) * jnp.square(gradient)) / second_correction
        return m / (jnp.sqrt(v) + self.eps) if self.form == "paper" else m * jax.lax.rsqrt(v + self.eps)


@dataclasses.dataclass(frozen=True)
class FrozenAdam(_Stateless):
    """The gradient over the root of the checkpoint's second moment: Adam without the example's own share in it.

    Linear in the gradient; selects as Adam does where single examples hardly move the second moment. `momentum`
    adds the running mean as Adam does, the same for all examples: affine then, no longer linear.
    """

    momentum: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    needs_moments = True
    factored = False

    @property
    def name(self) -> str:
        return "adam_frozen_momentum" if self.momentum else "adam_frozen"

    @property
    def linear(self) -> bool:
        return not self.momentum

    def prepare(self, first: Array, second: Array, count: Array) -> State:
        done = jnp.maximum(count.astype(jnp.float32), 1)
        scale = 1 / (jnp.sqrt(second / (1 - self.b2**done)) + self.eps)
        if not self.momentum:
            return State((scale, None))
        correction = 1 - self.b1 ** (count.astype(jnp.float32) + 1)
        return State((scale * (1 - self.b1) / correction, scale * self.b1 * first / correction))

    def dense(self, gradient: Array, state: State) -> Array:
        scale, constant = state.rows
        return gradient * scale if constant is None else gradient * scale + constant


@dataclasses.dataclass(frozen=True)
class RankOne(_Stateless):
    """The gradient over the root of a rank-one second moment (Adafactor, Shazeer and Stern 2018, section 3).

    With row means R and column means C of the second moment V, `V_ij ~ R_i C_j / mean(R)`. It scales the factors
    of a gradient, which is then never made. `eps` squared is added to V.
    """

    b2: float = 0.999
    eps: float = 1e-8
    name = "rank_one"
    needs_moments = True
    factored = True
    linear = True

    def prepare(self, first: Array, second: Array, count: Array) -> State:
        del first
        second = second / (1 - self.b2 ** jnp.maximum(count.astype(jnp.float32), 1)) + self.eps**2
        rows = jax.lax.rsqrt(jnp.mean(second, axis=1) / jnp.mean(second))
        return State(rows, jax.lax.rsqrt(jnp.mean(second, axis=0)))

    def factors(self, x: Array, d: Array, state: State) -> tuple[Array, Array]:
        return (x * state.rows).astype(x.dtype), (d * state.whole).astype(d.dtype)

    def dense(self, gradient: Array, state: State) -> Array:
        return gradient * state.rows[:, None] * state.whole
