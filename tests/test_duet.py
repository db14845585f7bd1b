"""The loop: whole studies on a small model, killed, resumed, told from outside, and never compiling anew."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
import types
import weakref
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import duet, loading, reading, workers
from duet_jax.display import Display
from duet_jax.errors import ConfigError, DataError, FeedbackError, ModelError, StudyError
from duet_jax.study import Study
from duet_jax.types import Feedback

WALK = {"letters": 6, "length": 8, "examples": 300}


def settings(**changes) -> configs.StudyConfig:
    values = {
        "name": "small",
        "budget": 96,
        "rounds": 5,
        "model": {"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        "data": {
            "max_length": 16,
            "buckets": [16],
            "domains": [
                {"name": "a", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}},
                {"name": "b", "source": "synthetic:walk", "options": {**WALK, "tags": "B"}},
                {"name": "noise", "source": "synthetic:walk", "options": {**WALK, "noise": 1.0}},
            ],
        },
        "training": {"method": "full", "learning_rate": 0.01, "batch_size": 8, "checkpoint_every": 4},
        "task": {
            "kind": "response_loss",
            "source": "synthetic:walk",
            "options": {**WALK, "tags": "AB", "examples": 32},
        },
    }
    return configs.from_dict({**values, **changes})


def facts(folder: Path) -> list[dict]:
    """What must not depend on when a run was killed."""
    return [
        {
            "mixture": trial.mixture,
            "counts": trial.counts,
            "seeds": trial.seeds,
            "proposal": trial.proposal,
            "feedback": trial.feedback,
            "loss": trial.training["loss"],
            "validation": trial.training["validation_loss"],
        }
        for trial in Study.open(folder).trials()
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, duet.Result]:
    folder = tmp_path_factory.mktemp("studies") / "straight"
    return folder, duet.run(settings(), folder, quiet=True)


def test_a_study_runs_to_its_last_round(straight):
    folder, result = straight
    trials = Study.open(folder).trials()
    assert [trial.status for trial in trials] == ["completed"] * 5
    for trial in trials:
        assert sum(trial.counts.values()) == 96
        assert sum(trial.mixture.values()) == pytest.approx(1.0, abs=1e-12)
        assert trial.training["steps"] == 12
        assert trial.training["truncated"] == 0
        assert trial.feedback["value"] < 0 and trial.feedback["stderr"] > 0
    assert [trial.proposal["origin"] for trial in trials] == ["initial"] * 3 + ["ucb"] * 2
    np.testing.assert_allclose(list(trials[0].mixture.values()), 1 / 3)
    assert result.trial is not None and result.mixture == trials[result.trial].mixture
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"{result.trial:04d}"}
    assert len(Study.open(folder).metrics()) == 5 * 12


def test_every_step_says_how_fast_it_was(straight):
    folder, _ = straight
    for trial in Study.open(folder).trials():
        rows = [row for row in Study.open(folder).metrics() if row["trial"] == trial.trial]
        assert sum(row["tokens"] for row in rows) == trial.training["tokens"]
        assert sum(row["step_seconds"] for row in rows) == pytest.approx(rows[-1]["seconds"])
        for row in rows:
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
            rate = row["flops"] / row["step_seconds"]
            assert row["devices"] == 1 and row["mfu"] == pytest.approx(rate / row["peak_flops"])
            # Six operations a token and parameter of a matrix, and attention: 32 x 32 four times, 32 x 48 three times.
            assert row["flops"] > 6 * row["tokens"] * (4 * 32 * 32 + 3 * 32 * 48)
            assert row["memory"] > 0 and row["peak"].startswith("measured on ")
        compilations = [row["compilations"] for row in rows]
        assert (compilations[0] > 0 or trial.trial > 0) and sum(compilations[1:]) == 0


def test_the_best_model_is_exported_and_loads(straight):
    from duet_jax import models
    from duet_jax.feedback import Deployed, Engine
    from duet_jax.job import prepare

    folder, result = straight
    exported = models.load(str(folder / "best_model"))
    job = prepare(settings(), folder, lambda line: None)
    engine = Engine(dataclasses.replace(job.model, tokenizer=exported.tokenizer), False, (16,))
    again = job.task(Deployed(engine, exported.params))
    told = Study.open(folder).trials()[result.trial].feedback["value"]
    assert again.value == pytest.approx(told, abs=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_texts_are_given_up_once_they_are_tokens(straight, tmp_path, monkeypatch, method):
    from duet_jax import job as jobs

    domains = []

    def load_all(*given):
        found = reading.load_all(*given)
        domains.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(jobs, "load_all", load_all)
    config = settings(
        model={"source": str(straight[0] / "best_model")}, training={"method": method, "learning_rate": 0.01}
    )
    job = jobs.prepare(config, tmp_path, lambda line: None)
    gc.collect()
    assert len(job.data) == 810 and [domain() for domain in domains] == [None] * 3


def test_a_finished_study_trains_nothing_and_more_rounds_go_on(straight, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(straight[0], folder)
    before = facts(folder)
    duet.run(settings(), folder, quiet=True)
    assert facts(folder) == before
    duet.run(settings(rounds=6), folder, quiet=True)
    assert facts(folder)[:5] == before
    assert len(facts(folder)) == 6


def run_and_kill(config: Path, folder: Path, when) -> bool:
    """Runs a study in a process and kills it as soon as `when()`; False if it ended before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "duet_jax.cli", "run", str(config), "--study", str(folder), "--quiet"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        while process.poll() is None:
            if when():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.returncode == 0
    return False


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(straight, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(configs.dump(settings()))
    folder = tmp_path / "killed"

    def steps() -> int:
        path = folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def told() -> int:
        return sum("completed" in p.read_text() for p in (folder / "trials").glob("0*.json"))

    # Before anything, within a round after a checkpoint, between training and feedback, between rounds.
    moments = [
        lambda: (folder / "config.yaml").exists(),
        lambda: steps() >= 6,
        lambda: any('"stage": "trained"' in p.read_text() for p in (folder / "trials").glob("0*.json")),
        lambda: told() >= 2,
        lambda: steps() >= 3 * 12 + 9,
    ]
    kills = sum(run_and_kill(config, folder, moment) for moment in moments)
    assert kills >= 4
    assert not run_and_kill(config, folder, lambda: False)
    assert facts(folder) == facts(straight[0])


def test_later_rounds_compile_nothing(tmp_path):
    events: list[str] = []

    def listen(name: str, seconds: float, **kwargs) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    marks = []
    original = duet.advance

    def advance(*args):
        original(*args)
        marks.append(len(events))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duet, "advance", advance)
            duet.run(settings(rounds=9, budget=101), tmp_path / "s", quiet=True)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert events and len(marks) == 9
    # The first proposal of the surrogate comes in the fourth round.
    assert marks[4] == marks[8], f"compilations after each round: {marks}"


