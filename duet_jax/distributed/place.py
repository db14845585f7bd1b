"""Arrays put where `rules` says; without a mesh, every function here leaves its program as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from duet_jax.distributed import rules
from duet_jax.distributed.processes import first, several


def row_parts(mesh: Mesh | None) -> int:
    """Devices that have rows of their own in every batch; its size should be a multiple of it."""
    return 1 if mesh is None else rules.row_count(mesh, mesh.size)


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Parameters, adapters or optimiser state on the devices; those that lie there already are not copied.

    Raises:
      ValueError: the mesh's axes are not left to the compiler.
    """
    if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"The mesh's axes are {mesh.axis_types}; all must be Auto, as those of make_mesh are.")
    return tree if mesh is None else put(tree, rules.shardings(mesh, tree))


def place_copied(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays whole on every device."""
    return tree if mesh is None else put(tree, jax.tree.map(lambda _: rules.copied(mesh), tree))


def place_rows(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays `[rows, ...]` on the devices; of several processes each sends those of its own devices."""
    if mesh is None:
        return tree
    where = jax.tree.map(lambda leaf: NamedSharding(mesh, rules.row_spec(mesh, leaf.shape[0])), tree)
    return put(tree, where)


def own_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Rows of a batch for a compiled function that spreads them itself: one process hands them over as they are."""
    return place_rows(mesh, tree) if several() else tree


@lru_cache(maxsize=64)
def held_rows(mesh: Mesh | None, rows: int) -> np.ndarray | None:
    """Which rows of a batch lie on this process's devices after `own_rows`, bool `[rows]`; None: all.

    The others need not be there at all: nobody looks at them.
    """
    if mesh is None or not several():
        return None
    found = np.zeros(rows, np.bool_)
    where = NamedSharding(mesh, rules.row_spec(mesh, rows))
    for index in where.addressable_devices_indices_map((rows,)).values():
        assert index is not None
        found[index] = True
    return found


def put(tree: Any, shardings: Any) -> Any:
    """Arrays where a tree of shardings says.

    Of several processes, each must have the same arrays on its host, or of them what its own devices get, or they lie
    on the devices of all already. Nobody compares them, as `jax.device_put` does over the network.
    """
    if not several():
        return jax.device_put(tree, shardings)

    def one(leaf: Any, where: NamedSharding) -> Array:
        if not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, where)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def readable(tree: Any) -> Any:
    """The same arrays, whole on every device where they are spread over those of several processes.

    Without it a process can read only its own part. Nothing is waited for.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        return _copier(leaf.sharding.mesh)(leaf)

    return jax.tree.map(one, tree)


def gathered(array: Array, where: Any) -> Array:
    """An array, whole, where a sharding of this process's devices says."""
    array = readable(array)
    return jax.device_put(array if array.is_fully_addressable else array.addressable_data(0), where)


def to_host(tree: Any) -> Any:
    """Arrays that the first process can read, such as those of a model that it writes; all must take part.

    What is stacked in layers, arrays of three dimensions, comes one layer at a time, so that no device holds it whole.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.ndim < 3:
            return np.asarray(readable(leaf))
        whole = np.empty(leaf.shape, leaf.dtype) if first() else None
        for number in range(len(leaf)):
            layer = readable(jax.lax.dynamic_index_in_dim(leaf, np.int32(number), keepdims=False))
            if whole is None:
                layer.block_until_ready()
            else:
                whole[number] = np.asarray(layer)
        return whole

    return jax.tree.map(one, tree)


@lru_cache(maxsize=8)
def _copier(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=rules.copied(mesh))


def constrain(mesh: Mesh | None, tree: Any) -> Any:
    """Inside a compiled function: parameters, or gradients or moments of them, where `place` puts them."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, rules.shardings(mesh, tree))


def spread(mesh: Mesh | None, tree: Any, *, at: int = 0, axes: tuple[str, ...] = rules.ROWS) -> Any:
    """Inside a compiled function: the same arrays, their rows (the dimension `at`) over the devices."""

    def constrain(leaf: Array) -> Array:
        assert mesh is not None
        spec = rules.row_spec(mesh, leaf.shape[at], at=at, axes=axes)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return tree if mesh is None else jax.tree.map(constrain, tree)


def embed(mesh: Mesh | None, table: Array, tokens: Array) -> Array:
    """Rows `[B, T, D]` of a table `[V, D]`, in their places as activations.

    The table's features lie on the devices of `fsdp`, and so do rows of the batch: every device looks up its features
    of all their rows, and the devices swap those, rather than that each gathers the table.
    """
    if mesh is None:
        return table[tokens]
    tokens = spread(mesh, tokens, axes=("data",))
    where = rules.looked_up_spec(mesh, tokens.shape[0], table.shape[1])
    return spread(mesh, jax.lax.with_sharding_constraint(table[tokens], NamedSharding(mesh, where)))


def map_rows(mesh: Mesh | None, run: Callable[..., Any], rows: tuple[Any, ...], whole: tuple[Any, ...] = ()) -> Any:
    """`run(*rows, *whole)`, on every device for its own rows: what sorts or loops over them is not torn apart.

    Rows go over all axes of the mesh, over `tensor` too. A loop then may take as many turns as a device's rows need:
    no other device waits for it in the middle.

    Args:
      mesh: None for one device.
      run: gives arrays with a leading axis, of rows or of one entry, which are put together along it.
      rows: trees of arrays `[rows, ...]`, all with the same number of them.
      whole: trees of arrays that every device is given whole.
    """
    if mesh is None:
        return run(*rows, *whole)
    own = rules.row_spec(mesh, jax.tree.leaves(rows)[0].shape[0], axes=rules.ALL_ROWS)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(*(own for _ in rows), *(PartitionSpec() for _ in whole)),
        out_specs=own,
        # What starts as the same zeros everywhere may come to differ: not an error here.
        check_vma=False,
    )
    return mapped(*rows, *whole)
