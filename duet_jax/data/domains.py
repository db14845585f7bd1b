"""Domains: named sets of prompt/response examples, mapped from rows and split for validation.

Three things decide which examples a domain has, and nothing else: its rows, the seed, and its own
name. Other domains may come and go without moving an example from training to validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from duet_jax.data import synthetic
from duet_jax.data.example import Example
from duet_jax.data.sources import Row, read_rows
from duet_jax.data.texts import ids_of, taken
from duet_jax.errors import DataError

if TYPE_CHECKING:
    from duet_jax.config import DomainConfig


@dataclass(frozen=True)
class Domain:
    """A named data set, split. `source` is where it came from, as the user wrote it."""

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    source: str


def load_domains(
    specs: Sequence[DomainConfig],
    *,
    validation_fraction: float,
    seed: int,
    validation_most: int | None = None,
    read: Callable[[DomainConfig], Sequence[Example]] | None = None,
) -> list[Domain]:
    """Loads every domain and splits each into training and validation examples.

    Args:
      specs: one configuration per domain; the names must differ.
      validation_fraction: share held out, in [0, 1). Where it is positive, a domain of two or more
        examples gets at least one validation and keeps at least one training example.
      seed: chooses the split and the subsample of `max_examples`.
      validation_most: at most so many examples of a domain are held out; the others stay training examples.
      read: see `load_examples`.

    Returns:
      Domains in the order of `specs`; within a part the examples keep the order of the source.

    Raises:
      DataError: duplicate names, or whatever `load_examples` raises.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"two domains are named '{repeated[0]}'; every domain needs its own name")
    domains = []
    for spec in specs:
        examples = load_examples(spec, seed=seed, read=read)
        held_out = _validation_count(len(examples), validation_fraction)
        if validation_most is not None:
            held_out = min(held_out, validation_most)
        chosen = np.zeros(len(examples), np.bool_)
        chosen[_lowest(examples, held_out, f"validation/{seed}/{spec.name}")] = True
        train, validation = (taken(examples, np.flatnonzero(part)) for part in (~chosen, chosen))
        domains.append(Domain(spec.name, train, validation, spec.source))
    return domains


def load_examples(
    spec: DomainConfig, *, seed: int = 0, read: Callable[[DomainConfig], Sequence[Example]] | None = None
) -> Sequence[Example]:
    """Loads the examples of one source, in its order, before any split.

    The columns `choices`, `answer_index`, `answers` and `meta` (with `answer` or `answers`) are read
    where they have the expected shape; all other columns are kept in `Example.meta`. A repeated id
    gets the suffix `#2`, `#3`, ... so that ids are unique.

    Args:
      spec: the domain's configuration. `max_examples` keeps that many examples, chosen by a hash
        of (seed, domain name, example id). Where `response` is None, no response is read, and every
        example's is "".
      seed: see above.
      read: gives all examples of the source, as `keeping` does those that are in a file; None: `read_examples`.

    Raises:
      DataError: the source is missing, empty or malformed; a row lacks a mapped column, has a value
        that is no string, or an empty response. The sentence names the file and the line.
    """
    examples = (read or read_examples)(spec)
    if spec.max_examples is not None:
        if spec.max_examples < 1:
            raise DataError(f"domain '{spec.name}': max_examples must be at least 1, not {spec.max_examples}")
        examples = taken(examples, np.sort(_lowest(examples, spec.max_examples, f"subsample/{seed}/{spec.name}")))
    return examples


def read_examples(spec: DomainConfig) -> Sequence[Example]:
    """All examples of one source, in memory; see `load_examples`."""
    return list(parsed(spec))


def parsed(spec: DomainConfig) -> Iterator[Example]:
    """All examples of one source, one after the other; see `load_examples`."""
    empty = True
    for example in _generated(spec) if spec.source.startswith("synthetic:") else _mapped(spec):
        empty = False
        yield example
    if empty:
        raise DataError(f"domain '{spec.name}' is empty: '{spec.source}' has no rows")


def _generated(spec: DomainConfig) -> Iterator[Example]:
    kind = spec.source.removeprefix("synthetic:")
    for example in synthetic.generate(kind, spec.name, spec.split, spec.options):
        yield replace(example, response="") if spec.response is None else example


def _mapped(spec: DomainConfig) -> Iterator[Example]:
    seen: dict[str, int] = {}
    for number, row in enumerate(read_rows(spec.source, split=spec.split, name=spec.name), start=1):
        yield _example(row, spec, _unique(row.columns.get("id"), f"{spec.name}/{number}", seen))


