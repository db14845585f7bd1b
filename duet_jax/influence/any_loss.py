"""Sketches, norms and inner products of per-example gradients of any loss, through whole gradients.

Slower than the taps of `gradients` and with the memory of a chunk of gradients, but for any function; the numbers
are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from duet_jax.influence.features import Moments
from duet_jax.influence.gradients import Examples, contexts
from duet_jax.influence.projections import Blocks
from duet_jax.influence.tap import Context, Rule


def named_leaves(tree: Any) -> dict[str, Array]:
    """Every leaf of any tree as a parameter of one layer, `[1, rows, cols]`, under its dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.reshape(1, -1, leaf.shape[-1] if leaf.ndim else 1)
        for path, leaf in leaves
    }


def of_any_loss(
    loss: Callable[[Any, Any], Array],
    rule: Rule,
    *,
    chunk: int = 8,
    named: Callable[[Any], Mapping[str, Array]] = named_leaves,
) -> Callable[..., Examples]:
    """The same numbers for any loss, from whole gradients of `chunk` examples at a time.

    Args:
      loss: `(params, example) -> scalar`, differentiable in `params`.
      rule: `Sketch`, `SquaredNorm` or `InnerProducts`.
      chunk: examples whose gradients exist at once.
      named: takes a gradient apart into `{name: [L, rows, cols]}`. Names, layers and entries decide which random
        signs meet which number: `ExampleGradients.named` gives those of our decoder.

    Returns:
      A compiled function `(params, examples, *, moments=None, targets=None) -> Examples`; `examples` is a tree of
      arrays with a leading axis of examples, `targets` is `{name: [Q, L, rows, cols]}`.

    Raises:
      ValueError: `rule` needs the factors of gradients.
    """
    if not rule.per_example:
        raise ValueError("Second moments need the factors of gradients, which the gradient of a loss does not have.")

    def of_layer(name: str, context: Context, gradient: Array) -> Array:
        gradient = gradient.astype(jnp.float32)[None]

        def source(plan: Blocks) -> Callable[[Any], Array]:
            padded = plan.pad(gradient, 1)
            return lambda first: plan.take(padded, first, 1)

        return rule.of_blocks(name, context, gradient.shape[1], gradient.shape[2], 1, source)[0]

    @jax.jit
    def compiled(
        params: Any,
        examples: Any,
        *,
        moments: Moments | None = None,
        targets: Mapping[str, Array] | None = None,
    ) -> Examples:
        known = contexts(rule, named, named(params), moments, targets)

        def one(example: Any) -> Examples:
            value, gradient = jax.value_and_grad(loss)(params, example)
            arrays = named(gradient)
            # One layer after the other: rows of different layers are shifted differently, which a vmap over them
            # would turn into gathers.
            found = {
                name: jax.lax.map(lambda layer, name=name: of_layer(name, *layer), (known[name], arrays[name]))
                for name in sorted(arrays)
            }
            if rule.per_layer:
                return Examples(jnp.concatenate([x.reshape(-1) for x in found.values()]), value)
            return Examples(sum(jnp.sum(x, axis=0) for x in found.values()), value)

        return jax.lax.map(one, examples, batch_size=chunk)

    return compiled
