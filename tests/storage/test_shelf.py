"""Checkpoints in an object store: whole or not at all, whoever fails, is late, or was killed before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.errors import ModelError, StudyError
from duet_jax.storage import Shelf, at
from duet_jax.training.checkpoint import Checkpoints

MARK = "0" * 32
WRONG = {"x": jnp.zeros(9), "n": jnp.zeros((), jnp.int32)}


class Watched:
    """A store that does something before it writes, lists or reads ranges."""

    def __init__(self, store: Any):
        self._store = store
        self.before: dict[str, Callable[[], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        self.before.get(name, lambda: None)()
        return getattr(self._store, name)


@pytest.fixture
def store(memory: Any) -> Watched:
    return Watched(memory)


@pytest.fixture
def objects(store: Watched) -> Any:
    from duet_jax.storage.objects import Objects

    return Objects(store, "s3://bucket/study")


def state(value: float) -> dict[str, Any]:
    return {"x": jnp.full(8, float(value)), "n": jnp.array(int(value), jnp.int32)}


def found(shelf: Shelf) -> tuple[int, float] | None:
    """Step and value of the checkpoint that is there."""
    with Checkpoints(shelf, {"data": "d"}) as checkpoints:
        restored = checkpoints.restore(state(0))
    if restored is None:
        return None
    step, tree, progress = restored
    np.testing.assert_array_equal(tree["x"], np.full(8, progress["value"], np.float32))
    assert tree["n"] == int(progress["value"]) and tree["n"].dtype == jnp.int32
    return step, progress["value"]


def save(shelf: Shelf, *values: int) -> None:
    with Checkpoints(shelf, {"data": "d"}) as checkpoints:
        for value in values:
            checkpoints.save(10 * value, state(value), {"value": value})


def test_the_newest_state_is_kept_alone(objects: Any) -> None:
    shelf = Shelf(objects, "c/1")
    assert found(shelf) is None
    save(shelf, 1, 2, 3)
    save(Shelf(objects, "c/12"), 9)
    assert found(shelf) == (30, 3)
    assert len(objects.listed("c/1")) == 2, "one part, and what makes it a checkpoint"


def test_the_state_may_change_while_it_is_written(objects: Any, store: Watched) -> None:
    free = threading.Event()
    tree = state(1)
    with Checkpoints(Shelf(objects, "c"), {"data": "d"}) as checkpoints:
        store.before["put"] = free.wait
        checkpoints.save(10, tree, {"value": 1})
        # As a step does that takes the arrays over.
        tree["x"].delete()
        free.set()
    assert found(Shelf(objects, "c")) == (10, 1)


def test_what_was_not_finished_is_no_checkpoint(objects: Any, store: Watched) -> None:
    shelf = Shelf(objects, "c")
    save(shelf, 1)
    shelf.write_part(shelf.name(20, MARK), 0, np.zeros(4, np.uint8))
    assert found(shelf) == (10, 1), "as after a kill"

    def fail() -> None:
        raise StudyError("no network")

    store.before["put"] = fail
    with pytest.raises(StudyError, match="no network"):
        save(shelf, 2)
    del store.before["put"]
    assert found(shelf) == (10, 1)
    save(shelf, 2)
    assert found(shelf) == (20, 2)


def test_a_claim_begins_with_what_is_there_of_earlier_ones(objects: Any) -> None:
    save(Shelf(objects, "c/1"), 1)
    save(Shelf(objects, "c/2", ["c/1"]))
    third = Shelf(objects, "c/3", ["c/2", "c/1"])
    assert found(third) == (10, 1) and objects.listed("c/3") == []
    save(third, 2)
    assert found(third) == (20, 2) and objects.listed("c/1") == []


def test_a_checkpoint_of_others_is_refused_before_it_is_read(objects: Any) -> None:
    save(Shelf(objects, "c"), 1)
    like = state(0)
    with (
        pytest.raises(ModelError, match=r"study/c/00000010-\w+ was written by .* with another data \(d, now e"),
        Checkpoints(Shelf(objects, "c"), {"data": "e"}) as checkpoints,
    ):
        checkpoints.restore(like)
    assert not like["x"].is_deleted()
    with (
        pytest.raises(ModelError, match=r"has at \['x'\] float32 of shape \[8\], not float32 of \[9\]"),
        Checkpoints(Shelf(objects, "c"), {"data": "d"}) as checkpoints,
    ):
        checkpoints.restore(WRONG)


def test_a_checkpoint_that_is_removed_meanwhile_is_told(objects: Any, store: Watched) -> None:
    shelf = Shelf(objects, "c")
    save(shelf, 1)
    store.before["get_range"] = lambda: objects.remove(objects.listed("c"))
    with pytest.raises(StudyError, match="was removed while it was read; start the same command again"):
        found(shelf)


def test_a_restore_that_is_overtaken_goes_on_with_the_newer_checkpoint(objects: Any, store: Watched) -> None:
    shelf = Shelf(objects, "c")
    save(shelf, 1)

    def overtake() -> None:
        """As another machine that trains the same."""
        store.before.clear()
        save(shelf, later.pop(0))
        if later:
            store.before["get_range"] = overtake

    later, store.before["get_range"] = [2, 3], overtake
    assert found(shelf) == (30, 3)


def test_a_checkpoint_is_none_whose_parts_another_claim_removes_meanwhile(objects: Any, store: Watched) -> None:
    earlier, later = Shelf(objects, "c/1"), Shelf(objects, "c/2", ["c/1"])
    there, given_up = threading.Event(), threading.Event()
    there.set()

    def parts(shelf: Shelf, step: int) -> str:
        name = shelf.name(step, MARK)
        shelf.write_part(name, 0, np.zeros(4, np.uint8))
        return name

    def once(step: str, act: Callable[[], Any]) -> None:
        store.before[step] = lambda: (store.before.pop(step), act())

    name = parts(earlier, 10)
    once("put", lambda: objects.remove(objects.listed("c/1")))
    earlier.finish(name, 1, {}, there, given_up)
    assert objects.listed("c/1") == [], "removed before it was written that they are there"
    name, other = parts(earlier, 20), parts(later, 10)
    once("delete", lambda: earlier.finish(name, 1, {}, there, given_up))
    later.finish(other, 1, {}, there, given_up)
    assert objects.listed("c/1") == [] and later.latest() == (10, other), "removed when that was written already"


def test_a_part_that_is_cut_short_is_told(objects: Any) -> None:
    shelf = Shelf(objects, "c")
    save(shelf, 1)
    (part,) = (name for name in objects.listed("c") if not name.endswith(".json"))
    objects.write(part, objects.read(part)[0][:-1])
    with pytest.raises(StudyError, match=r"Part 0 of the checkpoint s3://bucket/study/c/0.* is shorter than it was"):
        found(shelf)


def test_later_checkpoints_of_another_machine_stay(objects: Any) -> None:
    shelf = Shelf(objects, "c")
    save(shelf, 3)
    name, there = shelf.name(20, MARK), threading.Event()
    there.set()
    shelf.write_part(name, 0, np.zeros(4, np.uint8))
    shelf.finish(name, 1, {}, there, threading.Event())
    assert found(shelf) == (30, 3)


def test_what_is_gone_already_can_be_removed(tmp_path: Path) -> None:
    """In a store that refuses it, as Google's and Azure's do."""
    from obstore.store import LocalStore

    from duet_jax.storage.objects import Objects

    objects = Objects(LocalStore(tmp_path), "gs://bucket/study")
    (tmp_path / "c").mkdir()
    for name in ("c/1", "c/3"):
        (tmp_path / name).touch()
    objects.remove(["c/1", "c/2", "c/3"])
    assert objects.listed("c") == []


def test_parts_of_several_processes_make_a_checkpoint_when_all_are_there(objects: Any) -> None:
    shelf = Shelf(objects, "c")
    name, there, given_up = shelf.name(7, MARK), threading.Event(), threading.Event()

    def begin() -> threading.Thread:
        thread = threading.Thread(target=shelf.finish, args=(name, 2, {"x": 1}, there, given_up))
        thread.start()
        return thread

    shelf.write_part(name, 0, np.zeros(4, np.uint8))
    first = begin()
    first.join(0.5)
    assert first.is_alive() and not shelf.exists()
    given_up.set()
    first.join()
    assert not shelf.exists(), "a part was never written"
    given_up.clear()
    shelf.write_part(name, 1, np.zeros(4, np.uint8))
    begin().join()
    assert shelf.latest() == (7, name) and shelf.read(name) == {"x": 1}


@pytest.mark.slow
def test_large_parts_on_a_server(s3: str, tmp_path: Path) -> None:
    """In several requests each way."""
    content = np.random.default_rng(0).integers(0, 256, 12_000_000, np.uint8)
    shelf = Shelf(at(s3), "c")  # type: ignore[arg-type]
    name = shelf.name(1, MARK)
    shelf.write_part(name, 3, content)
    assert shelf.read_part(name, 3, 5, 11_000_000) == content[5:11_000_005].tobytes()
    save(shelf, 1, 2)
    assert found(shelf) == (20, 2)
    with pytest.raises(FileNotFoundError):
        shelf.read_part(name, 4, 0, 1)
