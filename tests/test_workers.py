"""Workers that share a study: claims, what a dead one leaves, and four of them that are killed at random."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from duet_jax import config as configs
from duet_jax import duet, kept, leases, proposals, workers
from duet_jax.config import StudyConfig
from duet_jax.display import Display
from duet_jax.errors import StudyError
from duet_jax.study import Study, Trial

HALVES = {"a": 0.5, "b": 0.5}
ROUNDS, STEPS = 40, 8


def make_config(**changes: Any) -> StudyConfig:
    domains = [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]
    values = {"name": "small", "budget": 16, "rounds": ROUNDS, "model": {"scratch": {}}, "data": {"domains": domains}}
    values |= {"training": {"learning_rate": 0.001}, "task": {"kind": "command", "command": ["true"]}}
    return configs.from_dict({**values, **changes})


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "study", make_config())


def add(study: Study, worker: str | None = None) -> Trial:
    return study.new_trial(mixture=HALVES, counts={"a": 8, "b": 8}, proposal=None, seeds={}, worker=worker)


def refused(held: AbstractContextManager[Any], sentence: str) -> None:
    with pytest.raises(StudyError, match=sentence), held:
        pass


def test_a_study_is_shared_or_held_alone(study: Study) -> None:
    with workers.join(study, "one"), workers.join(study, "two"):
        here = f"process {os.getpid()} on "
        refused(workers.alone(study), f"Workers share .*, one is one \\({here}.*; join them with --worker NAME")
        refused(workers.join(study, "two"), f"study has a worker two \\({here}.* give this one another name")
    assert not list((study.folder / "workers").glob("*.json"))
    with workers.alone(study):
        refused(workers.join(study, "one"), f"A run holds .* alone \\({here}.* start it again with --worker")
    refused(workers.join(study, "../x"), "name is '../x'; it must be letters")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_is_gone_when_it_ended_died_or_is_silent(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    monkeypatch.setattr(workers, "SILENCE", 0.1)
    beat = study.folder / "workers" / "two.json"
    with workers.join(study, "one") as one:
        assert one.gone(None) and one.gone("one") and one.gone("never there")
        with workers.join(study, "two"):
            seen = beat.read_text()
            assert not one.gone("two")
            until(lambda: beat.read_text() != seen)
            time.sleep(0.2)
            assert not one.gone("two"), "its heart beats"
            monkeypatch.setattr(leases, "BEAT", 600.0)
            until(lambda: one.gone("two"))
            assert beat.exists(), "it holds its lock, but nothing is heard of it"
        assert one.gone("two")
        beat.write_text("{}")
        assert one.gone("two"), "nobody holds its lock"


def test_what_an_earlier_holder_reports_is_refused(study: Study) -> None:
    add(study, "one")
    late = study.trials()[0]
    assert (late.worker, late.claim) == ("one", 1) and study.holds(late)
    now = study.claim(late, "two")
    assert (now.worker, now.claim) == ("two", 2) and study.holds(now) and not study.holds(late)
    for report in (
        lambda: study.tell(late, 1.0),
        lambda: study.update(late, stage="trained"),
        lambda: study.abandon(late, "not finite"),
        lambda: study.claim(late, "one"),
    ):
        with pytest.raises(StudyError, match="Trial 0 of .* was taken over by two"):
            report()
    assert study.trials() == [now]
    assert study.tell(now, 2.0).feedback["value"] == 2.0  # type: ignore[index]


def test_a_claim_inherits_checkpoints_that_the_earlier_holder_cannot_touch(study: Study) -> None:
    first = claimed = add(study)
    for number, worker in enumerate((None, "one", None), 1):
        (kept.checkpoints(study, claimed) / str(number)).mkdir(parents=True)
        claimed = study.claim(claimed, worker)
        kept.inherit(study, claimed)
        assert sorted(path.name for path in kept.checkpoints(study, claimed).iterdir()) == list("123"[:number])
    (kept.checkpoints(study, first) / "late").mkdir(parents=True)
    assert not (kept.checkpoints(study, claimed) / "late").exists()
    again = study.claim(claimed, "one")
    kept.inherit(study, again)
    assert (kept.checkpoints(study, again) / "3").exists(), "the newest is inherited"
    kept.forget(study, [again], again.trial)
    assert kept.checkpoints(study, again).exists()
    kept.forget(study, [study.tell(again, 1.0)], None)
    assert kept.checkpoints(study, again).exists(), "it was told from outside while somebody trains it"
    kept.forget(study, [study.update(again, training={"loss": 1.0})], None)
    assert not list((study.folder / "checkpoints").iterdir())


def test_a_run_alone_claims_only_what_workers_had(study: Study) -> None:
    add(study)
    with Display(1, quiet=True) as display:
        own = proposals.next_trial(study, None, None, display)  # type: ignore[arg-type]
        assert own is not None and own.claim == 0
        study.claim(own, "one")
        taken = proposals.next_trial(study, None, None, display)  # type: ignore[arg-type]
    assert taken is not None and (taken.worker, taken.claim) == (None, 2)


def stub(study: Study, search: Any, trials: list[Trial]) -> dict[str, Any]:
    return {"mixture": HALVES, "counts": {"a": 8, "b": 8}, "settings": {}, "proposal": None, "seeds": {}}


def test_a_proposal_that_others_overtake_is_made_anew(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def propose(study: Study, search: Any, trials: list[Trial]) -> dict[str, Any]:
        seen.append((len(trials), sum(trial.feedback is not None for trial in trials)))
        if len(seen) == 1:
            add(study, "other")
        if len(seen) == 2:
            study.tell(0, 1.0)
        if len(seen) == 3:
            add(study, "other")
            study.update(1, stage="trained")
        return stub(study, search, trials)

    monkeypatch.setattr(proposals, "_propose", propose)
    trial = proposals.new_trial(study, None, "asked")  # type: ignore[arg-type]
    assert trial is not None and trial.trial == 2
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 1)]
    study.update(1, stage="proposed")
    monkeypatch.setattr(proposals, "_propose", stub)
    small = Study.open(study.folder, make_config(rounds=3))
    assert proposals.new_trial(small, None, "proposed") is None  # type: ignore[arg-type]


def test_a_trial_that_is_not_listed_yet_is_not_overwritten(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file system may list a folder as it was."""
    monkeypatch.setattr(proposals, "_propose", stub)
    monkeypatch.setattr(proposals, "PAUSE", 0.01)
    first, real, listed = add(study, "other"), Study.trials, [0, 0, 0]

    def late(study: Study) -> list[Trial]:
        return real(study)[: listed.pop(0) if listed else None]

    monkeypatch.setattr(Study, "trials", late)
    trial = proposals.new_trial(study, None, "asked")  # type: ignore[arg-type]
    assert trial is not None and trial.trial == 1
    assert real(study) == [first, trial] and not list((study.folder / "trials").glob(".*"))


