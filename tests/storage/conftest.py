"""A storage of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duet_jax.storage import Folder, Storage, at
from duet_jax.study import Study
from tests.storage.remote import Watched, make_config, objects


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object store in this process."""
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return MemoryStore()


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, Storage]:
    """One storage as two processes see it."""
    if request.param == "folder":
        return Folder(tmp_path / "study"), Folder(tmp_path / "study")
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        return at(address), at(address + "/")
    store = request.getfixturevalue("memory")

    from duet_jax.storage.objects import Objects

    return Objects(store, "memory"), Objects(store, "memory")


@pytest.fixture
def place(memory: Any) -> Watched:
    return Watched(memory)


@pytest.fixture
def studies(place: Watched, memory: Any) -> tuple[Study, Study]:
    """One study as two processes see it; before the first one's writes something may happen."""
    return Study.create(objects(place), make_config()), Study.open(objects(memory))
