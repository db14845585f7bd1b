"""Sketches on disk: one row per example, written shard by shard, found whole again after a kill at any instant.

    header.json        what the rows are: enough to refuse a comparison that would mean nothing
    codes/             encoded rows, a zarr 3 array [rows, w]; one file a shard, a checksum in every inner chunk
    scales/            float32 [rows], for formats that have them
    shards/NNNNNN.json ids, lengths and norms of a shard's examples, and the SHA-256 of all of it
    finished.json      the SHA-256 of the whole store, and what its builder wants to say about it

A shard counts only when its file in shards/ is there, which is written after its data. Rows go in by shard, in the
order of the examples, and are encoded on the host: what devices and batches they were computed in leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from duet_jax._files import is_temporary, write
from duet_jax.errors import DataError
from duet_jax.influence import quantise
from duet_jax.influence.header import Header
from duet_jax.influence.quantise import Rows


class Record(NamedTuple):
    """What is kept of a shard's examples beside their rows.

    Attributes:
      ids: of the examples.
      lengths: int32 `[n]`, tokens.
      norms: float32 `[n]`, exact norms of the gradients; NaN where they were not measured.
      sha256: of the shard's rows and of the above.
    """

    ids: tuple[str, ...]
    lengths: np.ndarray
    norms: np.ndarray
    sha256: str


class Store:
    """Encoded sketches in a folder. Make one with `Store.create`, `Store.open` or `Store.resume`.

    Several processes may write different shards of one store at the same time.
    """

    def __init__(self, folder: Path, header: Header):
        self.folder = folder
        self.header = header
        self._codes = _open(folder, header, "codes")
        self._scales = _open(folder, header, "scales") if quantise.has_scales(header.format) else None

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether there is a store in `folder`."""
        return (Path(folder) / "header.json").is_file()

    @classmethod
    def create(cls, folder: str | Path, header: Header) -> Store:
        """Makes an empty store.

        Raises:
          DataError: there is a store already, or other files.
        """
        folder = Path(folder)
        if cls.exists(folder):
            raise DataError(f"{folder} already holds a store; open it, or give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        # What a creation that was killed may have left behind is no obstacle to the next one.
        ours = {"codes", "scales", "shards"}
        others = [entry.name for entry in folder.iterdir() if entry.name not in ours and not is_temporary(entry)]
        if others:
            raise DataError(f"{folder} holds other files, such as {others[0]}; give an empty folder.")
        (folder / "shards").mkdir(exist_ok=True)
        _open(folder, header, "codes", create=True)
        if quantise.has_scales(header.format):
            _open(folder, header, "scales", create=True)
        write(folder / "header.json", header.to_json())
        return cls(folder, header)

    @classmethod
    def open(cls, folder: str | Path, header: Header | None = None) -> Store:
        """Opens a store.

        Args:
          folder: of the store.
          header: what it should hold; None accepts anything.

        Raises:
          DataError: there is no readable store, or one with another header; the first differing field is named.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            raise DataError(f"There is no store of sketches in {folder} (no header.json).")
        found = Header.from_json((folder / "header.json").read_text(encoding="utf-8"), str(folder / "header.json"))
        for name, (theirs, ours) in found.differences(header or found).items():
            raise DataError(
                f"The store {folder} was begun with another {name} ({theirs!r}, now {ours!r}); "
                f"restore the {name}, or give another folder."
            )
        return cls(folder, found)

    @classmethod
    def resume(cls, folder: str | Path, header: Header) -> Store:
        """Opens the store in `folder`, or makes it; see `open` and `create`."""
        return cls.open(folder, header) if cls.exists(folder) else cls.create(folder, header)

    @property
    def shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.header.rows // self.header.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"there is no shard {shard}; the store has the shards 0 to {self.shards - 1}")
        start = shard * self.header.shard_size
        return start, min(start + self.header.shard_size, self.header.rows)

    def missing(self) -> list[int]:
        """Shards that are not there yet, ascending."""
        there = {path.name for path in (self.folder / "shards").iterdir()}
        return [shard for shard in range(self.shards) if self._record_path(shard).name not in there]

    def write(
        self, shard: int, rows: Any, *, ids: Sequence[str], lengths: np.ndarray, norms: np.ndarray | None = None
    ) -> None:
        """Writes a shard, or writes it anew.

        Args:
          shard: its number.
          rows: float32 `[n, k]`, one for each row between the shard's bounds; on any device.
          ids: of the examples, n of them.
          lengths: int `[n]`, their tokens.
          norms: float32 `[n]`, exact norms of their gradients, where measured.

        Raises:
          DataError: a row is not finite; its example is named.
          ValueError: wrong shapes, or the store is finished.
        """
        start, stop = self.bounds(shard)
        rows = np.asarray(rows, np.float32)
        self._check(shard, stop - start, rows, ids, lengths, norms)
        self._record_path(shard).unlink(missing_ok=True)
        # On the host whatever sketched them, so that all machines round alike.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            encoded = jax.device_get(quantise.encode(rows, self.header.format))
        written = [self._codes[start:stop].write(encoded.codes)]
        if self._scales is not None:
            written.append(self._scales[start:stop].write(encoded.scales))
        for future in written:
            future.result()
        about = {
            "shard": shard,
            "ids": list(ids),
            "lengths": np.asarray(lengths).tolist(),
            "norms": None if norms is None else np.asarray(norms, np.float32).tolist(),
        }
        text = json.dumps(about | {"sha256": _digest(about, encoded)}, ensure_ascii=False)
        write(self._record_path(shard), text + "\n")

    def _check(self, shard: int, count: int, rows: np.ndarray, ids: Any, lengths: Any, norms: Any) -> None:
        if self.finished:
            raise ValueError(f"the store {self.folder} is finished; drop a shard before writing it anew")
        if rows.shape != (count, self.header.k):
            raise ValueError(f"rows of shard {shard} have shape {rows.shape}; it takes {(count, self.header.k)}")
        for name, given in (("ids", ids), ("lengths", lengths), ("norms", norms)):
            if given is not None and len(given) != count:
                raise ValueError(f"{len(given)} {name} came with the {count} rows of shard {shard}")
        finite = np.isfinite(rows).all(axis=1)
        if norms is not None:
            finite &= np.isfinite(np.asarray(norms))
        if not finite.all():
            raise DataError(
                f"The sketch or norm of the example '{ids[int(finite.argmin())]}' is not finite; "
                f"leave the example out, or find what overflows in its gradient."
            )

    def record(self, shard: int) -> Record:
        """Ids, lengths and norms of a shard.

        Raises:
          DataError: the shard is not there, or its file is damaged.
        """
        about = self._about(shard)
        norms = [math.nan] * len(about["ids"]) if about["norms"] is None else about["norms"]
        return Record(
            tuple(about["ids"]), np.array(about["lengths"], np.int32), np.array(norms, np.float32), about["sha256"]
        )

    def _about(self, shard: int) -> dict[str, Any]:
        start, stop = self.bounds(shard)
        try:
            about = json.loads(self._record_path(shard).read_text(encoding="utf-8"))
            whole = about["shard"] == shard and len(about["ids"]) == len(about["lengths"]) == stop - start
            if not whole or not isinstance(about["sha256"], str) or "norms" not in about:
                raise ValueError
        except FileNotFoundError:
            raise DataError(f"Shard {shard} of the store {self.folder} is not there; build the store first.") from None
        except (ValueError, KeyError, TypeError):
            raise self._damaged(shard) from None
        return about

    def records(self) -> Iterator[Record]:
        """The records of all shards, in order; see `record`."""
        return map(self.record, range(self.shards))

    def read(self, shard: int) -> Rows:
        """The encoded rows of a shard.

        Raises:
          DataError: the shard is not there, or is damaged.
        """
        return self._await(shard, self._begin(shard))

    def stream(self) -> Iterator[tuple[int, Rows]]:
        """Numbers of first rows, and encoded rows, of all shards in order; the next one is read ahead.

        Raises:
          DataError: a shard is not there, or is damaged.
        """
        missing = self.missing()
        if missing:
            raise DataError(
                f"The store {self.folder} lacks {len(missing)} of its {self.shards} shards, the first of which is "
                f"{missing[0]}; build the rest first."
            )
        ahead = self._begin(0)
        for shard in range(self.shards):
            reading, ahead = ahead, self._begin(shard + 1) if shard + 1 < self.shards else []
            yield self.bounds(shard)[0], self._await(shard, reading)

    def take(self, rows: Any = None) -> np.ndarray:
        """Decoded rows float32 `[n, k]`, all of them or those of the numbers given, int `[n]`; for few of them."""
        if rows is None:
            return np.concatenate([np.asarray(quantise.decode(part)) for _, part in self.stream()])
        chosen = np.asarray(rows, np.int64)
        shards, place = np.unique(chosen // self.header.shard_size, return_inverse=True)
        decoded = np.empty((len(chosen), self.header.k), np.float32)
        for number, shard in enumerate(shards.tolist()):
            part = self.read(shard)
            inside = chosen[place == number] - self.bounds(shard)[0]
            part = Rows(part.codes[inside], part.scales[inside], part.format)
            decoded[place == number] = quantise.decode(part)
        return decoded

    def _begin(self, shard: int) -> list[Any]:
        start, stop = self.bounds(shard)
        return [array[start:stop].read() for array in (self._codes, self._scales) if array is not None]

    def _await(self, shard: int, reading: list[Any]) -> Rows:
        if not self._record_path(shard).is_file():
            raise DataError(f"Shard {shard} of the store {self.folder} is not there; build the store first.")
        try:
            return self._rows([future.result() for future in reading])
        except (ValueError, OSError):
            raise self._damaged(shard) from None

    def _rows(self, parts: list[np.ndarray]) -> Rows:
        scales = parts[1] if len(parts) > 1 else np.ones(len(parts[0]), np.float32)
        return Rows(parts[0], scales, self.header.format)

    def _damaged(self, shard: int) -> DataError:
        return DataError(
            f"Shard {shard} of the store {self.folder} is damaged; drop it (Store.drop([{shard}])) and build again."
        )

    def verify(self) -> list[int]:
        """Reads everything that was written, and names the shards whose checksum or content is wrong."""
        damaged = []
        for shard in sorted(set(range(self.shards)) - set(self.missing())):
            try:
                about = self._about(shard)
                if about.pop("sha256") != _digest(about, self.read(shard)):
                    damaged.append(shard)
            except DataError:
                damaged.append(shard)
        return damaged

    def drop(self, shards: Iterable[int]) -> None:
        """Forgets shards, so that `missing` names them; the store is no longer finished."""
        for shard in shards:
            self.bounds(shard)
            (self.folder / "finished.json").unlink(missing_ok=True)
            self._record_path(shard).unlink(missing_ok=True)

    def finish(self, report: Mapping[str, Any] | None = None) -> str:
        """Marks the store as complete.

        Args:
          report: JSON values to be kept with it, such as its measured sketch error.

        Returns:
          The SHA-256 of the store: of its header, rows, ids, lengths and norms.

        Raises:
          DataError: a shard is not there.
        """
        for path in (*self.folder.iterdir(), *(self.folder / "shards").iterdir()):
            if is_temporary(path):
                path.unlink(missing_ok=True)
        digest = hashlib.sha256(self.header.to_json().encode())
        for record in self.records():
            digest.update(record.sha256.encode())
        about = {"sha256": digest.hexdigest(), "report": dict(report or {})}
        write(self.folder / "finished.json", json.dumps(about, indent=1) + "\n")
        return digest.hexdigest()

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, and no shard dropped since."""
        return (self.folder / "finished.json").is_file()

    def report(self) -> dict[str, Any]:
        """What `finish` was given.

        Raises:
          DataError: the store is not finished.
        """
        if not self.finished:
            raise DataError(f"The store {self.folder} is not finished; build it first.")
        return json.loads((self.folder / "finished.json").read_text(encoding="utf-8"))["report"]

    def _record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06d}.json"


def _digest(about: Mapping[str, Any], rows: Rows) -> str:
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    digest.update(np.ascontiguousarray(rows.codes).tobytes())
    if quantise.has_scales(rows.format):
        digest.update(np.ascontiguousarray(rows.scales).tobytes())
    return digest.hexdigest()


def _open(folder: Path, header: Header, name: str, *, create: bool = False) -> Any:
    dtype, width = quantise.layout(header.format, header.k)
    if name == "scales":
        dtype, shape = np.dtype(np.float32), [header.rows]
        # Tens of kilobytes at most: one inner chunk.
        inner = [header.shard_size]
    else:
        shape = [header.rows, width]
        inner = [math.gcd(header.shard_size, 64), width]
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": inner, "codecs": checked, "index_codecs": checked, "index_location": "end"}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{(folder / name).absolute()}/"},
        # A chunk of zeros is a chunk like any other: one that is not there was lost.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [header.shard_size, *shape[1:]]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        },
    }
    try:
        return tensorstore.open(spec, open=not create, create=create, delete_existing=create).result()
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"The array {folder / name} of the store cannot be opened: {reason}") from None
