"""Studies and selections that a report is made of, with hostile names and texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from duet_jax import cli, recall
from duet_jax import config as configs
from duet_jax.report import surrogate, write_report, write_selection
from duet_jax.report.page import render
from duet_jax.search import Scores
from duet_jax.search.diagnostics import Effects, LeftOut, Report
from duet_jax.study import Study

NAMES = ("plain", "</pre><script>alert(1)</script>", 'a$b$_c" onload="x', "<img src=https://example.org/x.png>")


def _study(folder: Path, told: int, *, names: tuple[str, ...] = NAMES, waiting: int = 1) -> Study:
    """A study of `told` rounds with feedback, then one that failed, then `waiting` ones."""
    config = configs.from_dict(
        {
            "name": "small",
            "budget": 100,
            "rounds": 12,
            "model": {"scratch": {}},
            "data": {"domains": [{"name": name, "source": "a.jsonl"} for name in names]},
            "training": {"learning_rate": 0.001},
            "task": {"kind": "response_loss", "source": "https://example.org/<b>.jsonl"},
        }
    )
    study = Study.create(folder, config)
    rng = np.random.default_rng(0)
    gaps = {2: 1e-6, 3: 0.0, 4: 1e-9}
    for number in range(told + 1 + waiting):
        shares = np.full(len(names), 1 / len(names)) if number == 0 else rng.dirichlet(np.ones(len(names)))
        study.new_trial(
            mixture={name: float(share) for name, share in zip(names, shares, strict=True)},
            counts={name: int(100 * share) for name, share in zip(names, shares, strict=True)},
            proposal={"mean": 0.1, "stderr": 0.2, "acquisition": None, "gap": gaps.get(number), "origin": "ucb"}
            if number
            else None,
            seeds={},
        )
        if number < told:
            rows = [{"trial": number, "step": step, "loss": 3 / step} for step in range(1, 6)]
            study.append_metrics([*rows, {"trial": number, "step": 6, "loss": math.nan}])
            training = {
                "loss": 1.25,
                "steps": 6,
                "tokens": 98765,
                "repeats": [f"{names[-1]} is repeated"],
                "truncated": 3,
                "validation_loss": dict.fromkeys(names, 2.5),
            }
            study.update(number, stage="trained", training=training)
            study.tell(number, float(shares[0]), 0.05 if number % 2 else None)
    study.fail(told, "<script>bad()</script>")
    return study


class Stand:
    """Stands in for the search where its numbers do not matter: the mean of the two nearest observations."""

    feedback = Scores()

    def __init__(self, **_: object):
        pass

    def init(self) -> list[tuple[np.ndarray, float]]:
        return []

    def tell(
        self,
        state: list[tuple[np.ndarray, float]],
        mixture: np.ndarray,
        value: float,
        stderr: float | None,
        **_: object,
    ) -> list[tuple[np.ndarray, float]]:
        return [*state, (mixture, value)]

    def predict(
        self, state: list[tuple[np.ndarray, float]], mixtures: np.ndarray, _: object
    ) -> tuple[np.ndarray, np.ndarray]:
        seen, values = np.array([m for m, _ in state]), np.array([v for _, v in state])
        distance = np.abs(mixtures[:, None] - seen).sum(-1)
        return values[distance.argmin(1)], distance.min(1) + 0.01


def stand_diagnose(_: object, state: list[tuple[np.ndarray, float]]) -> Report:
    """Stands in for the diagnosis: importances 0.5, 0.6 ... 0.9 in turn, and predictions that are off by 1, 2 ..."""
    size, values = len(state[0][0]), np.array([value for _, value in state])
    grid = np.tile(np.linspace(0, 1, 5), (size, 1))
    effects = Effects(grid, grid, 0.1 + 0 * grid, 0.5 + np.arange(size) % 5 / 10)
    error = np.arange(len(values)) + 1.0
    left_out = LeftOut(values, values - error, error, 0 * error + 1, np.array([0.0, 1.0, 1.0]), 0 * error - 1.25)
    return Report(
        np.ones(size), np.full(size, 1 / size), effects, left_out, noise=0.125, amplitude=0.75, shortfall=None
    )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> None:
    put_stand(monkeypatch)


def put_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "Search", Stand)
    monkeypatch.setattr(surrogate, "diagnose", stand_diagnose)
    monkeypatch.setattr(surrogate, "difference", stand_difference)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, str]:
    """A study of seven scores, the last of them of several tasks, and its page."""
    study = _study(tmp_path_factory.mktemp("seven") / "study", 6)
    study.tell(7, 0.01, details={"task_0": 0.125, "task_1": 0.875})
    study.append_metrics([{"trial": number, "step": 7, "loss": 1.0, "devices": 4} for number in range(6)])
    for number in range(6):
        study.update(number, training={**(study.trials()[number].training or {}), "seconds": 100.0})
    with pytest.MonkeyPatch.context() as patch:
        put_stand(patch)
        return study, render(study)


def stand_difference(search: Stand, state: list, one: np.ndarray, other: np.ndarray, _: object) -> tuple[float, float]:
    """Stands in for the posterior of a difference."""
    mean, _ = search.predict(state, np.stack([one, other]), None)
    return float(mean[0] - mean[1]), 0.25


HOSTILE = "</pre></details><script>alert(1)</script><img src=https://example.org/x.png onerror=alert(1)>{{ config }}"


def _selection(tmp_path: Path, *words: str, **more: Any) -> Path:
    """A selection of two domains, 30 and 20 examples, by utilities of a file: those of b are the higher ones."""
    names = {"a": 30, f"b {HOSTILE}": 20}
    domains, utilities = [], []
    for place, (name, count) in enumerate(names.items()):
        rows = [
            {"id": f"{place}-{i}", "prompt": f"{HOSTILE} {i}", "response": "long " * 10 * i}
            for i in range(1, count + 1)
        ]
        path = tmp_path / f"{place}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        domains.append({"name": name, "source": str(path)})
        utilities += [{"id": row["id"], "utility": i / 10 + place} for i, row in enumerate(rows)]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in utilities))
    tree = {
        "name": "pick",
        "count": 24,
        "pooled": True,
        "data": {"validation_fraction": 0, "domains": domains},
        "selector": {"kind": "utilities", "path": str(tmp_path / "u.jsonl"), "rule": "top_k"},
        **more,
    }
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(tree))
    folder = tmp_path / "out"
    assert cli.main(["select", str(tmp_path / "select.yaml"), *words, "--output", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def names() -> tuple[str, ...]:
    return NAMES


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def make_study() -> Callable[..., Study]:
    return _study


@pytest.fixture
def make_selection() -> Callable[..., Path]:
    return _selection


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a study of four domains, one of three, one that has just begun, and a selection."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "picked").mkdir()
    found = {"selection": write_selection(_selection(folder / "picked"))}
    with pytest.MonkeyPatch.context() as patch:
        put_stand(patch)
        for name, told, domains in (("four", 6, NAMES), ("three", 4, NAMES[:3]), ("begun", 0, NAMES)):
            found[name] = write_report(_study(folder / name, told, names=domains).folder)
    return found
