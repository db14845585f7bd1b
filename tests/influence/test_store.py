"""A store is whole after any kill, the same whoever wrote it, and finds what was damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.errors import DataError
from duet_jax.influence import quantise
from duet_jax.influence.header import Header, require_comparable
from duet_jax.influence.quantise import FORMATS
from duet_jax.influence.store import Store

HEADER = Header(
    scheme="countsketch",
    seed=7,
    k=64,
    feature="adam",
    loss="sum",
    rows=150,
    model="m",
    adapter="a",
    data="d",
    template="t",
    optimiser="o",
    format="int8",
    shard_size=4,
)


def header(**fields: object) -> Header:
    return dataclasses.replace(HEADER, **fields)


def rows_of(start: int, stop: int, k: int = 64) -> np.ndarray:
    return np.stack([np.random.default_rng(i).standard_normal(k) for i in range(start, stop)]).astype(np.float32)


def write_shard(store: Store, shard: int) -> None:
    start, stop = store.bounds(shard)
    lengths = np.arange(start, stop) + 3
    ids = [f"Beispiel-ä/{i}" for i in range(start, stop)]
    store.write(shard, rows_of(start, stop, store.header.k), ids=ids, lengths=lengths, norms=np.sqrt(lengths))


def build(folder: Path, head: Header = HEADER) -> Store:
    store = Store.resume(folder, head)
    for shard in store.missing():
        write_shard(store, shard)
    store.finish({"rmse": 0.5})
    return store


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder, hashed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("store") / "one").folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_read(tmp_path: Path, format: str) -> None:
    store = build(tmp_path / "s", header(format=format, rows=11))
    store = Store.open(store.folder, store.header)
    assert store.finished and store.missing() == [] and store.verify() == [] and store.report() == {"rmse": 0.5}
    rows = rows_of(0, 11)
    decoded = np.asarray(quantise.decode(quantise.encode(rows, format)))
    np.testing.assert_array_equal(store.take(), decoded)
    np.testing.assert_array_equal(store.take([9, 0, 9, 4]), decoded[[9, 0, 9, 4]])
    starts, parts = zip(*store.stream(), strict=True)
    assert starts == (0, 4, 8) and [len(part.codes) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([quantise.decode(part) for part in parts]), decoded)
    records = list(store.records())
    assert [i for record in records for i in record.ids] == [f"Beispiel-ä/{i}" for i in range(11)]
    np.testing.assert_array_equal(np.concatenate([record.lengths for record in records]), np.arange(11) + 3)
    norms = np.concatenate([record.norms for record in records])
    np.testing.assert_array_equal(norms, np.sqrt(np.arange(11) + 3).astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_take_the_bytes_that_the_header_says(tmp_path: Path, format: str) -> None:
    store = build(tmp_path, header(format=format, k=8192, rows=128, shard_size=64))
    size = sum(path.stat().st_size for name in ("codes", "scales") for path in tmp_path.glob(f"{name}/c/**/*"))
    folders = sum(path.stat().st_size for path in tmp_path.glob("*/c/**/*") if path.is_dir())
    exact = 128 * store.header.bytes_per_row
    assert exact <= size - folders < exact + 2 * 100
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "1bit": 1}[format]
    assert store.header.bytes_per_row == 8192 * bits // 8 + (4 if bits < 16 else 0)


def test_order_and_batches_leave_no_trace(built: Path, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", HEADER)
    for shard in reversed(store.missing()):
        # Another handle each time, as of another process.
        write_shard(Store.open(store.folder), shard)
    # Once more, from rows on a device.
    start, stop = store.bounds(3)
    record = store.record(3)
    store.write(3, jnp.asarray(rows_of(start, stop)), ids=record.ids, lengths=record.lengths, norms=record.norms)
    store.finish({"rmse": 0.5})
    assert tree(store.folder) == tree(built)


def test_a_shard_counts_only_with_its_record(copy: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(copy)
    (copy / "finished.json").unlink()

    def killed(path: Path, text: str) -> None:
        assert path.name == "000002.json" and (copy / "codes/c/2/0").read_bytes() == data
        raise KeyboardInterrupt

    # Dies after the data and before the record, once with a record of before and once without.
    data = (built / "codes/c/2/0").read_bytes()
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("duet_jax.influence.store.write", killed)
            write_shard(store, 2)
        assert store.missing() == [2]
    assert store.missing() == [2] and not store.finished
    for read in (lambda: store.read(2), lambda: store.record(2), store.finish):
        with pytest.raises(DataError, match=f"Shard 2 of the store {copy} is not there; build the store first"):
            read()
    with pytest.raises(DataError, match="lacks 1 of its 38 shards, the first of which is 2"):
        next(store.stream())
    # What dies within a write leaves temporary files, of ours and of tensorstore's.
    (copy / "codes/c/2/0").unlink()
    (copy / "codes/c/2/0.__lock").write_bytes(b"half a")
    (copy / "shards/.000002.json.x.tmp").write_text("half a")
    assert tree(build(copy).folder) == tree(built)


CHILD = """
import os, sys
from pathlib import Path
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
sys.path.insert(0, sys.argv[1])
import test_store as t
mesh = Mesh(jax.devices(), "data")
double = jax.jit(lambda x: 2 * x, out_shardings=NamedSharding(mesh, PartitionSpec(None, "data")))
plain = t.rows_of
t.rows_of = lambda *a: double(plain(*a) / 2)
t.rows_of(0, 4)
print("ready", len(jax.devices()), flush=True)
sys.stdin.readline()
t.build(Path(sys.argv[2]), t.HEADER)
"""


def start_child(folder: Path, devices: int) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder)]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == f"ready {devices}\n"
    return child


def test_kills_at_any_instant_and_other_device_counts_end_in_the_same_files(built: Path, tmp_path: Path) -> None:
    folder, rng, done = tmp_path / "s", random.Random(0), []
    for devices in (1, 4, 2):
        with start_child(folder, devices) as child:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            # Wait until another share of the shards is there, then for any part of a shard's time.
            wanted = (done[-1] if done else 0) + rng.randrange(12)
            while child.poll() is None and len(list(folder.glob("shards/*.json"))) < wanted:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        done.append(len(list(folder.glob("shards/*.json"))))
    assert any(0 < count < 38 for count in done) and not (folder / "finished.json").exists()
    store = build(folder)
    assert store.verify() == []
    assert tree(folder) == tree(built)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def swap(path: Path) -> None:
    # Whole and with valid checksums of its own, but of another shard.
    shutil.copy(path.parents[1] / "5" / path.name, path)


def rename_an_example(path: Path) -> None:
    about = json.loads(path.read_text())
    about["ids"][0] = "another"
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "damage", "readable"),
    [
        ("codes/c/2/0", flip, False),
        ("codes/c/2/0", Path.unlink, False),
        ("codes/c/2/0", lambda path: path.write_bytes(path.read_bytes()[:100]), False),
        ("codes/c/2/0", swap, True),
        ("scales/c/2", flip, False),
        ("shards/000002.json", rename_an_example, True),
        ("shards/000002.json", lambda path: path.write_text(path.read_text()[:40]), True),
        ("shards/000002.json", lambda path: path.write_text("[]"), True),
    ],
)
def test_a_damaged_shard_is_found_named_and_rebuilt(
    built: Path, copy: Path, name: str, damage: Callable[[Path], object], readable: bool
) -> None:
    damage(copy / name)
    store = Store.open(copy)
    if not readable:
        with pytest.raises(DataError, match=r"Shard 2 of the store .* is damaged; drop it \(Store.drop\(\[2\]\)\)"):
            list(store.stream())
    assert store.verify() == [2]
    store.drop(store.verify())
    assert store.missing() == [2]
    assert tree(build(copy).folder) == tree(built)


def test_a_store_is_not_made_over_other_things(tmp_path: Path, built: Path) -> None:
    with pytest.raises(DataError, match="already holds a store"):
        Store.create(built, HEADER)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="holds other files, such as mine.txt"):
        Store.create(tmp_path, HEADER)
    with pytest.raises(DataError, match="There is no store of sketches"):
        Store.open(tmp_path)
    # What a killed creation leaves is no obstacle.
    (tmp_path / "s" / "codes").mkdir(parents=True)
    (tmp_path / "s" / "codes" / "zarr.json").write_text("{")
    assert Store.create(tmp_path / "s", HEADER).missing() == list(range(38))


@pytest.mark.parametrize(("field", "value"), [("seed", 8), ("optimiser", "p"), ("data", "e"), ("shard_size", 8)])
def test_a_build_goes_on_only_with_the_same_header(built: Path, field: str, value: object) -> None:
    with pytest.raises(DataError, match=f"begun with another {field} .*restore the {field}"):
        Store.resume(built, header(**{field: value}))


def test_a_header_that_cannot_be_read_is_explained(copy: Path) -> None:
    path = copy / "header.json"
    good = json.loads(path.read_text())
    for text, reason in (
        ("{", "Expecting property name"),
        (json.dumps(good | {"k": "64"}), "it has no valid k"),
        (json.dumps({name: good[name] for name in good if name != "seed"}), "it has no valid seed"),
        (json.dumps(good | {"layout": 2}), "layout is 2; it must be 1"),
        (json.dumps(good | {"more": 2}), "more"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            Store.open(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scheme", "x"), ("seed", 1), ("k", 32), ("loss", "mean"), ("model", "n"), ("adapter", "b")],
)
def test_stores_that_cannot_be_compared_say_which_field_differs(field: str, value: object) -> None:
    with pytest.raises(DataError, match=f"cannot be compared: {field} is .* build both with the same {field}"):
        require_comparable(HEADER, header(**{field: value}))


def test_features_may_differ_as_in_less() -> None:
    require_comparable(HEADER, HEADER)
    require_comparable(HEADER, header(feature="sgd", data="x", template="x", optimiser="", rows=3, format="1bit"))
    for train, target in (("sgd", "adam"), ("adam", "sign")):
        with pytest.raises(DataError, match=f"feature is '{train}' for the training rows and '{target}' for"):
            require_comparable(header(feature=train), header(feature=target))


def test_headers_out_of_range_are_refused() -> None:
    for field, value in {"k": 48, "seed": 2**32, "loss": "max", "rows": 0, "format": "int2", "shard_size": 0}.items():
        with pytest.raises(ValueError, match=f"{field} is {value!r}; it must be"):
            header(**{field: value})


def test_wrong_rows_are_named(tmp_path: Path) -> None:
    store = Store.create(tmp_path, HEADER)
    rows = rows_of(0, 4)
    ids, lengths = list("abcd"), np.ones(4)
    rows[2, 5] = np.inf
    with pytest.raises(DataError, match="sketch or norm of the example 'c' is not finite"):
        store.write(0, rows, ids=ids, lengths=lengths)
    rows[2, 5] = 0
    with pytest.raises(DataError, match="sketch or norm of the example 'b' is not finite"):
        store.write(0, rows, ids=ids, lengths=lengths, norms=np.array([1, np.nan, 1, 1]))
    with pytest.raises(ValueError, match=r"rows of shard 37 have shape \(4, 64\); it takes \(2, 64\)"):
        store.write(37, rows, ids=ids, lengths=lengths)
    with pytest.raises(ValueError, match="3 ids came with the 4 rows"):
        store.write(0, rows, ids=ids[:3], lengths=lengths)
    with pytest.raises(ValueError, match="no shard 38; the store has the shards 0 to 37"):
        store.write(38, rows, ids=ids, lengths=lengths)
    store.write(0, rows, ids=ids, lengths=lengths)
    assert np.isnan(store.record(0).norms).all() and store.missing()[0] == 1


def test_a_finished_store_is_not_written(copy: Path) -> None:
    store = Store.open(copy)
    with pytest.raises(ValueError, match="is finished; drop a shard before writing it anew"):
        write_shard(store, 0)
    store.drop([0])
    with pytest.raises(DataError, match="is not finished"):
        store.report()