def test_a_file_system_without_links(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    refusal = errno.EPERM
    made = add(study)
    refusal = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        add(study)
    assert study.trials() == [made] and not list((study.folder / "trials").glob(".*"))


def test_each_worker_has_metrics_of_its_own(study: Study) -> None:
    study.append_metrics([{"trial": 0, "step": 1, "worker": "one", "claim": 1, "loss": 1.0}])
    study.append_metrics([{"trial": 0, "step": 1, "worker": "a", "claim": 2, "loss": 2.0}])
    study.append_metrics([{"trial": 0, "step": 2, "worker": "one", "claim": 1, "loss": 3.0}])
    study.append_metrics([{"trial": 1, "step": 1, "loss": 4.0}])
    assert [row["loss"] for row in study.metrics()] == [2.0, 3.0, 4.0]
    assert {path.name for path in study.folder.glob("metrics*")} == {
        "metrics.jsonl",
        "metrics.a.jsonl",
        "metrics.one.jsonl",
    }


def work(folder: Path, name: str) -> None:
    """A worker whose training counts steps in files and whose feedback is the trial's number."""
    study = Study.begin(folder, make_config())
    with workers.join(study, name) as me, Display(ROUNDS, quiet=True) as display:
        while (trial := proposals.next_trial(study, None, me, display)) is not None:  # type: ignore[arg-type]
            checkpoints = kept.checkpoints(study, trial)
            checkpoints.mkdir(parents=True, exist_ok=True)
            for step in range(len(list(checkpoints.iterdir())), STEPS):
                study.append_metrics([{"trial": trial.trial, "step": step, "worker": name, "claim": trial.claim}])
                (checkpoints / str(step)).touch()
                time.sleep(0.004)
            trial = study.update(trial, stage="trained", training={"loss": 1.0})
            time.sleep(0.004)
            study.tell(trial, float(trial.trial))
            kept.forget(study, study.completed(), None)


def test_four_workers_that_are_killed_at_random_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at_random: Callable[..., int]
) -> None:
    monkeypatch.setattr(proposals, "_propose", stub)
    monkeypatch.setattr(proposals, "PAUSE", 0.02)
    monkeypatch.setattr(proposals, "LONG_PAUSE", 0.02)
    folder, context = tmp_path / "study", multiprocessing.get_context("fork")

    def start(name: str) -> Any:
        worker = context.Process(target=work, args=(folder, name), name=name)
        worker.start()
        return worker

    def logged() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("metrics*"))

    kills = kill_at_random(start, logged, 15)
    study = Study.open(folder)
    trials = study.trials()
    assert kills >= 15
    assert [trial.status for trial in trials] == ["completed"] * ROUNDS, "as many as there are rounds, all told"
    assert [trial.feedback["value"] for trial in trials] == list(map(float, range(ROUNDS)))  # type: ignore[index]
    assert sum(trial.claim > 1 for trial in trials) >= 5
    rows = study.metrics()
    assert {(row["trial"], row["step"]) for row in rows} == {(i, step) for i in range(ROUNDS) for step in range(STEPS)}
    assert logged() <= ROUNDS * STEPS + kills, "no step that was kept is taken again"