def test_feedback_from_outside_comes_late_out_of_order_or_never(tmp_path):
    folder, config = tmp_path / "s", settings(task={"kind": "external"}, rounds=4)
    for count in (1, 2, 3):
        result = duet.run(config, folder, quiet=True)
        assert result.waiting == tuple(range(count))
        assert (folder / "exports" / f"{count - 1:04d}" / "model.safetensors").is_file()
    mixtures = [tuple(trial.mixture.values()) for trial in Study.open(folder).trials()]
    assert len(set(mixtures)) == 3, "open trials are taken into account"
    study = Study.open(folder)
    study.tell(2, -1.0)
    study.tell(0, -2.0, 0.1)
    result = duet.run(config, folder, quiet=True)
    assert result.waiting == (1, 3)
    assert result.trial == 2
    assert Study.open(folder).trials()[3].proposal["origin"] == "ucb"
    assert not (folder / "exports" / "0000").exists()
    duet.run(config, folder, quiet=True)
    assert len(Study.open(folder).trials()) == 4


def test_ask_and_tell_without_training(tmp_path):
    folder = tmp_path / "s"
    Study.create(folder, settings(task={"kind": "external"}, rounds=4))
    target = np.array([0.6, 0.4, 0.0])
    for _ in range(8):
        trial = duet.ask(folder)
        mixture = np.array(list(trial.mixture.values()))
        Study.open(folder).tell(trial.trial, -float(((mixture - target) ** 2).sum()))
    open_ = [duet.ask(folder) for _ in range(2)]
    assert open_[0].mixture != open_[1].mixture
    result = duet.best(Study.open(folder), duet.make_search(settings()))
    assert abs(np.array(list(result.mixture.values())) - target).max() < 0.15


def test_a_diverged_training_is_abandoned_and_the_study_goes_on(tmp_path):
    wild = {"method": "full", "learning_rate": 1e30, "batch_size": 8}
    with pytest.raises(StudyError, match="last 3 trials"):
        duet.run(settings(training=wild), tmp_path / "s", quiet=True)
    trials = Study.open(tmp_path / "s").trials()
    assert [trial.status for trial in trials] == ["abandoned"] * 3


@pytest.mark.parametrize("close", [None, Study.fail, Study.abandon])
def test_a_trial_that_is_closed_while_it_is_evaluated_is_left(close, tmp_path, monkeypatch, capsys):
    study = Study.create(tmp_path / "s", settings())
    shares, counts = {"a": 0.5, "b": 0.5, "noise": 0.0}, {"a": 48, "b": 48, "noise": 0}
    trial = study.new_trial(mixture=shares, counts=counts, proposal=None, seeds={"feedback": 1})
    logged = []

    def train(job, study, trial, on_step):
        return study.update(trial, stage="trained", training={"loss": 1.0, "steps": 12}), None

    def task(model):
        if close is not None:
            close(study, 0, "no power")
        return Feedback(0.5)

    monkeypatch.setattr(duet, "train", train)
    monkeypatch.setattr(duet, "best", lambda study, search: duet.Result(shares, 0.5, 0.1, 0))
    job = types.SimpleNamespace(task=task, coarse=lambda feedback, seed: feedback, config=study.config, search=None)
    tracking = types.SimpleNamespace(trial=lambda trial: nullcontext(lambda *values: logged.append(values)))
    with Display(1) as display:
        watch = types.SimpleNamespace(display=display, tracking=tracking, steps=lambda trial, log: None)
        duet.advance(job, study, trial, watch)
    closed = "round 1 was closed from outside while it was evaluated" in capsys.readouterr().out
    assert closed == (close is not None)
    assert study.trials()[0].status == {None: "completed", Study.fail: "failed", Study.abandon: "abandoned"}[close]
    # After the last of the 12 steps, which a resumed run of the tracker must not hide.
    assert logged == ([] if closed else [(13, {"feedback": 0.5, "feedback_stderr": None})])


