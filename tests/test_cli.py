"""The command line: what it prints, what it calls, and one line for every mistake."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

import duet_jax
from duet_jax import cli
from duet_jax import config as configs
from duet_jax.errors import ModelError
from duet_jax.study import Study

CONFIG = {
    "name": "small",
    "budget": 16,
    "rounds": 4,
    "model": {"scratch": {}},
    "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
    "training": {"learning_rate": 0.001},
    "task": {"kind": "external"},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study.create(tmp_path / "study", configs.from_dict(CONFIG))
    for share in (0.5, 0.0):
        mixture = {"a": share, "b": 1 - share}
        study.new_trial(mixture=mixture, counts={"a": 8, "b": 8}, proposal=None, seeds={})
    return study


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for duet_jax.duet and notes how it was called."""
    calls: list[tuple[Any, ...]] = []
    fake = types.ModuleType("duet_jax.duet")
    fake.run = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    fake.ask = lambda folder: Study.open(folder).trials()[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "duet_jax.duet", fake)
    monkeypatch.setattr(duet_jax, "duet", fake, raising=False)
    return calls


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("duet: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("duet: error: ").rstrip("\n")


def test_run(tmp_path: Path, algorithm: list[tuple[Any, ...]]) -> None:
    path = config_file(tmp_path)
    assert cli.main(["run", str(path)]) == 0
    assert algorithm[-1] == (configs.load(path), Path("studies/small"), False, None, None)
    words = ["run", str(path), "budget=8", "--study", str(tmp_path / "s"), "seed=3", "--quiet", "rounds=2"]
    assert cli.main([*words, "--worker", "pod-1", "--profile", str(tmp_path)]) == 0
    config, *others = algorithm[-1]
    assert (config.budget, config.seed, config.rounds) == (8, 3, 2)
    assert others == [tmp_path / "s", True, "pod-1", tmp_path]


def test_mistakes_in_a_run_are_one_line(
    tmp_path: Path, algorithm: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path)
    assert fails(capsys, "run", path, "budget=0") == f"{path}: budget is 0; it must be at least 1."
    assert "epocs is not a field" in fails(capsys, "run", path, "training.epocs=1")
    assert fails(capsys, "run", tmp_path / "none.yaml").startswith(f"There is no file {tmp_path / 'none.yaml'}; ")
    assert algorithm == []


def test_a_missing_config_is_answered_with_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    (tmp_path / "large.yaml").write_text("")
    monkeypatch.setattr(cli.importlib.resources, "files", lambda _: tmp_path)
    assert f"did you mean {tmp_path / 'quickstart.yaml'}?" in fails(capsys, "run", "configs/quickstart.yml")
    assert f"{tmp_path} holds large.yaml, quickstart.yaml." in fails(capsys, "run", "mine")


def test_interruption_and_errors_below(
    tmp_path: Path,
    algorithm: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config_file(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def no_model(*_: object) -> None:
        raise ModelError("There is no model.")

    monkeypatch.setattr(duet_jax.duet, "run", interrupted)
    assert cli.main(["run", str(path)]) == 130
    assert capsys.readouterr().err == "duet: stopped; the same command goes on from here.\n"
    monkeypatch.setattr(duet_jax.duet, "run", no_model)
    assert fails(capsys, "run", path) == "There is no model."


def test_ask(study: Study, algorithm: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", str(study.folder)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"trial": 1, "mixture": {"a": 0.0, "b": 1.0}, "counts": {"a": 8, "b": 8}}
    assert "There is no study in" in fails(capsys, "ask", study.folder / "none")


@pytest.mark.parametrize("score", ["0.25", "-0.25", "-1e-3", "1e3", "-5"])
def test_tell(study: Study, score: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tell", str(study.folder), "1", score, "--stderr", "1e-2"]) == 0
    assert "recorded, 1 of 4 rounds have feedback" in capsys.readouterr().out
    feedback = study.trials()[1].feedback
    assert feedback is not None and feedback["value"] == float(score) and feedback["stderr"] == 0.01


def test_ask_begins_a_study_that_is_not_there(
    tmp_path: Path, algorithm: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    assert "budget=4 goes with --config FILE" in fails(capsys, "ask", folder, "budget=4")
    assert not folder.exists()
    # The stand-in of the algorithm gives the last trial, and there is none yet.
    with pytest.raises(IndexError):
        cli.main(["ask", str(folder), "budget=4", "--config", str(config_file(tmp_path))])
    assert Study.open(folder).config.budget == 4


def test_ask_prints_settings_where_there_are_any(
    study: Study, algorithm: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"training.lora.targets": ("q", "v"), "budget": 8}
    study.new_trial(mixture={"a": 0.5, "b": 0.5}, counts={}, proposal=None, seeds={}, settings=settings)
    assert cli.main(["ask", str(study.folder)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"] == {"training.lora.targets": ["q", "v"], "budget": 8}
    assert cli.main(["info", str(study.folder)]) == 0
    shown = capsys.readouterr().out
    assert "targets" in shown and "budget" in shown and "q,v" in shown
    assert cli.main(["info", str(study.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"][2]["settings"] == answer["settings"]


@pytest.mark.parametrize("score", ["0.25", "-0.25"])
def test_the_score_may_come_last(study: Study, score: str) -> None:
    assert cli.main(["tell", str(study.folder), "1", "--stderr", "0.5", score]) == 0
    assert study.trials()[1].feedback["value"] == float(score)  # type: ignore[index]


def test_tell_what_failed_and_what_is_abandoned(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(study.folder)
    assert cli.main(["tell", folder, "0", "--failed", "the pod was taken away"]) == 0
    assert capsys.readouterr().out == "trial 0: failed, 0 of 4 rounds have feedback\n"
    assert cli.main(["tell", folder, "1", "--abandoned", "it runs out of memory"]) == 0
    assert capsys.readouterr().out == "trial 1: abandoned, 0 of 4 rounds have feedback\n"
    assert [(trial.status, trial.error) for trial in study.trials()] == [
        ("failed", "the pod was taken away"),
        ("abandoned", "it runs out of memory"),
    ]
    assert cli.main(["info", folder]) == 0
    shown = capsys.readouterr().out
    assert "failed: the pod was taken away" in shown and "abandoned: it runs out of memory" in shown


@pytest.mark.parametrize(
    "words", [[], ["0.5", "--failed", "x"], ["--failed", "x", "--abandoned", "y"], ["--stderr", "0.1"]]
)
def test_a_trial_is_told_one_thing(study: Study, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "tell", study.folder, 0, *words).startswith("A trial is told one thing: a score, --failed")
    assert study.trials()[0].status == "pending"


def test_mistakes_in_telling_are_one_line(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    study.tell(0, 0.5)
    folder = study.folder
    assert "has its feedback already: 0.5" in fails(capsys, "tell", folder, 0, 1)
    assert "There is no trial 9" in fails(capsys, "tell", folder, 9, 1)
    assert "The feedback is nan" in fails(capsys, "tell", folder, 1, "nan")
    assert "The feedback is -inf" in fails(capsys, "tell", folder, 1, "-inf")
    assert "--stderr is of a score" in fails(capsys, "tell", folder, 1, "--failed", "x", "--stderr", 1)
    assert "cannot fail any more" in fails(capsys, "tell", folder, 0, "--failed", "x")
    assert "standard error of the feedback is -1.0" in fails(capsys, "tell", folder, 1, 1, "--stderr", -1)
    assert "There is no study in" in fails(capsys, "tell", folder / "none", 0, 1)


@pytest.mark.parametrize("command", ["run --profile", "report --output", "select --output", "serve"])
def test_an_address_is_refused_where_only_a_path_will_do(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *option = command.split()
    place = [] if name == "serve" else [config_file(tmp_path)]
    sentence = fails(capsys, name, *place, *option, "gs://bucket/x")
    what = option[0] if option else "The study"
    assert f"{what} is gs://bucket/x; this needs a file system, so give a path." in sentence
    assert not (tmp_path / "gs:").exists()


def test_a_study_at_an_address(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"file://{study.folder}"
    assert cli.main(["tell", address, "1", "2.5"]) == 0
    assert cli.main(["info", address, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["trials"][1]["feedback"]["value"] == 2.5
    assert cli.main(["report", address]) == 0 and capsys.readouterr().out == f"{study.folder}/report.html\n"
    assert "xx://bucket/x is no study's address" in fails(capsys, "info", "xx://bucket/x")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["tell", "d", "0", "high"],
        ["tell", "d", "0", "--stderr", "1", "high"],
        ["info", "d", "x=1"],
        ["run", "c", "x"],
    ],
)
def test_usage_errors(words: list[str], algorithm: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2 and "error: " in capsys.readouterr().err


def test_info(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    study.update(0, training={"loss": math.nan})
    study.tell(0, 0.5, 0.125)
    study.fail(1, "[red]no power")
    assert cli.main(["info", str(study.folder)]) == 0
    shown = capsys.readouterr().out
    assert "small: 1 of 4 rounds have feedback" in shown
    assert "0.5 ± 0.12" in shown and "highest so far" in shown and "[red]no power" in shown
    assert cli.main(["info", str(study.folder), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    whole = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert whole["domains"] == ["a", "b"] and whole["highest"] == 0 and whole["config"]["budget"] == 16
    assert [trial["status"] for trial in whole["trials"]] == ["completed", "failed"]
    assert whole["trials"][0]["training"] == {"loss": None}


def test_no_number_of_a_wide_table_is_cut_off(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    settings = {"training.learning_rate": 0.00123, "training.schedule": "constant", "budget": 128}
    study.new_trial(mixture={"a": 0.5, "b": 0.5}, counts={}, proposal=None, seeds={}, settings=settings)
    study.tell(2, -1.2345, 0.0625)
    assert cli.main(["info", str(study.folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("learning_rate", "0.00123", "constant", "128", "-1.234 ± 0.062", "highest so far"):
        assert words in shown
    assert "…" not in shown


def test_info_of_a_new_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Study.create(tmp_path / "s", configs.from_dict(CONFIG))
    assert cli.main(["info", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == "small: 0 of 4 rounds have feedback\n"
    assert cli.main(["info", str(tmp_path / "s"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["highest"] is None


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"duet {duet_jax.__version__}\n"


def test_help_tell_and_info_start_without_jax(study: Study) -> None:
    code = """
import sys
from duet_jax import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"jax", "flax", "datasets", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    for words in (["--help"], ["tell", str(study.folder), "0", "1"], ["info", str(study.folder)]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
