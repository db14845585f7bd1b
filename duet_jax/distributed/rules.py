"""Where every kind of array lies on the mesh: the one table of it.

    parameters      a product splits its input features over `fsdp` and its output features over `tensor`, or the other
                    way round where it leads back to the residual stream, so that a pair of products (up and down, v and
                    o) meets in features of the same device. Tokens of embedding and head go over `tensor`, their
                    features over `fsdp`. Norms are copied. Layers, stacked on axis 0, are never split: scans read one.
    LoRA factors    features over both axes, that of their kernel first: they are quickly gathered, but Adam keeps as
                    much again, twice. The rank is never split
    optimiser       as the parameters
    batches         rows over `data` and `fsdp`; so activations, and the replies that are being written
    sketches        rows over all axes, where there are enough rows; losses too, for which the head is gathered
    KV caches       rows as a batch's, heads over `tensor`

An axis that the mesh lacks, or that does not divide a dimension, leaves that dimension whole.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")
ALL_ROWS = ("data", "fsdp", "tensor")
VOCABULARY = ("tensor", "fsdp")
_INWARDS, _OUTWARDS = ("fsdp", "tensor"), ("tensor", "fsdp")
KERNELS = {
    "q": _INWARDS,
    "k": _INWARDS,
    "v": _INWARDS,
    "o": _OUTWARDS,
    "gate": _INWARDS,
    "up": _INWARDS,
    "down": _OUTWARDS,
}


def _names(path: tuple) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def _last_axes(path: tuple) -> tuple[tuple[str, ...], ...]:
    """Mesh axes of an array's last dimensions, by its name and that of the product it belongs to."""
    *_, owner, name = ["", "", *_names(path)]
    if name in ("embedding", "head"):
        return (VOCABULARY[0],), (VOCABULARY[1],)
    if owner not in KERNELS:
        return ()
    features_in, features_out = KERNELS[owner]
    return {
        "kernel": ((features_in,), (features_out,)),
        "bias": ((features_out,),),
        "a": ((features_in, features_out), ()),
        "b": ((), (features_out, features_in)),
    }.get(name, ())


def axes_for(mesh: Mesh, size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some axes that split the mesh, and that together divide a dimension of that size."""
    found: tuple[str, ...] = ()
    parts = 1
    for axis in axes:
        # An axis of one device splits nothing, and the compiler leaves it out of what it returns.
        if mesh.shape.get(axis, 1) > 1 and size % (parts * mesh.shape[axis]) == 0:
            found, parts = (*found, axis), parts * mesh.shape[axis]
    return found


def _spec(*dimensions: tuple[str, ...]) -> PartitionSpec:
    """In the one form that the compiler also returns: specs that mean the same but differ compile a program again."""
    entries = [axes if len(axes) > 1 else axes[0] if axes else None for axes in dimensions]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def row_count(mesh: Mesh, rows: int) -> int:
    """Parts that so many rows of a batch are spread in."""
    return math.prod(mesh.shape[axis] for axis in axes_for(mesh, rows, ROWS))


def parameter_spec(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> PartitionSpec:
    """Of a parameter, a LoRA factor, or what an optimiser keeps for one.

    Args:
      mesh: any with some of the axes.
      path: keys of a pytree, of which the last two count: `(..., "q", "kernel")`, `(..., "embedding")`.
      shape: of the array, with or without a leading axis of layers.
    """
    last = _last_axes(path)
    if len(last) > len(shape):
        return PartitionSpec()
    before = len(shape) - len(last)
    split = [axes_for(mesh, size, axes) for axes, size in zip(last, shape[before:], strict=True)]
    return _spec(*[()] * before, *split)


def shardings(mesh: Mesh, tree: Any, *, gathered: bool = False) -> Any:
    """A `NamedSharding` for each leaf of a tree of parameters, adapters or optimiser state.

    Args:
      mesh: see `mesh.make_mesh`.
      tree: arrays or `jax.ShapeDtypeStruct`s, named as in `llama.init` and `lora.init` however deep they lie.
      gathered: nothing is split over `fsdp`: each of its devices has all that a step of generation reads.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        spec = parameter_spec(mesh, path, np.shape(leaf))
        if gathered:
            each = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
            spec = _spec(*(tuple(axis for axis in axes if axis and axis != "fsdp") for axes in each))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, tree)


def row_spec(mesh: Mesh, count: int, *, at: int = 0, axes: tuple[str, ...] = ROWS) -> PartitionSpec:
    """Of arrays with `count` rows on the dimension `at`: tokens, hidden states, losses; sketches with `ALL_ROWS`."""
    return _spec(*[()] * at, axes_for(mesh, count, axes))


def looked_up_spec(mesh: Mesh, rows: int, features: int) -> PartitionSpec:
    """Of rows `[rows, T, features]` of the embedding, as they are found; see `place.embed`."""
    return _spec(axes_for(mesh, rows, ("data",)), (), axes_for(mesh, features, ("fsdp",)))


def cache_spec(mesh: Mesh, rows: int, heads: int) -> PartitionSpec:
    """Of keys and values, `[rows, heads, ...]`."""
    return _spec(axes_for(mesh, rows, ROWS), axes_for(mesh, heads, ("tensor",)))


def copied(mesh: Mesh) -> NamedSharding:
    """Whole on every device: scalars, tables, norms."""
    return NamedSharding(mesh, PartitionSpec())
