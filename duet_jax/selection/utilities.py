"""One utility per training example of a domain: constant, or from a file of the user's."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax._files import save_array
from duet_jax.data import Example
from duet_jax.data.sources import SUFFIXES, read_rows
from duet_jax.data.texts import ids_of
from duet_jax.errors import DataError

KINDS = ("random", "utilities")
ARRAYS = (".npy", ".npz")


def load_utilities(
    kind: str,
    domain_name: str,
    examples: Sequence[Example],
    *,
    path: str | Path | None = None,
    cache_folder: str | Path | None = None,
) -> np.ndarray:
    """Utilities of a domain's training examples.

    A file of rows (.jsonl, .json, .parquet, .csv) has the columns `id` and `utility`; rows with a
    column `domain` count for that domain only, and ids of no example are ignored. A .npz file has an
    array per domain under the domain's name, a .npy file one array, both in the order of `examples`.

    Args:
      kind: 'random' (all ones) or 'utilities' (from the file `path`).
      domain_name: of the domain.
      examples: its training examples.
      path: the file, needed for 'utilities'.
      cache_folder: where the utilities read are kept, by a hash of the file's content, the domain's
        name and the ids; None keeps nothing.

    Returns:
      float64 [n], finite.

    Raises:
      DataError: no such file, a malformed one, or utilities that are missing, doubled, not finite or
        of the wrong number; the sentence names the domain, the file and the first culprit.
      ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there are no utilities of kind '{kind}'; the kinds are {', '.join(KINDS)}")
    if kind == "random":
        return np.ones(len(examples))
    if path is None or not Path(path).is_file():
        given = "none is given" if path is None else f"there is no file '{path}'"
        raise DataError(f"domain '{domain_name}': utilities are to come from a file, but {given}")
    path = Path(path)
    ids = list(ids_of(examples))
    if cache_folder is None:
        return _read(path, domain_name, ids)
    kept = Path(cache_folder) / f"utilities-{_digest(path, domain_name, ids)}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    utilities = _read(path, domain_name, ids)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_array(kept, utilities)
    return utilities


def _digest(path: Path, domain_name: str, ids: list[str]) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # The suffix decides how the bytes are read, so it is part of the content.
    text = json.dumps([content, path.suffix, domain_name, ids])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path, domain_name: str, ids: list[str]) -> np.ndarray:
    place = f"domain '{domain_name}': {path}"
    if path.suffix in ARRAYS:
        utilities = _read_array(path, domain_name, place, len(ids))
    else:
        utilities = _by_id(path, domain_name, place, ids)
    wrong = ~np.isfinite(utilities)
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(
            f"{place} gives the example '{ids[first]}' the utility {utilities[first]}; utilities must be finite numbers"
        )
    return utilities


def _read_array(path: Path, domain_name: str, place: str, count: int) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded as arrays:
                if domain_name not in arrays.files:
                    held = ", ".join(arrays.files) or "none"
                    raise ValueError(f"it has no array '{domain_name}'; its arrays are {held}")
                loaded = arrays[domain_name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be used as an array file: {error}") from None
    if loaded.dtype.kind not in "fiu":
        raise DataError(f"{place} holds values of type {loaded.dtype}; utilities must be numbers")
    if loaded.shape != (count,):
        raise DataError(
            f"{place} holds an array of shape {loaded.shape}, but the domain has {count} training examples; "
            f"give one utility each in their order, or a file keyed by id"
        )
    return loaded.astype(np.float64)


def _by_id(path: Path, domain_name: str, place: str, ids: list[str]) -> np.ndarray:
    found: dict[str, float] = {}
    for where, columns in _rows(path, domain_name):
        if columns.get("domain", domain_name) != domain_name:
            continue
        for column in ("id", "utility"):
            if columns.get(column) is None:
                raise DataError(f"domain '{domain_name}': {where} has no column '{column}'")
        identifier = str(columns["id"])
        if identifier in found:
            raise DataError(f"domain '{domain_name}': {where} gives a utility to '{identifier}' a second time")
        found[identifier] = _number(columns["utility"], f"domain '{domain_name}': {where}")
    missing = [identifier for identifier in ids if identifier not in found]
    if missing:
        raise DataError(
            f"{place} has no utility for {len(missing)} of the domain's {len(ids)} training examples, "
            f"the first of which is '{missing[0]}'"
        )
    return np.array([found[identifier] for identifier in ids], np.float64)


def _number(value: Any, place: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{place} has the utility {value!r}, which is no number") from None


def _rows(path: Path, domain_name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for columns in reader:
                    yield f"{path}, line {reader.line_num}", columns
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"domain '{domain_name}': {path} is not a readable CSV file ({error})") from None
    elif path.suffix in SUFFIXES:
        yield from read_rows(str(path), split="train", name=domain_name)
    else:
        raise DataError(
            f"domain '{domain_name}': the utilities file '{path}' is of an unknown type; its name must end "
            f"in one of {', '.join((*SUFFIXES, '.csv', *ARRAYS))}"
        )
