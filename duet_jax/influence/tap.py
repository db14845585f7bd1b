"""Taps: an ordinary batched backward pass that leaves something of every example's gradient behind.

A tap is an identity on the output y of a linear layer, with one more argument, an accumulator of zeros, that does not
affect it. The layer's gradient for example b is `x_b^T d_b`, d the derivative of y; the tap's backward rule knows
both factors, and what a rule makes of them it returns as the accumulator's derivative. Autodiff adds up the layers:
`jax.grad(loss, accumulator)` is the rule's result for all of them, without a gradient per example ever being stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.influence.features import Feature, Gradient, State
from duet_jax.influence.projections import Blocks, Projection, blocks, product

# Gives, for a plan of blocks, the function from a block's first row to per-example gradients [B, rows, cols].
Source = Callable[[Blocks], Callable[[Any], Array]]


class Context(NamedTuple):
    """What a rule knows of one parameter of one layer besides its gradient.

    Attributes:
      layer: int32 scalar.
      state: the feature's constants.
      targets: `[Q, rows, cols]`, gradients to take inner products with; None for none.
    """

    layer: Any
    state: State = State()
    targets: Array | None = None


class Rule(Protocol):
    """What is made of per-example gradients. Hashable; `batch`, `rows`, `cols` are the gradients' sizes.

    `per_layer`: results of layers and parameters are kept apart, not added. `per_example`: they have a leading axis
    of examples, else they are sums over them.
    """

    @property
    def per_layer(self) -> bool: ...

    @property
    def per_example(self) -> bool: ...

    @property
    def feature(self) -> Feature: ...

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Any:
        """The result of no gradient at all; `targets` is the number of target gradients."""
        ...

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Any:
        """The result for `x [B, T, rows]` and `d [B, T, cols]`."""
        ...

    def of_blocks(self, name: str, context: Context, rows: int, cols: int, batch: int, source: Source) -> Any:
        """The result for gradients that come in blocks of rows."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tap(rule: Rule, name: str, accumulator: Any, context: Context, x: Array, y: Array) -> Array:
    """Returns y; the derivative of `accumulator` is what `rule` makes of x and the derivative of y.

    Args:
      rule: makes it; x is rounded to the dtype of y first.
      name: of the parameter.
      accumulator: tree of `rule.zeros`; may be shared by taps.
      context: of the parameter and layer.
      x: input of the linear layer, `[B, T, rows]`.
      y: its output, `[B, T, cols]`.
    """
    del rule, name, accumulator, context, x
    return y


def _forward(rule: Rule, name: str, accumulator: Any, context: Context, x: Array, y: Array) -> tuple[Array, tuple]:
    del rule, name, accumulator
    return y, (context, x)


def _backward(rule: Rule, name: str, kept: tuple[Context, Array], d: Array) -> tuple:
    context, x = kept
    return rule.of_factors(name, context, x.astype(d.dtype), d), None, None, d


tap.defvjp(_forward, _backward)


class _Entrywise:
    """Rules that look at the entries of a mapped gradient, block by block, and add up."""

    per_layer = False
    per_example = True
    feature: Feature

    def row_multiple(self, cols: int) -> int:
        del cols
        return 1

    def of_block(self, name: str, context: Context, gradient: Array, first_row: Any) -> Array:
        """The result for rows of the mapped gradients; `context` holds the same rows."""
        raise NotImplementedError

    def of_blocks(self, name: str, context: Context, rows: int, cols: int, batch: int, source: Source) -> Array:
        plan = blocks(rows, cols, batch, self.row_multiple(cols))
        gradients = source(plan)
        states = jax.tree.map(lambda leaf: plan.pad(leaf, 0), context.state.rows)
        targets = None if context.targets is None else plan.pad(context.targets, 1)

        def part(first: Any) -> Array:
            state = State(jax.tree.map(lambda leaf: plan.take(leaf, first, 0), states), context.state.whole)
            here = Context(context.layer, state, None if targets is None else plan.take(targets, first, 1))
            return self.of_block(name, here, self.feature.dense(gradients(first), state), first)

        return plan.add_up(part)

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        def source(plan: Blocks) -> Callable[[Any], Array]:
            padded = plan.pad(x, -1)
            return lambda first: product(plan.take(padded, first, -1), d)

        return self.of_blocks(name, context, x.shape[-1], d.shape[-1], x.shape[0], source)


