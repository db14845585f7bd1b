"""Rewards that are computed once: kept by content in a file, and once for what a batch repeats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards.reward import Reward

# SQLite waits so long for another process that is writing.
_WAIT_SECONDS = 60
# Keys of one query; older builds of SQLite take at most 999.
_QUERY = 500


def everything(example: Example) -> Any:
    """All that a reward could read of an example."""
    return dataclasses.asdict(example)


def content(example: Example) -> Any:
    """An example without its id: what a reward can read that knows texts only."""
    return {name: value for name, value in everything(example).items() if name != "id"}


def cached(reward: Reward, folder: Path | None, *, reads: Callable[[Example], Any] = content, part: int = 64) -> Reward:
    """The same reward, which computes no value twice.

    Values are kept under a hash of the reply and of what the reward reads of the example, in one SQLite file for each
    `identity`; several processes may use it at once. Replies are judged in parts, and each part is written before the
    next begins: a killed process loses one part.

    Args:
      reward: what to compute; values that it refuses are not kept.
      folder: where the file lies; None: values are only shared within a batch.
      reads: what the values depend on besides the reply, as plain values.
      part: replies in a part.

    Raises:
      FeedbackError: on use, where the file cannot be read or written.
    """

    def function(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        keys = [_key(reply, reads(example)) for reply, example in zip(replies, examples, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        known = {} if folder is None else _read(_path(folder, reward), sorted(first))
        new = sorted(i for key, i in first.items() if key not in known)
        for start in range(0, len(new), part):
            rows = new[start : start + part]
            values = reward([replies[i] for i in rows], [examples[i] for i in rows]).tolist()
            found = {keys[i]: value for i, value in zip(rows, values, strict=True)}
            if folder is not None:
                _write(_path(folder, reward), found)
            known.update(found)
        return [known[key] for key in keys]

    return dataclasses.replace(reward, function=function)


def _key(reply: str, read: Any) -> bytes:
    text = json.dumps([reply, read], sort_keys=True, default=as_json)
    return hashlib.sha256(text.encode()).digest()


def as_json(value: Any) -> Any:
    """What JSON cannot write: arrays, whose text would be abridged, as lists; others, such as dates, as text."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _path(folder: Path, reward: Reward) -> Path:
    return folder / f"{hashlib.sha256(reward.identity.encode()).hexdigest()[:32]}.sqlite"


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction, which is written when it ends and undone where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_WAIT_SECONDS)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS reward (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
            )
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise FeedbackError(
            f"The cache of rewards {path} cannot be used ({error}); delete this file, or make its folder writable."
        ) from error


def _read(path: Path, keys: Sequence[bytes]) -> dict[bytes, float]:
    known: dict[bytes, float] = {}
    with _open(path) as connection:
        for start in range(0, len(keys), _QUERY):
            some = keys[start : start + _QUERY]
            marks = ", ".join("?" * len(some))
            known.update(connection.execute(f"SELECT key, value FROM reward WHERE key IN ({marks})", some).fetchall())
    return known


def _write(path: Path, values: Mapping[bytes, float]) -> None:
    with _open(path) as connection:
        connection.executemany("INSERT OR REPLACE INTO reward VALUES (?, ?)", values.items())
