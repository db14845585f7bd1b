"""Storages keep what they promise, over a folder, an object store in memory and a server that speaks S3."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from duet_jax.errors import StudyError
from duet_jax.storage import Changed, Folder, Storage, at, is_address

Two = tuple[Storage, Storage]


def test_a_text_is_made_once_and_read_by_all(two: Two) -> None:
    one, other = two
    with pytest.raises(FileNotFoundError):
        other.read("trials/0000.json")
    one.create("trials/0000.json", "vätte".encode())
    assert other.read("trials/0000.json")[0] == "vätte".encode()
    with pytest.raises(FileExistsError):
        other.create("trials/0000.json", b"late")
    assert one.read("trials/0000.json")[0] == "vätte".encode()
    other.write("trials/0000.json", b"")
    assert one.read("trials/0000.json")[0] == b""


def test_a_text_is_replaced_only_as_it_was_read(two: Two) -> None:
    one, other = two
    first = one.create("a", b"1")
    _, read = other.read("a")
    second = one.replace("a", b"2", first)
    with pytest.raises(Changed):
        other.replace("a", b"3", read)
    assert other.read("a")[0] == b"2"
    third = one.replace("a", b"4", second)
    _, read = other.read("a")
    assert other.replace("a", b"5", read) != third
    with pytest.raises(Changed):
        one.replace("none", b"1", third)
    with pytest.raises(FileNotFoundError):
        one.read("none")


def test_files_of_a_network_s_file_system_are_not_read(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    storage.create("trials/0", b"0")
    (tmp_path / "trials" / ".nfs0001").mkdir()
    (tmp_path / "trials" / ".nfs0002").write_text("gone soon")
    assert storage.read_all("trials") == {"0": b"0"}


@pytest.mark.slow
def test_marks_of_folders_in_a_bucket_are_no_texts(s3: str, s3_server: str) -> None:
    at(s3).create("trials/0", b"0")
    for mark in ("", "trials/"):
        with urlopen(Request(f"{s3_server}/{s3.removeprefix('s3://')}/{mark}", data=b"", method="PUT")):
            pass
    storage = at(s3)
    assert storage.read_all("trials") == {"0": b"0"} and storage.names() == ["trials"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_told(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StudyError, match="cannot be made .* set XDG_CACHE_HOME to a folder that can be written"):
        _ = at(s3).local


def test_names_are_listed(two: Two) -> None:
    one, other = two
    assert one.names() == [] and one.read_all("trials") == {}
    one.create("config.yaml", b"c")
    for number in range(3):
        one.create(f"trials/{number}", b"%d" % number)
    one.create("trials/old/7", b"7")
    one.create("trialsmore/0", b"8")
    assert sorted(other.names()) == ["config.yaml", "trials", "trialsmore"]
    assert other.read_all("trials") == {"0": b"0", "1": b"1", "2": b"2"}
    one.write("trials/1", b"x")
    assert other.read_all("trials") == {"0": b"0", "1": b"x", "2": b"2"}


def together(tasks: list[Callable[[], Any]]) -> None:
    failures: list[BaseException] = []

    def run(task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_change_of_several_gets_lost(two: Two) -> None:
    two[0].create("sum", b"0")

    def add(storage: Storage) -> None:
        for _ in range(8):
            while True:
                text, version = storage.read("sum")
                try:
                    storage.replace("sum", b"%d" % (int(text) + 1), version)
                    break
                except Changed:
                    pass

    together([lambda: add(two[0]), lambda: add(two[1])])
    assert two[0].read("sum")[0] == b"16"


def test_of_several_that_make_a_text_one_does(two: Two) -> None:
    made: list[bytes] = []

    def make(storage: Storage, what: bytes) -> None:
        for number in range(8):
            try:
                storage.create(f"trials/{number}", what)
                made.append(what)
            except FileExistsError:
                pass

    together([lambda: make(two[0], b"a"), lambda: make(two[1], b"b")])
    assert len(made) == 8
    assert sorted(two[0].read_all("trials").values()) == sorted(made)


class Faulty:
    """An object store whose answers get lost, before or after it has done what it was asked for."""

    def __init__(self, store: Any):
        self.store = store
        self.faults: list[str] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.gets = 0

    def put(self, *args: Any, **options: Any) -> Any:
        from obstore.exceptions import GenericError

        fault = self.faults.pop(0) if self.faults else ""
        if fault == "before":
            raise GenericError("the connection was reset\nand more for developers")
        done = self.store.put(*args, **options)
        if fault == "after":
            self.meanwhile()
            raise GenericError("the connection was reset\nand more for developers")
        return done

    def get(self, name: str) -> Any:
        self.gets += 1
        return self.store.get(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def faulty(memory: Any) -> tuple[Any, Faulty]:
    from duet_jax.storage.objects import Objects

    store = Faulty(memory)
    return Objects(store, "s3://bucket/study"), store


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_write_whose_answer_got_lost_is_made_once(faulty: tuple[Any, Faulty], fault: str) -> None:
    objects, store = faulty
    store.faults = [fault]
    version = objects.create("a", b"1")
    store.faults = [fault]
    version = objects.replace("a", b"2", version)
    assert objects.read("a") == (b"2", version)


def test_a_lost_answer_is_not_taken_for_anothers_write(faulty: tuple[Any, Faulty], memory: Any) -> None:
    objects, store = faulty
    memory.put("a", b"other")
    store.faults = ["before"]
    with pytest.raises(FileExistsError):
        objects.create("a", b"1")
    _, version = objects.read("a")
    # It was written, and replaced by another before anybody heard of it.
    store.faults, store.meanwhile = ["after"], lambda: memory.put("a", b"later")
    with pytest.raises(Changed):
        objects.replace("a", b"2", version)
    assert objects.read("a")[0] == b"later"


def test_what_cannot_be_reached_is_one_sentence(faulty: tuple[Any, Faulty]) -> None:
    objects, store = faulty
    store.faults = ["before", "before"]
    with pytest.raises(StudyError) as caught:
        objects.create("a", b"1")
    assert str(caught.value) == "s3://bucket/study cannot be written: the connection was reset."
    assert objects.names() == []


def test_only_texts_that_changed_are_read_again(faulty: tuple[Any, Faulty]) -> None:
    objects, store = faulty
    for number in range(5):
        objects.create(f"trials/{number}", b"%d" % number)
    assert len(objects.read_all("trials")) == store.gets == 5
    objects.write("trials/3", b"x")
    objects.create("trials/5", b"5")
    assert objects.read_all("trials")["3"] == b"x" and store.gets == 7
    assert len(objects.read_all("trials")) == 6 and store.gets == 7


def test_a_large_file_is_copied(two: Two, tmp_path: Path) -> None:
    path = tmp_path / "study" / "model"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(range(256)) * 40_000)
    two[0].upload(path, "model")
    assert two[1].read("model")[0] == path.read_bytes()


def test_another_study_at_the_same_address_has_another_folder(memory: Any) -> None:
    from obstore.store import MemoryStore

    from duet_jax.storage.objects import Objects

    first = Objects(memory, "memory").local
    assert Objects(memory, "memory").local == first and first.is_dir()
    assert Objects(MemoryStore(), "memory").local != first
    memory.put("id", b"../../elsewhere")
    with pytest.raises(StudyError, match="memory/id is damaged; delete it"):
        _ = Objects(memory, "memory").local


@pytest.mark.parametrize(
    ("word", "address"),
    [("s3://b/x", True), ("file:///data/x", True), ("studies/one", False), ("C:/x", False), ("gs:/b/x", False)],
)
def test_what_is_an_address(word: str, address: bool) -> None:
    assert is_address(word) == address


def test_places(tmp_path: Path) -> None:
    assert isinstance(at(tmp_path), Folder) and isinstance(at("studies/one"), Folder)
    assert at(f"file://{tmp_path}/a%20b").local == tmp_path / "a b"
    for word in ("ftp://host/x", "s3:///x", "file://host/x"):
        with pytest.raises(StudyError, match=f"{word} is no study's address; give a folder, or a bucket"):
            at(word)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StudyError, match=r"^az://box/x cannot be opened: .*Account must be specified.$"):
        at("az://box/x")
    assert at("gs://bucket/x/").address == "gs://bucket/x" and at("s3://bucket/x").address == "s3://bucket/x"


@pytest.mark.slow
def test_a_bucket_that_is_not_there(s3: str) -> None:
    storage = at("s3://none/x")
    with pytest.raises(FileNotFoundError):
        storage.read("config.yaml")
    with pytest.raises(StudyError, match=r"^s3://none/x cannot be written: .*\.$"):
        storage.create("config.yaml", b"")
    with pytest.raises(StudyError, match=r"^s3://none/x cannot be reached: .*The specified bucket does not exist\).$"):
        storage.names()
