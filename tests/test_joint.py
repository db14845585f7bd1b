"""Training settings searched together with the mixture: whole studies on a small model, killed, resumed, exported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import duet, models
from duet_jax.display import Display, shares
from duet_jax.errors import ConfigError, StudyError
from duet_jax.feedback import Deployed, Engine
from duet_jax.job import MOST_TRAINERS, Job, prepare
from duet_jax.recall import make_search
from duet_jax.search import Search
from duet_jax.study import Study, Trial

WALK = {"letters": 6, "length": 8, "examples": 300}
LEVELS = (32, 96)
SEARCH: dict[str, Any] = {
    "initial": 2,
    "settings": [
        {"field": "training.learning_rate", "low": 1e-3, "high": 3e-2, "log": True},
        {"field": "training.schedule", "values": ["linear", "constant"]},
        {"field": "training.epochs", "low": 1, "high": 2},
    ],
    # The lower level is so cheap that it is worth its cost for a while.
    "fidelity": {"field": "budget", "levels": LEVELS, "costs": [1, 50]},
}


def study_config(**changes: Any) -> configs.StudyConfig:
    values = {
        "name": "joint",
        # With this one the feedback says once that the target has something to tell.
        "seed": 1,
        "budget": 96,
        "rounds": 4,
        "model": {"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        "data": {
            "max_length": 16,
            "buckets": [16],
            "domains": [
                {"name": "a", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}},
                {"name": "noise", "source": "synthetic:walk", "options": {**WALK, "noise": 1.0}},
            ],
        },
        "training": {"method": "full", "learning_rate": 0.01, "batch_size": 8, "checkpoint_every": 2},
        "task": {"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "tags": "A", "examples": 32}},
        "search": SEARCH,
    }
    return configs.from_dict({**values, **changes})


def facts(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on when a run was killed."""
    kept = ("mixture", "counts", "settings", "seeds", "proposal", "feedback")
    trials = Study.open(folder).trials()
    return [{**{name: getattr(t, name) for name in kept}, "loss": t.training["loss"]} for t in trials]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return prepare(study_config(), tmp_path_factory.mktemp("job"), lambda _: None)