def test_workers_begin_a_study_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=Study.begin, args=(tmp_path / "s", make_config())) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    with pytest.raises(StudyError, match="these fields differ: budget"):
        Study.begin(tmp_path / "s", make_config(budget=17))


WALK = {"letters": 6, "length": 8, "examples": 300}


@pytest.mark.slow
def test_a_worker_goes_on_with_what_a_killed_one_trained(tmp_path: Path) -> None:
    domain = {"source": "synthetic:walk", "options": WALK}
    config = make_config(
        rounds=3,
        budget=96,
        model={"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        data={"max_length": 16, "buckets": [16], "domains": [{**domain, "name": "a"}, {**domain, "name": "b"}]},
        training={"method": "full", "learning_rate": 0.01, "batch_size": 8, "checkpoint_every": 2},
        task={"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "examples": 32}},
        search={"initial": 3},
    )
    path, folder = tmp_path / "small.yaml", tmp_path / "study"
    path.write_text(configs.dump(config))
    command = [sys.executable, "-m", "duet_jax.cli", "run", str(path), "--study", str(folder), "--worker", "one"]
    log = folder / "metrics.one.jsonl"
    with subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as first:
        while first.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 6):
            time.sleep(0.002)
        first.kill()
    assert log.read_bytes().count(b"\n") < 12, "it was killed within its first training"
    left = shutil.copytree(folder, tmp_path / "left")
    result = duet.run(config, folder, quiet=True, worker="two")
    trials = Study.open(folder).trials()
    assert [(trial.status, trial.worker, trial.claim) for trial in trials] == [
        ("completed", "two", 2),
        ("completed", "two", 1),
        ("completed", "two", 1),
    ]
    rows = [json.loads(line) for line in (folder / "metrics.two.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in rows if row["trial"] == 0) > 1, "it went on from a checkpoint"
    assert result.trial is not None and (folder / "best_model" / "model.safetensors").is_file()
    # A run alone that finds the same goes on as well, to the same bits.
    duet.run(config, left, quiet=True)
    again = Study.open(left).trials()
    assert [trial.feedback for trial in again] == [trial.feedback for trial in trials]
    assert (again[0].worker, again[0].claim) == (None, 2)