def test_a_broken_task_keeps_the_trained_model(tmp_path, monkeypatch):
    (tmp_path / "flaky_task.py").write_text(
        "import os\n\ndef score(model):\n    return float('nan' if os.environ.get('FLAKY') else 0.5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAKY", "1")
    config = settings(task={"kind": "python", "function": "flaky_task:score"}, rounds=1)
    with pytest.raises(FeedbackError, match="finite number"):
        duet.run(config, tmp_path / "s", quiet=True)
    metrics = (tmp_path / "s" / "metrics.jsonl").read_text()
    monkeypatch.delenv("FLAKY")
    assert duet.run(config, tmp_path / "s", quiet=True).value == pytest.approx(0.5, abs=1e-6)
    assert (tmp_path / "s" / "metrics.jsonl").read_text() == metrics, "nothing was trained twice"


def test_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    folder, config = tmp_path / "s", settings(task={"kind": "external"})
    duet.run(config, folder, quiet=True)
    path = folder / "trials" / "0000.json"
    trial = json.loads(path.read_text())
    path.write_text(json.dumps({**trial, "stage": "proposed", "training": None}))
    real = duet.jobs.prepare

    def other_model(*args):
        job = real(*args)
        return dataclasses.replace(job, model=dataclasses.replace(job.model, fingerprint="another"))

    monkeypatch.setattr(duet.jobs, "prepare", other_model)
    with pytest.raises(ModelError, match="another model"):
        duet.run(config, folder, quiet=True)


def bad_domain(number: int, **fields) -> dict:
    data = configs.encode(settings())["data"]
    domains = [dict(domain) for domain in data["domains"]]
    domains[number] = {"name": "x", "source": "y", **fields}
    return {**data, "domains": domains}


def test_bad_data_is_told_before_any_training(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    cases = [
        ({"source": str(tmp_path / "none.jsonl")}, DataError, "none.jsonl"),
        ({"source": str(rows)}, DataError, "line 2 has no column 'response'"),
    ]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases.append(({"source": str(empty)}, DataError, "is empty"))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 50, "response": "b"}) + "\n")
    cases.append(({"source": str(long)}, DataError, "no response is left"))
    for i, (fields, kind, sentence) in enumerate(cases):
        with pytest.raises(kind, match=sentence):
            duet.run(settings(data=bad_domain(2, **fields)), tmp_path / f"s{i}", quiet=True)
        assert not Study.open(tmp_path / f"s{i}").trials()


def test_too_long_for_the_model(tmp_path):
    job_data = {**configs.encode(settings())["data"], "max_length": 64, "buckets": [64]}
    config = settings(data=job_data)
    shorter = dataclasses.replace
    with pytest.MonkeyPatch.context() as patch:
        real = loading._load_model

        def short_model(*args):
            model = real(*args)
            return shorter(model, config=shorter(model.config, max_length=32))

        patch.setattr(loading, "_load_model", short_model)
        with pytest.raises(ConfigError, match="data.max_length is 64"):
            duet.run(config, tmp_path / "s", quiet=True)


def test_a_second_run_is_refused(tmp_path):
    Study.create(tmp_path / "s", settings())
    with workers.alone(Study.open(tmp_path / "s")), pytest.raises(StudyError, match="nother run holds"):
        duet.run(settings(), tmp_path / "s", quiet=True)


def test_a_domain_of_which_nothing_may_be_chosen_is_told_before_training(tmp_path):
    """All of the second domain repeats the first one."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i:05}", "response": f"{i * i:08}"}) + "\n" for i in range(20)))
    domains = tuple(configs.DomainConfig(name=name, source=str(file)) for name in "ab")
    config = settings()
    data = dataclasses.replace(config.data, domains=domains, validation_fraction=0)
    selector = configs.SelectorConfig(kind="near_duplicates", rule="top_k", threshold=1.0)
    with pytest.raises(DataError, match="domain 'b': the selector 'near_duplicates' leaves none of its 20 examples"):
        duet.run(dataclasses.replace(config, data=data, selector=selector), tmp_path / "study", quiet=True)
    assert not Study.open(tmp_path / "study").trials()
