"""What a selection is worth: trained on, scored beside baselines, and the same after any crash."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from duet_jax import cli, select, unseen
from duet_jax._checks import FieldError
from duet_jax._decode import decode
from duet_jax.config import SelectConfig, TaskConfig
from duet_jax.data import Domain, Example, join
from duet_jax.display import Display
from duet_jax.errors import ConfigError, DuetError
from duet_jax.evaluate import choices
from duet_jax.feedback import Deployed
from duet_jax.loading import Loaded, load
from duet_jax.reading import load_all
from duet_jax.unseen import read_task

WALK = {"letters": 5, "length": 6, "examples": 30}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
TASK = {
    "kind": "response_loss",
    "source": "synthetic:walk",
    "options": {**WALK, "tags": "A", "examples": 24},
    "batch_size": 8,
}
TREE: dict[str, Any] = {
    "name": "walks",
    "count": 12,
    "mixture": {"A": 0.75, "B": 0.25},
    "model": {"scratch": SMALL},
    "data": {
        "max_length": 10,
        "buckets": [10],
        "validation_fraction": 0,
        "domains": [{"name": tag, "source": "synthetic:walk", "options": {**WALK, "tags": tag}} for tag in "AB"],
    },
    "training": {
        "learning_rate": 0.02,
        "batch_size": 8,
        "epochs": 2,
        "checkpoint_every": 2,
        "lora": {"rank": 4, "dropout": 0.1},
    },
    "selector": {"kind": "random"},
    "evaluate": TASK,
    "baselines": ["none", "random", "all"],
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Models of one method of training share their compiled programs."""
    kept: dict[str, Loaded] = {}

    def load_once(model: Any, data: Any, training: Any, *rest: Any) -> Loaded:
        if training.method not in kept:
            kept[training.method] = load(model, data, training, *rest)
        found = kept[training.method]
        return dataclasses.replace(found, trainer=found.trainer.retuned(training))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "load", load_once)
        yield


def run(folder: Path, tree: dict[str, Any] = TREE) -> list[dict[str, Any]]:
    """The rows of a selection's evaluation, without what a clock says."""
    select.select(decode(SelectConfig, tree), folder, quiet=True)
    rows = json.loads((folder / "selection.json").read_text())["evaluation"]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("selections") / "straight"
    return folder, run(folder)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_models_are_trained_as_in_a_round_and_scored_by_the_task(
    straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path, method: str
) -> None:
    tree = TREE | {"training": TREE["training"] | {"method": method}}
    folder, rows = straight if method == "lora" else (tmp_path, run(tmp_path, tree))
    found = {row["name"]: row for row in rows}
    assert list(found) == ["selected", "none", "random", "all"]
    assert [(row["examples"], row["steps"]) for row in rows] == [(12, 4), (0, 0), (12, 4), (60, 16)]
    config = decode(SelectConfig, tree)
    assert config.model is not None and config.training is not None and config.evaluate is not None
    domains, task = load_all(config.data, 0), read_task(config.evaluate, 0, "evaluate")
    loaded = select.load(config.model, config.data, config.training, domains, task.texts, 0, lambda _: None)
    metric, data = task.build(loaded.engine), join(loaded.train)
    selected = [json.loads(line)["id"] for line in (folder / "selected.jsonl").read_text().splitlines()]
    chosen = np.array([i for i, name in enumerate(data.ids) if name in selected])
    trained = loaded.trainer.fit(data, chosen, seed=0, start_seed=0)
    feedback = metric(Deployed(loaded.engine, *loaded.trainer.deployable(trained.trainable)))
    told = {"loss": trained.loss, "score": feedback.value, "stderr": feedback.stderr, "details": feedback.details}
    assert {name: found["selected"][name] for name in told} == told
    base = metric(Deployed(loaded.engine, loaded.trainer.load_base()))
    assert found["none"]["loss"] is None and found["none"]["score"] == base.value
    assert base.value < found["selected"]["score"] < found["all"]["score"]


