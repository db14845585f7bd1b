"""A study whose trials people rate, and an application whose answers are not written by any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duet_jax import config as configs
from duet_jax.serve.engine import Busy, Closed
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study
from tests.serve.talk import ORIGIN

WALK = {"letters": 6, "length": 8, "examples": 200}


def _config(rounds: int = 4, task: dict[str, Any] | None = None, **people: Any) -> configs.StudyConfig:
    """Two domains, a tiny model, and people who rate it."""
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**WALK, "tags": tag}} for tag in "AB"]
    return configs.from_dict(
        {
            "name": "rated",
            "budget": 64,
            "rounds": rounds,
            "model": {"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
            "data": {"max_length": 24, "buckets": [24], "domains": domains},
            "training": {"learning_rate": 0.01, "batch_size": 8, "lora": {"rank": 2, "targets": ["q", "v"]}},
            "task": {"kind": "people", "max_new_tokens": 8, **(task or {}), "people": people},
        }
    )


class Parrot:
    """Answers at once with what it was told, in two parts. `open` trials, or none; `busy` as long as that is set."""

    def __init__(self, open: Sequence[int]) -> None:
        self.open = tuple(open)
        self.busy = self.silent = False
        self.tickets: list[SimpleNamespace] = []

    def answer(
        self, number: int, messages: Sequence[dict[str, str]], on_text: Callable[[str, bool], None]
    ) -> SimpleNamespace:
        if self.busy:
            raise Busy
        if number not in self.open:
            raise Closed
        ticket = SimpleNamespace(cancelled=False, failed=False, on_text=on_text)
        self.tickets.append(ticket)
        if not self.silent:
            on_text("You said ", False)
            on_text(messages[-1]["content"], True)
        return ticket

    def wake(self) -> None: ...


class House:
    """A study with some trained trials and its application, and clients that have come by one of its links."""

    def __init__(self, folder: Path, config: configs.StudyConfig, trials: int = 2, **options: Any) -> None:
        from duet_jax.serve.app import build

        self.study = Study.create(folder, config)
        for number in range(trials):
            share = (number + 1) / (trials + 1)
            self.study.new_trial(
                mixture={"A": share, "B": 1 - share}, counts={"A": 1, "B": 1}, proposal=None, seeds={}, stage="trained"
            )
        self.ratings, self.tokens = Ratings(folder), Tokens(folder)
        self.parrot = Parrot(range(trials))
        self.app = build(self.study, self.ratings, self.parrot, **options)

    def client(self, role: str | None = "tester") -> Any:
        from starlette.testclient import TestClient

        found = TestClient(self.app, raise_server_exceptions=False)
        if role is not None:
            path = "/owner" if role == "owner" else "/"
            assert found.get(path, params={"token": getattr(self.tokens, role)}).status_code == 200
            found.headers.update(ORIGIN)
        return found


@pytest.fixture(scope="session")
def people_config() -> Callable[..., configs.StudyConfig]:
    """Configurations of studies that people rate: `people_config(rounds, task, **people)`."""
    return _config


@pytest.fixture(scope="session")
def make_house() -> Callable[..., House]:
    """Makes a house in a folder; skips without the extra `serve`."""
    for package in ("starlette", "httpx"):
        pytest.importorskip(package, reason="the extra `serve` and httpx are not installed")
    return House


@pytest.fixture
def house(tmp_path: Path, make_house: Callable[..., House]) -> House:
    """Two trials that wait for ratings, and a parrot that answers for them."""
    return make_house(tmp_path / "study", _config())
