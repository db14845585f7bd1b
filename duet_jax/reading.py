"""What a job reads, kept in its folder: examples are parsed once, and tokenised by all processes, each its share.

Where the processes share the folder, the first one parses, and each writes files of tokens that all read. Elsewhere
each host makes them for itself, of its processes one. What is there stays for later runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import filelock
import jax
import numpy as np

from duet_jax.config import DataConfig, DomainConfig
from duet_jax.data import Domain, Encoded, Example, encode, load_domains
from duet_jax.data.keeping import keep, kept
from duet_jax.data.texts import ids_of
from duet_jax.data.token_files import KnownTokenizer, TokenFiles
from duet_jax.distributed.processes import agree, lead, several, shared
from duet_jax.errors import StudyError

# Seconds for which a network's file system may not show a file to one host that another has written.
LATE = 90.0

Value = TypeVar("Value")


def load_all(config: DataConfig, seed: int, folder: Path | None = None) -> list[Domain]:
    """Reads and splits all domains.

    Args:
      config: which.
      seed: of splits and subsamples.
      folder: where their examples are kept; None: in memory.

    Raises:
      DataError: as `load_domains`.
    """
    together = folder is not None and shared(folder)

    def read(spec: DomainConfig) -> Sequence[Example]:
        assert folder is not None
        if together:
            return kept(spec, lead(keep, spec, folder))
        return kept(spec, _each(lambda: keep(spec, folder), f"read the domain '{spec.name}'"))

    fraction = config.validation_fraction
    return load_domains(config.domains, validation_fraction=fraction, seed=seed, read=None if folder is None else read)


def encode_all(
    named: Sequence[tuple[str, Sequence[Example]]],
    tokenizer: KnownTokenizer,
    *,
    chat: bool,
    max_length: int,
    folder: Path | None,
) -> tuple[Encoded, ...]:
    """Tokenises several sets of examples, see `data.encode`; for all processes to call.

    Args:
      named: the sets, each with its name for messages.
      tokenizer, chat, max_length: see `data.encode`.
      folder: where tokens are kept; None: in memory.

    Raises:
      DataError: as `data.encode`; on another process it is a StudyError that says which one it was.
    """
    if folder is None:
        return tuple(encode(part, tokenizer, chat=chat, max_length=max_length, name=name) for name, part in named)
    files = [TokenFiles(folder, name, examples, tokenizer, chat, max_length) for name, examples in named]
    together = shared(folder)

    def missing() -> list[tuple[int, int]]:
        return [(i, number) for i, one in enumerate(files) for number in one.numbers if not one.has(number)]

    shares = several() and together
    own = lead(missing) if together else missing()
    if shares:
        count, process = jax.process_count(), jax.process_index()
        own = own[len(own) * process // count : len(own) * (process + 1) // count]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Of processes that would write the same files one does, and the others find them there.
        with nullcontext() if shares or not own else filelock.FileLock(folder / "tokens.lock"):
            for i, number in own:
                files[i].write(number)

    _each(write, "tokenise its share of the examples")
    found = _each(lambda: tuple(map(_read, files)), "read the tokens of all examples")
    for (name, examples), tokens in zip(named, found, strict=True):
        if len(examples) and not len(tokens):
            # It says so.
            encode(examples, tokenizer, chat=chat, max_length=max_length, name=name)
    return found


def rows_left(examples: Sequence[Example], encoded: Encoded) -> np.ndarray:
    """Numbers of the examples that were not left out because of their length, int64 `[len(encoded)]`."""
    if len(encoded) == len(examples):
        return np.arange(len(examples))
    numbered = enumerate(ids_of(examples))
    found = (next(row for row, identifier in numbered if identifier == wanted) for wanted in encoded.ids)
    return np.fromiter(found, np.int64, len(encoded))


def describe(domain: Domain, encoded: Encoded, max_length: int) -> str:
    """How many examples of a domain there are, in words."""
    line = f"{domain.name}: {len(encoded)} training and {len(domain.validation)} validation examples"
    if encoded.truncated or encoded.dropped:
        line += (
            f"; at {max_length} tokens {encoded.truncated} are cut short and {encoded.dropped} left out, "
            f"whose prompt alone is longer"
        )
    return line


def _read(files: TokenFiles) -> Encoded:
    began = time.monotonic()
    while True:
        try:
            return files.read()
        except FileNotFoundError as error:
            if time.monotonic() - began > LATE:
                raise StudyError(f"{error} is not seen by all processes of this run.") from None
        time.sleep(0.2)


def _each(run: Callable[[], Value], what: str) -> Value:
    """What all processes do, each for itself: an error of one of them ends all."""
    error, found = None, []
    try:
        found.append(run())
    except Exception as raised:  # Told to all, and raised.
        error = raised
    agree(error, what)
    return found[0]
