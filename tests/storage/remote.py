"""Studies in an object store: a small configuration, a store that is watched, and how tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from duet_jax import config as configs
from duet_jax.config import StudyConfig
from duet_jax.study import Study
from duet_jax.trial import Trial

HALVES = {"a": 0.5, "b": 0.5}


def make_config(**changes: Any) -> StudyConfig:
    domains = [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]
    values = {"name": "small", "budget": 16, "rounds": 3, "model": {"scratch": {}}, "data": {"domains": domains}}
    values |= {"training": {"learning_rate": 0.001}, "task": {"kind": "command", "command": ["true"]}}
    return configs.from_dict({**values, **changes})


class Watched:
    """An object store that does something before a write, as another process might."""

    def __init__(self, store: Any):
        self.store = store
        self.before: list[Callable[[], Any]] = []

    def put(self, *args: Any, **options: Any) -> Any:
        if self.before:
            self.before.pop()()
        return self.store.put(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def objects(store: Any) -> Any:
    from duet_jax.storage.objects import Objects

    return Objects(store, "s3://bucket/study")


def add(study: Study, worker: str | None = None) -> Trial:
    return study.new_trial(mixture=HALVES, counts={"a": 8, "b": 8}, proposal=None, seeds={}, worker=worker)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