@pytest.fixture
def prepared(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share what one job has compiled."""
    monkeypatch.setattr(duet.jobs, "prepare", lambda *_: job)


@pytest.fixture(scope="module")
def straight(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, duet.Result, list[int]]:
    """A joint study with a fidelity, and how much had been compiled after each round."""
    folder = tmp_path_factory.mktemp("studies") / "straight"
    events: list[str] = []
    marks: list[int] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    original = duet.advance

    def advance(*args: Any) -> None:
        original(*args)
        marks.append(len(events))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duet, "advance", advance)
            patch.setattr(duet.jobs, "prepare", lambda *_: job)
            result = duet.run(study_config(), folder, quiet=True)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return folder, result, marks


def test_a_joint_study_runs_to_its_last_round(straight: tuple[Path, duet.Result, list[int]]) -> None:
    folder, result, _ = straight
    trials = Study.open(folder).trials()
    assert [trial.status for trial in trials] == ["completed"] * 4
    names = ["training.learning_rate", "training.schedule", "training.epochs", "budget"]
    for trial in trials:
        assert list(trial.settings) == names
        assert 1e-3 <= trial.settings["training.learning_rate"] <= 3e-2 and trial.settings["budget"] in LEVELS
        assert sum(trial.counts.values()) == trial.settings["budget"]
        assert trial.training["steps"] == trial.settings["budget"] // 8 * trial.settings["training.epochs"]
        rates = [row["learning_rate"] for row in Study.open(folder).metrics() if row["trial"] == trial.trial]
        assert max(rates) <= trial.settings["training.learning_rate"] * (1 + 1e-6)
        assert (rates[-1] == rates[-2]) == (trial.settings["training.schedule"] == "constant")
    assert len({str(trial.settings) for trial in trials}) == 4
    assert result.trial is not None
    best = dict(trials[result.trial].settings)
    del best["budget"]
    assert result.settings == best


def test_settings_that_are_arguments_compile_nothing(straight: tuple[Path, duet.Result, list[int]]) -> None:
    _, _, marks = straight
    assert marks[1] == marks[3], f"compilations after each round: {marks}"


@pytest.mark.usefixtures("prepared")
def test_stopped_anywhere_it_ends_the_same(straight: tuple[Path, duet.Result, list[int]], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    real, left = Study.append_metrics, [3, 9, 17]

    def stop(study: Study, rows: Any) -> None:
        real(study, rows)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "append_metrics", stop)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                duet.run(study_config(), folder, quiet=True)
            left.pop(0)
    duet.run(study_config(), folder, quiet=True)
    assert facts(folder) == facts(straight[0])


def test_checkpoints_are_of_the_settings(straight: tuple[Path, duet.Result, list[int]]) -> None:
    folder, result, _ = straight
    (about,) = (folder / "checkpoints" / f"{result.trial:04d}").glob("*/about/metadata")
    rate = Study.open(folder).trials()[result.trial].settings["training.learning_rate"]
    assert f"learning_rate={rate!r}" in json.loads(about.read_text())["identity"]["settings"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_is_exported_at_the_target_with_its_own_settings(
    straight: tuple[Path, duet.Result, list[int]], job: Job, level: int, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(straight[0], folder)
    study = Study.open(folder)
    trial = next(trial for trial in study.trials() if trial.settings["budget"] == level)
    metrics = study.metrics()
    with Display(1, quiet=True) as display:
        duet._export_best(job, study, trial.trial, display)
    assert study.metrics() == metrics and study.trials()[trial.trial] == trial
    exported = models.load(str(folder / "best_model"))
    engine = Engine(dataclasses.replace(job.model, tokenizer=exported.tokenizer), False, (16,))
    found = job.task(Deployed(engine, exported.params)).value  # type: ignore[misc]
    if level == LEVELS[-1]:
        assert found == pytest.approx(trial.feedback["value"], abs=1e-5)
    else:
        assert found != pytest.approx(trial.feedback["value"], abs=1e-3)
    shares = np.array([trial.mixture[name] for name in job.names])
    rows, _ = job.sample(job.counts(shares), trial.seeds["sample"])
    assert len(rows) == LEVELS[-1]
    trainer = job.trainer_for(trial.settings)
    trained = trainer.fit(job.data, rows, seed=trial.seeds["training"], start_seed=job.config.seed)
    expected = job.task(Deployed(job.engine, *trainer.deployable(trained.trainable))).value  # type: ignore[misc]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_report_shows_settings(straight: tuple[Path, duet.Result, list[int]]) -> None:
    from duet_jax.report.page import render

    folder, result, _ = straight
    page = render(Study.open(folder))
    for words in (
        '<th scope="col">learning_rate</th>',
        '<th scope="col">budget</th>',
        "Predictions are of trials with the full budget, 96.",
    ):
        assert words in page
    assert f"{result.settings['training.learning_rate']:.3g}" in page
    assert 'aria-label="predicted score along a setting: learning_rate"' in page


def test_a_line_says_mixture_and_settings() -> None:
    assert shares({"a": 0.25, "b": 0.75, "c": 0.0}) == "b 75% · a 25%"
    settings = {"training.learning_rate": 3e-4, "training.lora.targets": ("q", "v"), "budget": 64}
    assert shares({"a": 1.0}, settings) == "a 100%  learning_rate 0.0003 · targets q,v · budget 64"


def test_what_failed_may_come_back_and_what_is_abandoned_does_not(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", study_config(task={"kind": "external"}))
    first = duet.ask(study.folder)
    assert set(first.mixture.values()) == {0.5}
    study.fail(0, "the pod was taken away")
    again = duet.ask(study.folder)
    assert again.mixture == first.mixture and again.settings == first.settings
    study.abandon(1, "out of memory")
    third = duet.ask(study.folder)
    assert (third.mixture, third.settings) != (first.mixture, first.settings)
    study.tell(2, 0.5)
    assert duet.ask(study.folder).settings.keys() == first.settings.keys()


@pytest.mark.usefixtures("prepared")
def test_a_trial_closed_from_outside_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Study.append_metrics

    def close(study: Study, rows: Any) -> None:
        if rows[0]["trial"] == 0 and study.trials()[0].status == "pending":
            study.abandon(0, "not this one")
        real(study, rows)

    monkeypatch.setattr(Study, "append_metrics", close)
    result = duet.run(study_config(rounds=1), tmp_path / "s", quiet=True)
    assert [trial.status for trial in Study.open(tmp_path / "s").trials()] == ["abandoned", "completed"]
    assert result.trial == 1


def test_settings_of_another_study_are_damage(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", study_config(task={"kind": "external"}))
    study.new_trial(mixture={"a": 0.5, "noise": 0.5}, counts={}, proposal=None, seeds={}, settings={"budget": 7})
    study.tell(0, 1.0)
    with pytest.raises(StudyError, match=r"Trial 0 of .* does not fit its study: The settings are budget"):
        duet.best(study, make_search(study.config))


ADAPTERS = {
    "method": "lora",
    "learning_rate": 0.01,
    "batch_size": 8,
}
ALONE = {
    "initial": 2,
    "settings": [
        {"field": "training.lora.rank", "values": [2, 4]},
        {"field": "training.lora.targets", "members": ["q", "v"]},
    ],
}


def one_domain(**changes: Any) -> configs.StudyConfig:
    data = {**configs.encode(study_config())["data"]}
    data["domains"] = data["domains"][:1]
    return study_config(**{"data": data, "training": ADAPTERS, "search": ALONE, "budget": 16, "rounds": 2, **changes})


@pytest.mark.slow
def test_settings_alone(tmp_path: Path) -> None:
    config = one_domain()
    result = duet.run(config, tmp_path / "s", quiet=True)
    trials = Study.open(tmp_path / "s").trials()
    assert [trial.counts for trial in trials] == [{"a": 16}] * 2
    assert trials[0].settings != trials[1].settings and result.mixture == {"a": 1.0}
    assert models.load(str(tmp_path / "s" / "best_model")).config.num_layers == 1
    from duet_jax.report import write_report

    assert '<th scope="col">rank</th>' in write_report(tmp_path / "s").read_text()


@pytest.mark.slow
def test_settings_alone_with_frozen_domains(tmp_path: Path) -> None:
    data = configs.encode(study_config())["data"]
    frozen = zip(data["domains"], (0.75, 0.25), strict=True)
    domains = [{**domain, "minimum": share, "maximum": share} for domain, share in frozen]
    config = one_domain(data={**data, "domains": domains}, task={"kind": "external"})
    study = Study.create(tmp_path / "s", config)
    for number in range(3):
        trial = duet.ask(study.folder)
        assert trial.counts == {"a": 12, "noise": 4}
        study.tell(number, -float(trial.settings["training.lora.rank"]))
    assert duet.best(study, make_search(config)).settings.keys() == trial.settings.keys()


def test_trainers_share_what_they_compile(tmp_path: Path) -> None:
    job = prepare(one_domain(), tmp_path, lambda _: None)
    base = job.trainer_for({})
    program = base.step
    same = {"training.learning_rate": 0.5, "training.epochs": 3, "training.schedule": "linear"}
    other = job.trainer_for({**same, "training.warmup_fraction": 0.5, "training.weight_decay": 0.2})
    assert other.step is program and other.settings.learning_rate == 0.5 and other.settings.epochs == 3
    assert base.settings.epochs == 1, "the first is as it was"
    assert job.trainer_for({"training.lora.rank": 4}).step is not program
    assert job.trainer_for({}).step is program
    for rank in range(5, 5 + MOST_TRAINERS):
        job.trainer_for({"training.lora.rank": rank})
    assert len(job._trainers) == MOST_TRAINERS and job.trainer_for({}).step is not program


@pytest.mark.parametrize(
    "settings", [[], [{"field": "training.lora.layers", "members": [0, 3]}]], ids=["fixed", "searched"]
)
def test_layers_that_the_model_has_not(settings: list[dict[str, Any]], tmp_path: Path) -> None:
    lora = {} if settings else {"layers": [3]}
    config = one_domain(training={**ADAPTERS, "lora": lora}, search={"settings": settings or ALONE["settings"]})
    with pytest.raises(ConfigError, match=r"training.lora.layers may be \[.*3\], but the layers of .* are 0 to 0\."):
        prepare(config, tmp_path, lambda _: None)


def test_a_run_and_an_ask_limit_repetition_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = configs.encode(study_config())["data"]
    few = {**data["domains"][0], "options": {**WALK, "tags": "A", "examples": 40}}
    search = {**SEARCH, "repetition": 1.5}
    config = study_config(data={**data, "domains": [few, data["domains"][1]]}, search=search)
    job = prepare(config, tmp_path, lambda _: None)
    assert job.sizes == {"a": 36, "noise": 270}
    assert job.search.constraints.maximum == (1.5 * 36 / 96, 1.0)
    searches = []

    def opened(study: Study, search: Search, stage: str) -> Trial:
        searches.append(search)
        return study.new_trial(mixture={"a": 0.5, "noise": 0.5}, counts={}, proposal=None, seeds={}, stage=stage)

    monkeypatch.setattr(duet, "new_trial", opened)
    study = Study.create(tmp_path / "s", config)
    for _ in range(2):
        duet.ask(study.folder)
    assert searches == [job.search] * 2 and study.sizes() == job.sizes
    study.note_sizes(job.sizes)
    path = tmp_path / "some"
    path.mkdir()
    selector = {"kind": "near_duplicates", "threshold": 0.5}
    leaving = study_config(data=configs.encode(config)["data"], search=search, selector=selector)
    with pytest.raises(StudyError, match="the selector 'near_duplicates' leaves to choose from, which are not known"):
        duet.ask(Study.create(path / "s", leaving).folder)
    job = prepare(leaving, path, lambda _: None)
    left = {name: int(np.sum(values > -np.inf)) for name, values in zip(job.names, job.utilities, strict=True)}
    assert job.sizes == left and left["a"] < 36
    assert job.search.constraints.maximum[0] == min(1.0, 1.5 * left["a"] / 96)
    with pytest.raises(ConfigError, match="0.1 epochs of 306 examples are less than the budget, 96"):
        prepare(study_config(data=configs.encode(config)["data"], search={"repetition": 0.1}), tmp_path, lambda _: None)
