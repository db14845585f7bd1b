"""Examples as token ids in files of a folder, each of as many examples, mapped into memory when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from duet_jax.data.arrow import NAME, Names, encoded, open_file, write_file
from duet_jax.data.example import Example
from duet_jax.data.rows import Rows
from duet_jax.data.texts import Texts
from duet_jax.data.tokenised import TOGETHER, Encoded, TokenizerLike, encoded_parts, join

# Examples of a file.
PART = 16 * TOGETHER
# Of what is kept; another one is for another way to encode.
VERSION = 1
SCHEMA = pa.schema([("id", NAME), ("tokens", pa.large_list(pa.int32())), ("prompt", pa.int32()), ("cut", pa.bool_())])


class KnownTokenizer(TokenizerLike, Protocol):
    """A tokenizer that can be told from all others."""

    @property
    def identity(self) -> str: ...


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """The files of some examples.

    Attributes:
      folder: of files of any examples.
      name: of the domain, for messages.
      examples, tokenizer, chat, max_length: see `encode`.
    """

    folder: Path
    name: str
    examples: Sequence[Example]
    tokenizer: KnownTokenizer
    chat: bool
    max_length: int

    @cached_property
    def key(self) -> str:
        """Hash of all that decides the tokens, hexadecimal."""
        decides = [VERSION, PART, _digest(self.examples), self.tokenizer.identity, self.chat, self.max_length]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def numbers(self) -> range:
        """Of the files."""
        return range(-(-len(self.examples) // PART))

    def path(self, number: int) -> Path:
        """Of a file."""
        return self.folder / f"tokens-{self.key[:32]}-{number:05d}.arrow"

    def has(self, number: int) -> bool:
        """Whether a file is there, as a whole."""
        return open_file(self.path(number), self.key) is not None

    def write(self, number: int) -> None:
        """Tokenises the examples of a file, if it is not there.

        Raises:
          DataError: an example has no response.
        """
        if self.has(number):
            return
        some, chat, most = self.examples[number * PART : (number + 1) * PART], self.chat, self.max_length
        found = join(list(encoded_parts(some, self.tokenizer, chat=chat, max_length=most, name=self.name)))
        ends = np.cumsum(found.lengths, dtype=np.int64)
        flat = np.concatenate([np.zeros(0, np.int32), *found.tokens])
        tokens = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(flat))
        columns = [encoded(found.ids), tokens, pa.array(found.prompt_lengths), pa.array(np.asarray(found.cut))]
        write_file(self.path(number), self.key, SCHEMA, [(pa.record_batch(columns, schema=SCHEMA), {})])

    def read(self) -> Encoded:
        """All of them.

        Raises:
          FileNotFoundError: a file is not there.
        """
        return join([self._read(number) for number in self.numbers])

    def _read(self, number: int) -> Encoded:
        file = open_file(self.path(number), self.key)
        if file is None:
            raise FileNotFoundError(str(self.path(number)))
        batch = file.get_batch(0)
        tokens, count = batch["tokens"], len(self.examples[number * PART : (number + 1) * PART])
        lengths = np.diff(tokens.offsets.to_numpy()).astype(np.int32)
        return Encoded(
            Rows.filling([tokens.values.to_numpy()], lengths),
            batch["prompt"].to_numpy(),
            Names(pa.chunked_array([batch["id"]])),
            batch["cut"].to_numpy(zero_copy_only=False),
            count - batch.num_rows,
        )


def _digest(examples: Sequence[Example]) -> str:
    if isinstance(examples, Texts):
        return examples.digest
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.prompt, example.response]).encode() + b"\n")
    return digest.hexdigest()
