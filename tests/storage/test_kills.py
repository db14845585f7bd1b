"""Workers of a study on an S3 server that are killed at random; each name is a machine with a cache of its own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duet_jax import config as configs
from duet_jax.study import Study

ROUNDS, STEPS = 16, 5
CONFIG = {
    "name": "small",
    "budget": 16,
    "rounds": ROUNDS,
    "model": {"scratch": {}},
    "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
    "training": {"learning_rate": 0.001},
    "task": {"kind": "command", "command": ["true"]},
}


@pytest.mark.slow
def test_four_workers_that_are_killed_at_random_lose_nothing(
    s3: str, tmp_path: Path, kill_at_random: Callable[..., int]
) -> None:
    caches = tmp_path / "caches"
    # The client of this process would not work in a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["duet_jax.proposals", "duet_jax.storage.objects"])
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    config = configs.dump(configs.from_dict(CONFIG))

    def start(name: str) -> Any:
        names = {"ADDRESS": s3, "NAME": name, "CONFIG": config, "STEPS": STEPS}
        names["ENVIRONMENT"] = {**aws, "XDG_CACHE_HOME": str(caches / name)}
        worker = context.Process(
            target=runpy.run_path, args=(str(Path(__file__).with_name("work.py")), names), name=name
        )
        worker.start()
        return worker

    def logged() -> int:
        return sum(path.read_bytes().count(b"\n") for path in caches.glob("**/metrics*"))

    kills = kill_at_random(start, logged, 12)
    study = Study.open(s3)
    trials = study.trials()
    assert kills >= 6
    assert [trial.status for trial in trials] == ["completed"] * ROUNDS, "as many as there are rounds, all told"
    told = [trial.feedback["value"] for trial in trials if trial.feedback is not None]
    assert told == [trial.claim for trial in trials], "each under its last claim"
    assert sum(trial.claim > 1 for trial in trials) >= 2
    rows = study.metrics()
    assert {(row["trial"], row["step"]) for row in rows} == {(i, step) for i in range(ROUNDS) for step in range(STEPS)}
