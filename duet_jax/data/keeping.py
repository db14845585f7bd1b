"""The examples of a source, parsed once and kept in a folder for all who read them later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from duet_jax.data.domains import parsed, read_examples
from duet_jax.data.example import Example
from duet_jax.data.sources import files_of
from duet_jax.data.texts import NotPlain, Texts, write_texts

if TYPE_CHECKING:
    from duet_jax.config import DomainConfig

# Of what is kept; another one is for another way to make examples of rows.
VERSION = 1


def keep(spec: DomainConfig, folder: Path) -> tuple[Path, str] | None:
    """Writes the examples of a source into a folder, if they are not there; those of a source that has changed are new.

    Returns:
      Where they are, and the key to them; None where they stay in memory: synthetic ones, and those with values that
      are no JSON.

    Raises:
      DataError: as `load_examples`.
    """
    key = _key(spec)
    if key is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"examples-{key[:32]}.arrow"
    # Of processes that begin together one parses, and the others read what it kept.
    with filelock.FileLock(path.with_suffix(".lock")):
        # What a killed one was about to write may be large.
        for left in folder.glob(f".{path.name}.*"):
            left.unlink()
        if Texts.open(path, key) is None:
            try:
                write_texts(path, key, parsed(spec))
            except NotPlain:
                return None
    return path, key


def kept(spec: DomainConfig, place: tuple[Path, str] | None) -> Sequence[Example]:
    """The examples that `keep` has kept, or those of the source."""
    found = None if place is None else Texts.open(*place)
    return read_examples(spec) if found is None else found


def _key(spec: DomainConfig) -> str | None:
    """Hash of what decides the examples: which files, their sizes and times, and how they are read."""
    if spec.source.startswith("synthetic:"):
        return None
    files = [(os.path.abspath(path), path.stat()) for path in files_of(spec.source, split=spec.split, name=spec.name)]
    if not files:
        return None
    read = [VERSION, spec.source, spec.split, spec.name, spec.prompt, spec.response, spec.messages]
    states = [[path, state.st_size, state.st_mtime_ns] for path, state in files]
    return hashlib.sha256(json.dumps([read, states]).encode()).hexdigest()