@dataclasses.dataclass(frozen=True)
class Sketch(_Entrywise):
    """A projection of a feature, float32 `[B, width]`."""

    projection: Projection
    feature: Feature = Gradient()

    @property
    def per_layer(self) -> bool:  # type: ignore[override]
        return self.projection.per_layer

    def row_multiple(self, cols: int) -> int:
        return self.projection.row_multiple(cols)

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Array:
        del targets
        return jnp.zeros((batch, self.projection.width(rows, cols)), jnp.float32)

    def of_block(self, name: str, context: Context, gradient: Array, first_row: Any) -> Array:
        return self.projection.project_dense(name, context.layer, gradient, first_row)

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        if self.feature.factored:
            return self.projection.project(name, context.layer, *self.feature.factors(x, d, context.state))
        return super().of_factors(name, context, x, d)


@dataclasses.dataclass(frozen=True)
class SquaredNorm(_Entrywise):
    """Exact squared norm of a feature over all parameters, float32 `[B]`."""

    feature: Feature = Gradient()

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Array:
        del rows, cols, targets
        return jnp.zeros(batch, jnp.float32)

    def of_block(self, name: str, context: Context, gradient: Array, first_row: Any) -> Array:
        del name, context, first_row
        return jnp.sum(jnp.square(gradient), axis=(1, 2))

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Array:
        tokens, rows, cols = x.shape[1], x.shape[2], d.shape[2]
        if self.feature.factored and tokens * (rows + cols) < rows * cols:
            # |x^T d|^2 = <x x^T, d d^T>: cheaper than the gradient for few tokens.
            x, d = self.feature.factors(x, d, context.state)
            gram = (((2,), (2,)), ((0,), (0,)))
            return jnp.sum(
                jax.lax.dot_general(x, x, gram, preferred_element_type=jnp.float32)
                * jax.lax.dot_general(d, d, gram, preferred_element_type=jnp.float32),
                axis=(1, 2),
            )
        return super().of_factors(name, context, x, d)


@dataclasses.dataclass(frozen=True)
class InnerProducts(_Entrywise):
    """Exact inner products of a feature with each of Q target gradients, float32 `[B, Q]`."""

    feature: Feature = Gradient()

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Array:
        del rows, cols
        return jnp.zeros((batch, targets), jnp.float32)

    def of_block(self, name: str, context: Context, gradient: Array, first_row: Any) -> Array:
        del name, first_row
        assert context.targets is not None
        return jnp.einsum("brc,qrc->bq", gradient, context.targets)


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """Sums over tokens of `x x^T` and `d d^T` of each layer, and the number of tokens: the factors of K-FAC.

    Tokens on which no loss depends through the layer (d = 0) do not count: padding, what comes after the last label,
    and in the last layer all but those that a label is predicted from.
    """

    feature: Feature = Gradient()
    per_layer = True
    per_example = False

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> dict[str, Array]:
        del batch, targets
        return {"x": jnp.zeros((rows, rows)), "d": jnp.zeros((cols, cols)), "tokens": jnp.zeros(())}

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> dict[str, Array]:
        del name, context
        counts = jnp.any(d != 0, axis=-1, keepdims=True)
        x = jnp.where(counts, x, jnp.zeros((), x.dtype))
        over_tokens = (((0, 1), (0, 1)), ((), ()))
        return {
            "x": jax.lax.dot_general(x, x, over_tokens, preferred_element_type=jnp.float32),
            "d": jax.lax.dot_general(d, d, over_tokens, preferred_element_type=jnp.float32),
            "tokens": jnp.sum(counts, dtype=jnp.float32),
        }

    def of_blocks(self, name: str, context: Context, rows: int, cols: int, batch: int, source: Source) -> Any:
        raise ValueError("Second moments need both factors of a gradient; those of the LM head are never whole.")
