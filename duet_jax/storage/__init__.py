"""Where the processes of a study keep what they share: small texts by name, in a folder or in an object store.

A name is a path with slashes, as trials/0007.json. What is large lies in `local`, a folder of this machine, and is
copied by `upload`; checkpoints in an object store are on a `Shelf`.

There are no locks in this interface. A text is made by `create`, of several processes by one, and changed by `read` and
`replace`, which refuses if it is not as it was read. So a process that dies in between has changed nothing, and one
that sleeps in between, for however long, cannot undo what others did meanwhile: nobody needs to find out whether it is
dead, no lease on a lock can run out under it, and no clock is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from duet_jax.errors import StudyError
from duet_jax.storage.folder import Changed as Changed
from duet_jax.storage.folder import Folder as Folder
from duet_jax.storage.shelf import Large as Large
from duet_jax.storage.shelf import Shelf as Shelf
from duet_jax.storage.shelf import discard as discard

SCHEMES = ("s3", "gs", "az")


class Storage(Protocol):
    """Named texts. What cannot be reached is a StudyError, of which the sentence says why; a full disk is an OSError.

    Attributes:
      address: where it is, for people.
    """

    address: str

    @property
    def local(self) -> Path:
        """Folder of this machine for what is large; in a study's own folder that is the folder itself."""
        ...

    def read(self, name: str) -> tuple[bytes, Any]:
        """A text, and what `replace` knows this version of it by. Raises FileNotFoundError."""
        ...

    def read_all(self, folder: str) -> dict[str, bytes]:
        """All texts whose names are one part longer than that of a folder, by that part."""
        ...

    def names(self) -> list[str]:
        """First parts of all names there are, ours or not."""
        ...

    def create(self, name: str, content: bytes) -> Any:
        """Writes a new text and returns its version. Raises FileExistsError if there is one."""
        ...

    def replace(self, name: str, content: bytes, version: Any) -> Any:
        """Writes a text over a version of it and returns the new version. Raises Changed if it is another by now."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a text, whatever was there."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """Copies a large file of this machine there."""
        ...


# A folder, or an address as s3://bucket/study.
Place = str | Path | Storage


def is_address(word: str) -> bool:
    """Whether a word is an address, as s3://bucket/study, and no path of a folder."""
    return re.match(r"[A-Za-z][\w+.-]*://", word) is not None


def at(place: Place) -> Storage:
    """The storage at a place.

    Raises:
      StudyError: the address is of no kind that is known, or cannot be opened, or the extra `objects` is missing.
    """
    if isinstance(place, Path) or (isinstance(place, str) and not is_address(place)):
        return Folder(Path(place))
    if not isinstance(place, str):
        return place
    parts = urlsplit(place)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Folder(Path(unquote(parts.path)))
    if parts.scheme not in SCHEMES or not parts.netloc:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StudyError(f"{place} is no study's address; give a folder, or a bucket and a path after {known}.")
    try:
        from duet_jax.storage.objects import connect
    except ModuleNotFoundError as error:
        raise StudyError(f"{place} needs the package {error.name}; install duet_jax[objects].") from None
    return connect(place)
