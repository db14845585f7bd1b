"""A rule of taps on many devices: each sees the factors of its own examples, so that no gradient is ever moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from duet_jax.distributed import rules
from duet_jax.influence.features import Feature
from duet_jax.influence.tap import Context, Rule, Source


@dataclasses.dataclass(frozen=True)
class Spread:
    """`rule`, with the examples of a batch over all axes of the mesh, over `tensor` too.

    There activations have been split by features: their devices swap them for whole rows, `[B, T, rows + cols]` a
    product, rather than that all of them compute the same. Results of examples stay where they are; sums are added up.
    """

    rule: Rule
    mesh: Mesh

    @property
    def per_layer(self) -> bool:
        return self.rule.per_layer

    @property
    def per_example(self) -> bool:
        return self.rule.per_example

    @property
    def feature(self) -> Feature:
        return self.rule.feature

    def zeros(self, batch: int, rows: int, cols: int, targets: int) -> Any:
        """See `Rule`."""
        return self.rule.zeros(batch, rows, cols, targets)

    def of_factors(self, name: str, context: Context, x: Array, d: Array) -> Any:
        """See `Rule`."""
        shared = rules.axes_for(self.mesh, x.shape[0], rules.ALL_ROWS)
        own, whole = rules.row_spec(self.mesh, x.shape[0], axes=rules.ALL_ROWS), PartitionSpec()

        def run(context: Context, x: Array, d: Array) -> Any:
            found = self.rule.of_factors(name, context, x, d)
            # Examples too few to be shared are computed by every device, and counted once.
            return found if self.per_example or not shared else jax.lax.psum(found, shared)

        mapped = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(whole, own, own),
            out_specs=own if self.per_example else whole,
            check_vma=False,
        )
        return mapped(context, x, d)

    def of_blocks(self, name: str, context: Context, rows: int, cols: int, batch: int, source: Source) -> Any:
        """See `Rule`."""
        raise ValueError("A source gives the gradients of one device's examples; hand it to the rule itself, there.")
