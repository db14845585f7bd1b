"""Checkpoints in an object store: each process writes and reads the parts of its own devices.

Every array is cut as the devices hold it. Of a piece that several processes have the one with the least so far writes
it, which all find out alone, since each knows where all devices' pieces are. A process sends its pieces one after the
other as one object; a restore reads the pieces that its devices need, however they were cut. Nothing is gathered: a
host holds what its own devices hold, and of one array at a time the pieces that overlap it.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from duet_jax.distributed.processes import LEAVE, Stopped, agree, anywhere, lead, several
from duet_jax.errors import DuetError, ModelError, StudyError
from duet_jax.storage import Shelf

# Requests at a time, and the most bytes of one.
READERS, RANGE = 8, 64 * 2**20

# From where to where along each dimension.
Bounds = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Where a block of an array is: in which process's part, from which byte."""

    process: int
    start: int
    bounds: Bounds


class Removed(StudyError):
    """A checkpoint was removed while it was read: another machine has a newer one, or the trial is through."""

    def __init__(self, name: str):
        super().__init__(f"The checkpoint {name} was removed while it was read; start the same command again.")


class Parts:
    """What `Checkpoints` does on a shelf, as it does with orbax in a folder.

    What is written appears without another call, while the training goes on. That the part of every process is written
    is asked before the next one.
    """

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._mark = lead(lambda: uuid.uuid4().hex)
        self._writer = ThreadPoolExecutor(1)
        self._own: Future[None] | None = None
        self._finished: Future[None] | None = None
        self._there, self._given_up = threading.Event(), threading.Event()
        self._about: dict[str, Any] = {}

    def latest(self) -> tuple[int, Any] | None:
        """See `Shelf.latest`."""
        return self._shelf.latest()

    def all_steps(self) -> list[int]:
        """The newest step, if there is one: those before it are removed."""
        latest = self.latest()
        return [] if latest is None else [latest[0]]

    def about(self, name: str) -> dict[str, Any]:
        """What was written with a state; for all processes to call, before `read`, which raises the same."""
        try:
            self._about = lead(self._shelf.read, name)
        except FileNotFoundError:
            raise Removed(self.place(name)) from None
        return self._about["about"]

    def write(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copies a state to the host, and writes it in the background."""
        self.wait_until_finished()
        name, leaves = self._shelf.name(step, self._mark), _named(state)
        pieces, sizes = _plan(leaves)
        content = _packed(leaves, pieces, sizes[jax.process_index()])
        self._there, self._given_up = threading.Event(), threading.Event()
        self._own = self._writer.submit(self._shelf.write_part, name, jax.process_index(), content)
        if jax.process_index() == 0:
            arrays = {key: {"shape": x.shape, "dtype": x.dtype.name, "pieces": pieces[key]} for key, x in leaves}
            written = {"about": about, "arrays": arrays}
            self._finished = self._writer.submit(
                self._shelf.finish, name, jax.process_count(), written, self._there, self._given_up
            )

    def place(self, name: str) -> str:
        """Where a checkpoint is, for people."""
        return self._shelf.place(name)

    def read(self, name: str, abstract: Any) -> Any:
        """A state whose arrays are laid out as those of a tree of shapes with shardings, see `about`.

        Raises:
          Removed: on all processes, if one of them no longer finds it.
        """
        known, error, state, removed = self._about["arrays"], None, None, False
        for key, like in _named(abstract):
            found = known.get(key, {"shape": None, "dtype": None})
            if found["shape"] != list(like.shape) or found["dtype"] != like.dtype.name:
                raise ModelError(
                    f"The checkpoint {self.place(name)} has at {key} {found['dtype']} of shape {found['shape']}, not "
                    f"{like.dtype.name} of {list(like.shape)}; delete it to train this trial anew."
                )
        try:
            with ThreadPoolExecutor(READERS) as readers:
                state = jax.tree_util.tree_map_with_path(
                    lambda path, like: self._array(name, known[jax.tree_util.keystr(path)], like, readers), abstract
                )
        except FileNotFoundError:
            removed = True
        except StudyError as raised:
            error = raised
        if anywhere(removed):
            raise Removed(self.place(name))
        agree(error, f"read its part of the checkpoint {name}")
        return state

    def wait_until_finished(self) -> None:
        """Waits until what is being written is a checkpoint; for all processes to call.

        Raises:
          StudyError: a part cannot be written, of whichever process.
        """
        own, finished, self._own, self._finished = self._own, self._finished, None, None
        if own is None:
            return
        try:
            agree(own.exception(), f"write its part of a checkpoint to {self._shelf}")
        except BaseException:
            self._given_up.set()
            raise
        self._there.set()
        lead(lambda: finished.result() if finished is not None else None)

    def close(self, error: BaseException | None) -> None:
        """Ends, because of an error or not.

        Of an error that may be this process's alone the others know nothing: they are not asked, and the first process
        waits only a while for their parts.
        """
        alone = several() and error is not None and not isinstance(error, Stopped | DuetError)
        patience = threading.Timer(LEAVE, self._given_up.set)
        try:
            if alone:
                patience.start()
            else:
                self.wait_until_finished()
        finally:
            self._writer.shutdown()
            patience.cancel()

    def _array(self, name: str, about: dict[str, Any], like: Any, readers: ThreadPoolExecutor) -> Array:
        """An array laid out like another one, from the pieces that this process's devices need."""
        own = [_bounds(i, like.shape) for i in like.sharding.addressable_devices_indices_map(like.shape).values()]
        pieces = [Piece(process, start, tuple(map(tuple, bounds))) for process, start, bounds in about["pieces"]]
        needed = [piece for piece in pieces if any(_shared(piece.bounds, bounds) is not None for bounds in own)]
        values = [np.empty(_shape(piece.bounds), like.dtype) for piece in needed]

        def fill(piece: Piece, content: np.ndarray, at: int) -> None:
            size = min(RANGE, content.size - at)
            found = self._shelf.read_part(name, piece.process, piece.start + at, size)
            if len(found) < size:
                raise StudyError(
                    f"Part {piece.process} of the checkpoint {self.place(name)} is shorter than it was; restore it, or "
                    f"delete the checkpoint to train this trial anew."
                )
            content[at : at + size] = np.frombuffer(found, np.uint8)

        tasks = [
            readers.submit(fill, piece, content, at)
            for piece, content in zip(needed, map(_as_bytes, values), strict=True)
            for at in range(0, content.size, RANGE)
        ]
        for task in tasks:
            task.result()

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            bounds = _bounds(index, like.shape)
            whole = np.empty(_shape(bounds), like.dtype)
            for piece, content in zip(needed, values, strict=True):
                if (shared := _shared(piece.bounds, bounds)) is not None:
                    whole[_within(shared, bounds)] = content[_within(shared, piece.bounds)]
            return whole

        return jax.make_array_from_callback(like.shape, like.sharding, block)


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _plan(leaves: Sequence[tuple[str, Array]]) -> tuple[dict[str, list[Piece]], list[int]]:
    """The pieces of each array, and the bytes of each process's part; the same on all processes."""
    sizes = [0] * jax.process_count()
    plan: dict[str, list[Piece]] = {}
    for key, leaf in leaves:
        holders: dict[Bounds, list[int]] = {}
        places: Mapping[Any, tuple[slice, ...]] = leaf.sharding.devices_indices_map(leaf.shape)
        for device, index in places.items():
            holders.setdefault(_bounds(index, leaf.shape), []).append(device.process_index)
        plan[key] = []
        for bounds, processes in holders.items():
            writer = min(processes, key=lambda process: (sizes[process], process))
            plan[key].append(Piece(writer, sizes[writer], bounds))
            sizes[writer] += math.prod(_shape(bounds)) * leaf.dtype.itemsize
    return plan, sizes


def _packed(leaves: Sequence[tuple[str, Array]], plan: dict[str, list[Piece]], size: int) -> np.ndarray:
    """This process's part, uint8 `[size]`: a copy, since the next step takes the state's arrays over."""
    content, host = np.empty(size, np.uint8), jax.local_devices(backend="cpu")[0]
    for key, leaf in leaves:
        shards = {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
        for process, start, bounds in plan[key]:
            if process == jax.process_index():
                # A device's own array would keep what is read of it: all of the state a second time on the host.
                array = jax.device_put(shards[bounds], host)
                content[start : start + array.nbytes] = _as_bytes(np.asarray(array))
    return content


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """The same memory as uint8 `[n]`, of an array in the order of C."""
    return array.reshape(-1).view(np.uint8)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _shape(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _shared(one: Bounds, other: Bounds) -> Bounds | None:
    """The block that is in both, None where there is none."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def _within(block: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """Where a block is in one that holds it."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(block, outer, strict=True))
