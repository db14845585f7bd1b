"""Texts in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure (extra `objects`).

This relies on what all three promise: an object is seen whole or not at all, reads and listings give the last write,
and a write may be conditional, on there being no such object, or on its being the version that was read (ETag, or
generation). What is written so is never deleted, and nothing is locked.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url

from duet_jax.errors import StudyError
from duet_jax.storage.folder import Changed

READERS = 8
# Bytes of a part of a large file, of which stores take 10,000.
PART, MOST_PARTS = 5 * 2**20, 9_000
# Of an object, which write it is by.
MARK = "duetwrite"


def connect(address: str) -> Objects:
    """Opens an address, with the credentials of the environment, as AWS_ACCESS_KEY_ID, or of the machine's role.

    Raises:
      StudyError: something is missing for that.
    """
    try:
        return Objects(from_url(address), address.rstrip("/"))
    except (BaseError, ValueError) as error:
        raise StudyError(f"{address} cannot be opened: {_reason(error)}.") from None


class Objects:
    """A `Storage` in an object store.

    Args:
      store: of obstore; names are paths in it.
      address: where it is, for people.
    """

    def __init__(self, store: Any, address: str):
        self.address = address
        self._store = store
        self._read: dict[str, tuple[str, bytes]] = {}

    @cached_property
    def local(self) -> Path:
        """A folder of the user's cache; it is another one for another study that is made at the same address."""
        try:
            identity, _ = self.read("id")
        except FileNotFoundError:
            try:
                identity = uuid.uuid4().hex.encode()
                self.create("id", identity)
            except FileExistsError:
                identity, _ = self.read("id")
        if not re.fullmatch(b"[0-9a-f]{32}", identity):
            raise StudyError(f"{self.address}/id is damaged; delete it.")
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = cache / "duet_jax" / "studies" / identity.decode()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            raise StudyError(
                f"The folder of this machine for what is large of {self.address} cannot be made ({error}); set "
                f"XDG_CACHE_HOME to a folder that can be written."
            ) from None
        return folder

    def read(self, name: str) -> tuple[bytes, dict[str, str]]:
        """See `Storage`."""
        with self._told():
            found = self._store.get(name)
            return bytes(found.bytes()), _version(found.meta)

    def read_all(self, folder: str) -> dict[str, bytes]:
        """See `Storage`. Only what has another ETag than the last time is read again."""
        with self._told():
            listed = self._store.list_with_delimiter(f"{folder}/")["objects"]
        # Some programs mark a folder by an empty object of its name.
        names = {each["path"]: _tag(each) for each in listed if each["path"] != folder}
        new = [name for name, tag in names.items() if tag is None or self._read.get(name, ("", b""))[0] != tag]
        with ThreadPoolExecutor(READERS) as readers:
            for name, (content, version) in zip(new, readers.map(self.read, new), strict=True):
                self._read[name] = _tag(version) or "", content
        return {name.rpartition("/")[2]: self._read[name][1] for name in names}

    def names(self) -> list[str]:
        """See `Storage`."""
        with self._told():
            found = self._store.list_with_delimiter()
        return [each["path"] for each in found["objects"] if each["path"]] + [
            path.rstrip("/") for path in found["common_prefixes"]
        ]

    def create(self, name: str, content: bytes) -> dict[str, str]:
        """See `Storage`."""
        version = self._put(name, content, "create")
        if version is None:
            raise FileExistsError(name)
        return version

    def replace(self, name: str, content: bytes, version: dict[str, str]) -> dict[str, str]:
        """See `Storage`."""
        new = self._put(name, content, version)
        if new is None:
            raise Changed(name)
        return new

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        self._put(name, content, "overwrite")

    def upload(self, path: Path, name: str) -> None:
        """See `Storage`; in parts, of which the object is made when all are there."""
        self._put_large(name, path, path.stat().st_size)

    def write_large(self, name: str, content: np.ndarray) -> None:
        """See `Large`."""
        self._put_large(name, content, content.nbytes)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See `Large`."""
        with self._told():
            return bytes(self._store.get_range(name, start=start, length=size))

    def listed(self, folder: str) -> list[str]:
        """See `Large`."""
        with self._told():
            return [each["path"] for page in self._store.list(f"{folder}/") for each in page]

    def remove(self, names: Sequence[str]) -> None:
        """See `Large`."""
        if not names:
            return
        try:
            with self._told():
                self._store.delete(list(names))
        except FileNotFoundError:
            # S3 takes what is gone for deleted, others do not.
            for name in names:
                with suppress(FileNotFoundError), self._told():
                    self._store.delete(name)

    def _put_large(self, name: str, content: Path | np.ndarray, size: int) -> None:
        with self._told():
            self._store.put(name, content, chunk_size=max(PART, size // MOST_PARTS + 1))

    def _put(self, name: str, content: bytes, mode: str | dict[str, str]) -> dict[str, str] | None:
        """Writes under a condition; gives the new version, or None if the condition does not hold.

        An answer may get lost after the write was done. Then obstore, or the second try here, finds that the condition
        does not hold any more, because of ourselves: every write has a mark of its own, by which that is known.
        """
        mark = uuid.uuid4().hex
        put = partial(self._store.put, name, content, mode=mode, attributes={MARK: mark})
        try:
            try:
                return _version(put())
            except GenericError:
                return _version(put())
        except (AlreadyExistsError, PreconditionError):
            return self._ours(name, mark)
        except FileNotFoundError as error:
            # What is to be replaced may be gone; else there is no such bucket.
            if isinstance(mode, dict):
                return None
            raise StudyError(f"{self.address} cannot be written: {_reason(error)}.") from None
        except BaseError as error:
            raise StudyError(f"{self.address} cannot be written: {_reason(error)}.") from None

    def _ours(self, name: str, mark: str) -> dict[str, str] | None:
        """The version that is there, if it is by the write with this mark."""
        try:
            with self._told():
                found = self._store.get(name)
        except FileNotFoundError:
            return None
        return _version(found.meta) if found.attributes.get(MARK) == mark else None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise StudyError(f"{self.address} cannot be reached: {_reason(error)}.") from None


def _version(about: Any) -> dict[str, str]:
    """What a later write may be conditional on: stores want one or both."""
    return {key: about[key] for key in ("e_tag", "version") if about.get(key) is not None}


def _tag(about: Any) -> str | None:
    """The ETag, which Azure lists without the quotes that it otherwise has."""
    tag = about.get("e_tag")
    return None if tag is None else tag.strip('"')


def _reason(error: Exception) -> str:
    """The first line of an error of obstore, whose others are for its developers, and what the server says."""
    text = str(error).strip()
    line = text.partition("\n")[0].partition(": <?xml")[0].rstrip(". ")
    said = re.search("<Message>(.*?)</Message>", text)
    return f"{line} ({said[1].rstrip('. ')})" if said else line