def test_the_evaluation_is_said_and_kept(straight: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = straight
    about = json.loads((folder / "selection.json").read_text())
    assert about["domains"] == {"A": {"examples": 30, "chosen": 9}, "B": {"examples": 30, "chosen": 3}}
    lines = [line for line in about["log"] if ", score " in line]
    assert [line.partition(":")[0] for line in lines] == ["selected", "none", "random", "all"]
    assert f"12 examples, 4 steps, loss {rows[0]['loss']:.3f}, score {rows[0]['score']:.4g} ± " in lines[0]
    assert "none: 0 examples, 0 steps, score " in lines[1]


def test_stopped_anywhere_it_ends_the_same(straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    real, left = Display.work, [0]

    def stop(display: Display, name: str, done: int, of: int) -> None:
        real(display, name, done, of)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "work", stop)
        # In a training, where a trained model is to be scored, and in later models.
        for calls in (3, 3, 2, 4, 9):
            left[0] = calls
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
    assert run(tmp_path) == straight[1]


def test_what_is_finished_is_read(
    straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(straight[0], folder)
    worked: list[str] = []
    monkeypatch.setattr(Display, "work", lambda display, name, done, of: worked.append(name))

    def again(**fields: Any) -> tuple[list[dict[str, Any]], set[str]]:
        worked.clear()
        return run(folder, TREE | fields), set(worked)

    assert again() == (straight[1], set())
    assert again(baselines=["none"]) == (straight[1][:2], set())
    # Another task scores the models that are there.
    other, work = again(evaluate=TASK | {"kind": "perplexity"})
    assert work == {f"{row['name']}, scoring" for row in straight[1]}
    for row, before in zip(other, straight[1], strict=True):
        assert row["score"] == pytest.approx(-np.exp(-before["score"])) and row["loss"] == before["loss"]
    # Another selection finds the baselines, but the random one is of another size.
    shorter, work = again(count=8)
    assert {name.partition(",")[0] for name in work} == {"selected", "random"}
    assert shorter[1] == straight[1][1] and shorter[3] == straight[1][3]
    # Another training finds the base alone, and mixes nothing up.
    changed, work = again(training=TREE["training"] | {"learning_rate": 0.005}, baselines=["none"])
    assert {name.partition(",")[0] for name in work} == {"selected"}
    assert changed[1] == straight[1][1] and changed[0]["score"] != straight[1][0]["score"]
    assert again() == (straight[1], set())


def test_a_training_that_diverges_is_told_and_has_no_score(tmp_path: Path) -> None:
    training = {"method": "full", "learning_rate": 1e30, "batch_size": 8, "warmup_fraction": 0, "epochs": 3}
    rows = run(tmp_path, TREE | {"training": training, "baselines": ["none"]})
    assert rows[0]["loss"] is None and rows[0]["score"] is None and rows[1]["score"] is not None
    (line,) = [one for one in json.loads((tmp_path / "selection.json").read_text())["log"] if "no score" in one]
    assert line.endswith("no score, for the training loss is not finite: lower training.learning_rate")
    assert "NaN" not in (tmp_path / "selection.json").read_text()


@pytest.mark.parametrize("pooled", [False, True])
def test_baselines_are_as_large(pooled: bool) -> None:
    tree = TREE | ({"pooled": True, "mixture": {}} if pooled else {})
    sizes, chosen = [30, 10, 20], [np.array([29, 0, 7]), np.arange(10), np.zeros(0, np.int64)]

    def of(**fields: Any) -> dict[str, np.ndarray]:
        return dict(choices(decode(SelectConfig, tree | fields), sizes, chosen))

    found = of()
    assert found["selected"].tolist() == [29, 0, 7, *range(30, 40)]
    assert len(found["none"]) == 0 and found["all"].tolist() == list(range(60))
    random = found["random"]
    assert len(set(random.tolist())) == 13 and random.min() >= 0 and random.max() < 60
    if not pooled:
        assert np.histogram(random, [0, 30, 40, 60])[0].tolist() == [3, 10, 0]
    assert of()["random"].tolist() == random.tolist() != of(seed=1)["random"].tolist()
    assert list(of(baselines=["all"])) == ["selected", "all"]


def test_a_random_baseline_takes_every_example_equally_often() -> None:
    sizes, chosen = [6, 4], [np.arange(2), np.arange(3)]
    times = np.zeros(10)
    for seed in range(400):
        config = decode(SelectConfig, TREE | {"seed": seed, "pooled": True, "mixture": {}, "baselines": ["random"]})
        times[dict(choices(config, sizes, chosen))["random"]] += 1
    assert np.abs(times / 400 - 0.5).max() < 4 * np.sqrt(0.25 / 400)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"evaluate": {"kind": "external"}}, "evaluate.kind is 'external', but a selection asks nobody outside"),
        ({"evaluate": {"kind": "reward", "source": "x"}}, "evaluate.reward is missing; a task of kind 'reward' needs"),
        ({"model": None}, "model is missing; an evaluation needs it."),
        ({"training": None}, "training is missing; an evaluation needs it."),
        ({"evaluate": None}, "baselines have no meaning without evaluate; leave them out, or give it."),
        ({"baselines": ["none", "none"]}, "baselines is ['none', 'none']; it must be a list without repetition."),
        ({"baselines": ["some"]}, "baselines.0 is 'some'; it must be"),
        (
            {"training": TREE["training"] | {"online": {"candidates": 16}}},
            "training.online is of the rounds of a study; leave it out of a selection.",
        ),
    ],
)
def test_mistakes_in_the_configuration(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(SelectConfig, TREE | fields)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"evaluate": {"kind": "response_loss", "source": "nothing.jsonl"}}, "nothing.jsonl"),
        ({"evaluate": {"kind": "python", "function": "nowhere:f"}}, "evaluate.function: the module 'nowhere' cannot"),
        (
            {"evaluate": TASK | {"kind": "multiple_choice"}},
            "evaluate: example evaluate/test-0-0 is no multiple-choice question",
        ),
        (
            {"evaluate": TASK | {"kind": "reward", "reward": {"kind": "multiple_choice"}, "max_new_tokens": 2}},
            "Example evaluate/test-0-0 is no multiple-choice question",
        ),
        ({"training": TREE["training"] | {"lora": {"layers": [1]}}}, "training.lora.layers may be [1], but the layers"),
    ],
)
def test_mistakes_are_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(Loaded, "utilities", None)
    monkeypatch.setattr(select, "load", load)
    with pytest.raises(DuetError) as caught:
        run(tmp_path, TREE | fields)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = TREE | {"mixture": {}, "pooled": True, "count": None, "share": 0.25, "baselines": ["random"]}
    (tmp_path / "walks.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["select", str(tmp_path / "walks.yaml"), "--output", str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert sum(part["chosen"] for part in about["domains"].values()) == 15
    assert [row["examples"] for row in about["evaluation"]] == [15, 15]
    said = capsys.readouterr().out
    assert all(f"{row['name']}: 15 examples, {row['steps']} steps, loss" in said for row in about["evaluation"])


def test_a_task_knows_its_place_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(config: TaskConfig) -> None:
        raise FieldError("benchmark", f"is {config.benchmark!r}, which is no file.")

    monkeypatch.setattr(unseen, "load_benchmark", missing)
    inner = {"weight": 1.0, "task": {"kind": "harness", "benchmark": "x"}}
    config = decode(TaskConfig, {"kind": "sum", "tasks": [{"weight": 2.0, "task": TASK}, inner]})
    with pytest.raises(ConfigError, match=r"^evaluate.tasks\[1\].task.benchmark is 'x', which is no file"):
        read_task(config, 0, "evaluate")


def test_a_sum_is_of_its_parts(straight: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    parts = [{"weight": 2.0, "task": TASK}, {"weight": -1.0, "task": TASK | {"kind": "perplexity"}}]
    folder = tmp_path / "copy"
    shutil.copytree(straight[0], folder)
    rows = run(folder, TREE | {"evaluate": {"kind": "sum", "tasks": parts}})
    for row, before in zip(rows, straight[1], strict=True):
        assert row["score"] == 2 * row["details"]["task_0"] - row["details"]["task_1"]
        assert row["loss"] == before["loss"] and row["stderr"] > 0


def test_identities_follow_what_decides_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = decode(SelectConfig, TREE)
    assert config.model is not None and config.training is not None
    domains = [Domain("d", (Example("a", "p", "r"), Example("b", "q", "s")), (), "here")]
    engine = load(config.model, config.data, config.training, domains, (), 0, lambda _: None).engine

    def identity(**fields: Any) -> list[Any]:
        task = read_task(decode(TaskConfig, fields), 0, "evaluate")
        return json.loads(json.dumps(task.identity(task.build(engine))))

    def write_examples(*responses: str) -> None:
        rows = [{"id": name, "prompt": "p", "response": text} for name, text in zip("ab", responses, strict=True)]
        Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    exact = {"kind": "exact_match", "source": "t.jsonl", "max_new_tokens": 2}
    write_examples("r", "s")
    first = identity(**exact)
    assert first == identity(**exact) != identity(**exact | {"max_examples": 1})
    write_examples("r", "r")
    assert identity(**exact)[0] == first[0] and identity(**exact)[1] != first[1]
    for number in range(2):
        Path(f"own{number}.py").write_text(f"def f(*_):\n    return 0.{number}\n")
    sources = [identity(kind="python", function=f"own{number}:f")[3] for number in range(2)]
    assert None not in sources and sources[0] != sources[1]
    commands = []
    for text in ("echo 1", "echo 2"):
        Path("score.sh").write_text(text)
        commands.append(identity(kind="command", command=["sh", "score.sh", "{model}"]))
    assert commands[0][:4] == commands[1][:4] and commands[0] != commands[1]
    rewarded = exact | {"kind": "reward", "reward": {"kind": "python", "function": "own0:f", "needs_label": False}}
    _, parts = identity(kind="sum", tasks=[{"weight": 1.0, "task": rewarded}])
    assert parts == [identity(**rewarded)] and parts[0][2].startswith("python own0:f") and sources[0] in parts[0][2]