def _validation_count(count: int, fraction: float) -> int:
    if fraction == 0.0 or count < 2:
        return 0
    return min(max(1, round(fraction * count)), count - 1)


def _lowest(examples: Sequence[Example], count: int, salt: str) -> np.ndarray:
    """Numbers of the `count` examples whose salted hash of the id is lowest, int64."""
    if count >= len(examples):
        return np.arange(len(examples))
    hashes = (
        hashlib.blake2b(f"{salt}/{identifier}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for identifier in ids_of(examples)
    )
    found = np.fromiter((int.from_bytes(each, "big") for each in hashes), np.uint64, len(examples))
    return np.argsort(found, kind="stable")[:count]


def _unique(given: Any, otherwise: str, seen: dict[str, int]) -> str:
    identifier = str(given) if isinstance(given, (str, int)) and given != "" else otherwise
    seen[identifier] = seen.get(identifier, 0) + 1
    repeat = seen[identifier]
    return identifier if repeat == 1 else _unique(f"{identifier}#{repeat}", otherwise, seen)


def _example(row: Row, spec: DomainConfig, identifier: str) -> Example:
    place = f"domain '{spec.name}': {row.where}"
    columns = row.columns
    prompt: str | tuple[dict[str, str], ...]
    response = ""
    if spec.messages is not None:
        mapped = {spec.messages}
        messages = _messages(_column(columns, spec.messages, "messages", place), place)
        if spec.response is None:
            prompt = _turns(messages, "user", "to reply to", place)
        else:
            *turns, reply = _turns(messages, "assistant", "to learn from", place)
            prompt, response = tuple(turns), reply["content"]
    else:
        mapped = {spec.prompt}
        prompt = _text(_column(columns, spec.prompt, "prompt", place), spec.prompt, place)
        if spec.response is not None:
            mapped.add(spec.response)
            response = _text(_column(columns, spec.response, "response", place), spec.response, place)
    if spec.response is not None and not response.strip():
        raise DataError(f"{place} has an empty response; every example needs one")
    meta = {k: v for k, v in columns.items() if k not in mapped | {"id", "meta"}}
    if isinstance(columns.get("meta"), Mapping):
        meta |= columns["meta"]
    # Formats with a schema write null where JSON lines leave a field out; both mean that it is absent.
    meta = {k: v for k, v in meta.items() if v is not None}
    choices, answer_index = _choices(columns, place)
    return Example(
        id=identifier,
        prompt=prompt,
        response=response,
        choices=choices,
        answer_index=answer_index,
        answers=_answers(meta),
        meta=meta,
    )


def _column(columns: dict[str, Any], column: str, role: str, place: str) -> Any:
    if column not in columns:
        raise DataError(
            f"{place} has no column '{column}' (mapped as the {role}); its columns are "
            f"{', '.join(sorted(columns)) or 'none'}"
        )
    return columns[column]


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place} has a value of type {type(value).__name__} in the column '{column}', which must hold a string"
        )
    return _unicode(value, place)


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} holds half of a surrogate pair, which is no character") from None
    return text


def _messages(value: Any, place: str) -> list[Mapping[str, str]]:
    messages = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if messages is None or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise DataError(
            f"{place} has malformed messages; they must be a list of objects with the strings 'role' and 'content'"
        )
    return messages


def _turns(messages: list[Mapping[str, str]], last: str, purpose: str, place: str) -> tuple[dict[str, str], ...]:
    """A conversation up to the last message of one role; what comes after it is not used."""
    turns = [i for i, m in enumerate(messages) if m["role"] == last]
    if not turns:
        raise DataError(f"{place} has no message with the role '{last}' {purpose}")
    return tuple({"role": m["role"], "content": _unicode(m["content"], place)} for m in messages[: turns[-1] + 1])


def _choices(columns: dict[str, Any], place: str) -> tuple[tuple[str, ...], int | None]:
    choices, index = columns.get("choices"), columns.get("answer_index")
    if not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        return (), None
    if index is not None and not (isinstance(index, int) and 0 <= index < len(choices)):
        raise DataError(
            f"{place} has answer_index {index!r}, which must be an integer from 0 to "
            f"{len(choices) - 1} to point at one of its {len(choices)} choices"
        )
    return tuple(choices), index


def _answers(meta: Mapping[str, Any]) -> tuple[str, ...]:
    for key in ("answers", "answer"):
        value = meta.get(key)
        if isinstance(value, str) and value:
            return (value,)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return tuple(value)
    return ()
