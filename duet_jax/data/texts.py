"""Examples in an Arrow file: each is made when it is asked for, so that none stays in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from duet_jax.data.arrow import NAME, Column, Names, encoded, open_file, write_file
from duet_jax.data.example import Example

# Examples of a batch of the file.
TOGETHER = 1024
SCHEMA = pa.schema([("id", NAME), ("example", pa.large_binary())])


class NotPlain(Exception):
    """An example has something, as a date, that JSON would not give back as it is."""


class Texts(Column):
    """Some of the examples of a file that `write_texts` has written, in any order."""

    def __init__(self, file: pa.ipc.RecordBatchFileReader, rows: np.ndarray | None = None):
        table = file.read_all()
        super().__init__(table["example"], rows)
        self._file = file
        self.ids = Names(table["id"], rows)

    @classmethod
    def open(cls, path: Path, key: str) -> Texts | None:
        """All examples of a file; None if there is none of this key."""
        file = open_file(path, key)
        return None if file is None else cls(file)

    @property
    def digest(self) -> str:
        """Tells these examples from all others, hexadecimal."""
        last = self._file.get_batch_with_custom_metadata(self._file.num_record_batches - 1)
        rows = b"all" if self._rows is None else self._rows.tobytes()
        return hashlib.sha256(last.custom_metadata[b"digest"] + rows).hexdigest()

    def take(self, rows: Any) -> Texts:
        """See `Column`."""
        chosen = np.asarray(rows, np.int64)
        return Texts(self._file, chosen if self._rows is None else self._rows[chosen])

    def _read(self, value: bytes) -> Example:
        name, prompt, response, choices, index, answers, meta = json.loads(value)
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        return Example(name, prompt, response, tuple(choices), index, tuple(answers), meta)


def write_texts(path: Path, key: str, examples: Iterable[Example]) -> None:
    """Writes examples, of which there is at least one.

    Raises:
      NotPlain: they cannot be kept so.
    """
    write_file(path, key, SCHEMA, _batches(iter(examples)))


def _batches(examples: Iterator[Example]) -> Iterator[tuple[pa.RecordBatch, dict[str, str]]]:
    digest = hashlib.sha256()
    while some := list(islice(examples, TOGETHER)):
        lines = [_line(example) for example in some]
        for line in lines:
            digest.update(line + b"\n")
        columns = [encoded(example.id for example in some), pa.array(lines, pa.large_binary())]
        yield pa.record_batch(columns, schema=SCHEMA), {"digest": digest.hexdigest()}


def _line(example: Example) -> bytes:
    meta = dict(example.meta)
    if not _is_plain(meta):
        raise NotPlain(example.id)
    fields = example.id, example.prompt, example.response, example.choices, example.answer_index, example.answers, meta
    return json.dumps(fields).encode()


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(name) is str and _is_plain(each) for name, each in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def ids_of(examples: Sequence[Example]) -> Iterable[str]:
    """The examples' ids, in their order, which of a file are read alone."""
    return examples.ids if isinstance(examples, Texts) else (example.id for example in examples)


def taken(examples: Sequence[Example], rows: np.ndarray) -> Sequence[Example]:
    """Examples by their numbers; those of a file stay there."""
    return examples.take(rows) if isinstance(examples, Texts) else tuple(examples[row] for row in rows)
