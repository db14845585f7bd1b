"""Rows of a data source, each with the place it came from; what the columns mean is not known here.

A source is a file (.jsonl, .json, .parquet), a folder saved by `datasets` or holding such files,
or the name of a data set on the Hugging Face hub (`owner/name` or `owner/name:configuration`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from duet_jax.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")


class Row(NamedTuple):
    """One record: `where` names its file and line for messages, `columns` is the record itself."""

    where: str
    columns: dict[str, Any]


def read_rows(source: str, *, split: str, name: str) -> Iterator[Row]:
    """Yields the rows of a source in their order.

    Args:
      source: a file, a folder or a hub name.
      split: which part of a folder or hub data set; a single file has no parts and ignores it.
      name: the domain's name, for messages.

    Raises:
      DataError: the source is missing, of unknown type, unreadable, or has no such split.
    """
    path = Path(source).expanduser()
    if path.exists():
        try:
            yield from _read_folder(path, split, name) if path.is_dir() else _read_file(path, name)
        except OSError as error:
            raise DataError(f"domain '{name}': '{path}' could not be read ({_first_line(error)})") from None
    elif "://" in source:
        raise DataError(
            f"domain '{name}': the source '{source}' is of an unknown type; give a file "
            f"({', '.join(SUFFIXES)}), a folder, a hub name or synthetic:KIND"
        )
    elif _looks_local(source):
        raise DataError(f"domain '{name}': there is no file or folder '{source}'")
    else:
        yield from _read_hub(source, split, name)


def files_of(source: str, *, split: str, name: str) -> list[Path]:
    """Files that the rows come from; none where `read_rows` has something to say, or there are no files.

    Raises:
      DataError: as `read_rows`.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            saved = _is_saved(path)
            return sorted(f for f in path.rglob("*") if f.is_file()) if saved else _shards(path, split, name)
        if path.exists():
            return [path]
    except OSError:
        return []
    if "://" in source or _looks_local(source):
        return []
    return [Path(file["filename"]) for file in _load_hub(source, split, name).cache_files]


def _looks_local(source: str) -> bool:
    return (
        source.startswith(("/", "./", "../", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or Path(source).suffix in (*SUFFIXES, ".csv", ".txt", ".gz")
    )


def _read_file(path: Path, name: str) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from _read_json_lines(path, name)
    elif path.suffix == ".json":
        yield from _read_json(path, name)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, name)
    else:
        raise DataError(
            f"domain '{name}': the file '{path}' is of an unknown type; its name must end in one "
            f"of {', '.join(SUFFIXES)}"
        )


def _read_json_lines(path: Path, name: str) -> Iterator[Row]:
    number = 0
    # Lines are split by hand and not by str.splitlines: JSON strings may hold U+2028 and the like.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                value = json.loads(text)
            except UnicodeDecodeError:
                raise DataError(f"domain '{name}': {where} is not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"domain '{name}': {where} is not valid JSON ({error.msg}, column {error.colno})"
                ) from None
            yield _record(value, where, name)


def _read_json(path: Path, name: str) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"domain '{name}': {path} is not UTF-8 text") from None
    if not text.lstrip().startswith("["):
        # Many tools write JSON lines under the name .json.
        yield from _read_json_lines(path, name)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"domain '{name}': {path}, line {error.lineno} is not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}, row {number}", name)


def _record(value: Any, where: str, name: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"domain '{name}': {where} holds a JSON {type(value).__name__}; each row must be an "
            f"object with named columns"
        )
    return Row(where, value)


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (columns for batch in file.iter_batches() for columns in batch.to_pylist())
            for number, columns in enumerate(rows, start=1):
                yield Row(f"{path}, row {number}", columns)
    except pyarrow.ArrowException as error:
        raise DataError(f"domain '{name}': {path} is not a readable Parquet file ({_first_line(error)})") from None


def _read_folder(path: Path, split: str, name: str) -> Iterator[Row]:
    if _is_saved(path):
        yield from _read_saved(path, split, name)
        return
    for file in _shards(path, split, name):
        yield from _read_file(file, name)


def _is_saved(path: Path) -> bool:
    """Whether the `datasets` library has saved this folder."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _shards(path: Path, split: str, name: str) -> list[Path]:
    """The files of a split in a folder of files."""
    places = [path, path / "data"]
    files = sorted(file for place in places if place.is_dir() for file in place.iterdir() if file.suffix in SUFFIXES)
    # Hub layouts name the shards of a split `train-00000-of-00002.parquet`.
    pattern = re.compile(re.escape(split) + r"(-\d+-of-\d+.*)?")
    chosen = [file for file in files if pattern.fullmatch(file.stem)]
    if not chosen:
        there = ", ".join(file.name for file in files[:8]) or "no data files"
        raise DataError(
            f"domain '{name}': the folder '{path}' has no file of the split '{split}' (such as "
            f"{split}.jsonl); it has {there}"
        )
    if len({(file.parent, file.suffix) for file in chosen}) > 1:
        raise DataError(
            f"domain '{name}': the folder '{path}' has the split '{split}' more than once "
            f"({', '.join(str(file.relative_to(path)) for file in chosen[:8])}); give the file to read"
        )
    return chosen


def _read_saved(path: Path, split: str, name: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"domain '{name}': the folder '{path}' could not be read as saved by the datasets "
            f"library ({_first_line(error)})"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"domain '{name}': '{path}' has no split '{split}'; it has {', '.join(data)}")
        data = data[split]
    yield from _dataset_rows(data, str(path))


def _read_hub(source: str, split: str, name: str) -> Iterator[Row]:
    yield from _dataset_rows(_load_hub(source, split, name), source)


def _load_hub(source: str, split: str, name: str) -> Any:
    import datasets

    repository, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split)
    # The hub client fails offline, for unknown names and for unknown splits with exceptions of
    # several libraries, so the kinds cannot be listed; the cause stays in the sentence.
    except Exception as error:
        raise DataError(
            f"domain '{name}': the source '{source}' is no file or folder here and its split "
            f"'{split}' could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _dataset_rows(data: Any, place: str) -> Iterator[Row]:
    for number, columns in enumerate(data, start=1):
        yield Row(f"{place}, row {number}", columns)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
