"""`duet select`: scored and chosen data out, readable again, with every mistake told before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet
import pytest
import yaml

from duet_jax import cli, duet
from duet_jax import config as configs
from duet_jax.config import DomainConfig
from duet_jax.data import load_examples
from duet_jax.study import Study
from tests.small import SCRATCH, write_rows

WALK = {"letters": 5, "length": 6, "examples": 40}
GRADIENTS: dict[str, Any] = {
    "model": {"scratch": SCRATCH},
    "training": {"learning_rate": 0.01, "batch_size": 8, "lora": {"rank": 2}},
}


def write_domain(folder: Path, name: str, count: int) -> dict[str, Any]:
    rows = [{"id": f"{name}{i}", "prompt": f"p{i}", "response": f"r{i}", "note": i} for i in range(count)]
    return {"name": name, "source": write_rows(folder / f"{name}.jsonl", rows)}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A pool of two domains, 20 and 10 examples, with utilities from a file."""
    domains = [write_domain(tmp_path, "a", 20), write_domain(tmp_path, "b", 10)]
    utilities = [{"id": f"{name}{i}", "utility": i + (0.5 if name == "b" else 0)} for name in "ab" for i in range(20)]
    return {
        "name": "pick",
        "count": 6,
        "data": {"validation_fraction": 0, "domains": domains},
        "selector": {"kind": "utilities", "path": write_rows(tmp_path / "u.jsonl", utilities), "rule": "top_k"},
    }


def run(tmp_path: Path, tree: dict[str, Any], *words: str) -> int:
    path = tmp_path / "select.yaml"
    path.write_text(yaml.safe_dump(tree))
    return cli.main(["select", str(path), *words, "--output", str(tmp_path / "out"), "--quiet"])


def table(tmp_path: Path) -> dict[str, list]:
    return pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()


def test_the_best_of_each_domain_in_proportion(tmp_path: Path, given: dict[str, Any]) -> None:
    assert run(tmp_path, given) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a19", "a18", "a17", "a16", "b9", "b8"]
    assert rows[-1] == {"note": 8, "id": "b8", "domain": "b", "utility": 8.5, "prompt": "p8", "response": "r8"}
    found = table(tmp_path)
    assert len(found["id"]) == 30 and sum(found["selected"]) == 6
    ranks = {identifier: rank for identifier, rank in zip(found["id"], found["rank"], strict=True)}
    assert (ranks["a19"], ranks["a0"], ranks["b9"], ranks["b0"]) == (1, 20, 1, 10)
    about = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert about["domains"] == {"a": {"examples": 20, "chosen": 4}, "b": {"examples": 10, "chosen": 2}}
    assert about["config"]["selector"]["kind"] == "utilities" and about["model"] is None


def test_a_mixture_or_one_pool(tmp_path: Path, given: dict[str, Any]) -> None:
    assert run(tmp_path, given, "mixture={b: 1}") == 0
    assert [i for i, s in zip(table(tmp_path)["id"], table(tmp_path)["selected"], strict=True) if s] == [
        f"b{i}" for i in range(4, 10)
    ]
    assert run(tmp_path, given, "pooled=true", "count=12") == 0
    chosen = {i for i, s in zip(table(tmp_path)["id"], table(tmp_path)["selected"], strict=True) if s}
    assert chosen == {f"a{i}" for i in range(9, 20)} | {"b9"}
    assert sorted(table(tmp_path)["rank"]) == list(range(1, 31))


@pytest.mark.parametrize(("share", "count"), [(0.05, 1), (0.29, 8), (0.7, 21), (1.0, 30)])
def test_a_share_in_place_of_a_count(tmp_path: Path, given: dict[str, Any], share: float, count: int) -> None:
    assert run(tmp_path, given, "count=null", f"share={share}") == 0
    found = table(tmp_path)
    assert sum(found["selected"]) == count
    of_b = [chosen for name, chosen in zip(found["domain"], found["selected"], strict=True) if name == "b"]
    assert abs(sum(of_b) - count / 3) < 1


def test_what_was_selected_is_a_domain_again(tmp_path: Path, given: dict[str, Any]) -> None:
    run(tmp_path, given)
    examples = load_examples(DomainConfig(name="d", source=str(tmp_path / "out" / "selected.jsonl")))
    assert [(e.id, e.prompt, e.response, e.meta["note"]) for e in examples[:1]] == [("a19", "p19", "r19", 19)]


def test_conversations_stay_conversations(tmp_path: Path, given: dict[str, Any]) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    line = {"id": "c0", "talk": [*turns, {"role": "assistant", "content": "x"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    given["data"]["domains"].append({"name": "c", "source": str(tmp_path / "c.jsonl"), "messages": "talk"})
    assert run(tmp_path, given, "selector={kind: random}", "count=31") == 0
    spec = DomainConfig(name="d", source=str(tmp_path / "out" / "selected.jsonl"), messages="messages")
    found = {example.id: example for example in load_examples(spec)}
    assert found["c0"].prompt == tuple(turns) and found["c0"].response == "x"
    assert found["a3"].prompt == ({"role": "user", "content": "p3"},) and found["a3"].response == "r3"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["count=31"], "count is 31, which asks for 21 examples of a, but there are 20 to choose from; lower count"),
        (["mixture={b: 1}", "count=11"], "count is 11, which asks for 11 examples of b, but there are 10"),
        (["pooled=true", "count=31"], "31 examples of all domains, but there are 30 to choose from; lower count."),
        (["count=null"], "count or share must say how many examples to choose, exactly one of them; neither is given."),
        (["share=0.5"], "count or share must say how many examples to choose, exactly one of them; both are given."),
        (["count=0"], "count is 0; it must be at least 1."),
        (["count=null", "share=1.5"], "share is 1.5; it must be greater than 0, and at most 1."),
        (["count=null", "share=0.03"], "share is 0.03, less than one of 30 examples; raise it, or give count."),
        (
            ["count=null", "share=0.5", "mixture={b: 1}"],
            "share is 0.5, which asks for 15 examples of b, but there are 10 to choose from; lower share, or give",
        ),
        (["mixture={c: 1}"], "mixture is 'c'; it must be made of the domains a, b."),
        (["mixture={a: -1}"], "mixture.a is -1; it must be a number that is not negative."),
        (["mixture={a: 0}"], "mixture is {'a': 0}; it must be positive somewhere."),
        (["mixture={a: 1}", "pooled=true"], "pooled is true, but there is a mixture; leave one of them out"),
        (
            ["selector={kind: k_center}", "pooled=true"],
            "pooled is true, but the selector 'k_center' searches each domain by itself; leave it out.",
        ),
        (
            ["selector={kind: davir, reference: m, warmup_epochs: 2}"],
            "selector.warmup_epochs has no meaning with a reference that is trained already; leave one out.",
        ),
        (
            ["selector={kind: rho, reference: m, warmup_examples: 2}"],
            "selector.warmup_examples has no meaning with a reference that is trained already",
        ),
        (
            ["selector={kind: rho, reference: m, targets: [{name: t, source: x}]}"],
            "selector.targets has no meaning with a reference that is trained already",
        ),
        (["selector={kind: length}"], "model is missing; the selector 'length' needs it."),
        (["selector={kind: el2n}", "model={scratch: {}}"], "training is missing; the selector 'el2n' needs it."),
        (
            [
                "selector={kind: length}",
                "model={scratch: {}}",
                "evaluate={kind: exact_match, source: x}",
            ],
            "training is missing; an evaluation needs it.",
        ),
        (["selector={kind: less}"], "model is missing; the selector 'less' needs it."),
        (["selector={kind: less, damping: 1}"], "selector.damping has no meaning for a selector of kind 'less'"),
        (["selector={kind: influence, k: 64}"], "selector.k has no meaning for a selector of kind 'influence'"),
        (["selector={kind: less, k: 100}"], "selector.k is 100; it must be a positive multiple of 32."),
        (["selector.targets=[{name: t, source: x}]"], "selector.targets has no meaning for a selector of kind 'util"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(tmp_path, given, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.validation_fraction=0"], "selector.targets is empty and data.validation_fraction is 0"),
        (["pooled=true"], "pooled is true, but each domain's utilities are for other targets; leave one of them out"),
        (
            ["selector.targets=[{name: t, source: x}, {name: t, source: y}]"],
            "selector.targets.1.name is 't' a second time; every target needs its own.",
        ),
        (
            ["selector.targets=[{name: t, source: x, minimum: 0.1}]"],
            "selector.targets.0 has a minimum or a maximum, which only domains have; leave it out.",
        ),
    ],
)
def test_mistakes_of_selectors_that_look_at_gradients(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    tree = given | GRADIENTS | {"selector": {"kind": "less"}}
    tree["data"]["validation_fraction"] = 0.1
    assert run(tmp_path, tree, *words) == 2
    assert sentence in capsys.readouterr().err


def test_two_at_once_are_refused(tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, given)
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert run(tmp_path, given) == 2
    assert "Another process selects into" in capsys.readouterr().err


def walks(**more: Any) -> dict[str, Any]:
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**WALK, "tags": tag}} for tag in "AB"]
    data = {"max_length": 10, "buckets": [10], "validation_fraction": 0.2, "domains": domains}
    return {"name": "walks", "data": data, **GRADIENTS, **more}


def test_a_selection_by_gradients_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"name": "t", "source": "synthetic:walk", "split": "test", "options": {**WALK, "tags": "A"}}
    selector = {"kind": "less", "rule": "top_k", "warmup_epochs": 2, "k": 512, "targets": [target]}
    task = {"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}, "batch_size": 8}
    tree = walks(count=16, selector=selector, evaluate=task, baselines=["none"])
    assert run(tmp_path, tree) == 0
    about = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert [(row["name"], row["examples"]) for row in about["evaluation"]] == [("selected", 16), ("none", 0)]
    assert about["evaluation"][0]["score"] > about["evaluation"][1]["score"]
    assert about["model"]["source"] == "from scratch" and "sketch error of a cosine" in " ".join(about["log"])
    first = table(tmp_path)
    monkeypatch.setattr("duet_jax.selection.trajectory._train", None)
    # Another count and rule need no new scores.
    assert run(tmp_path, tree, "count=20", "selector.rule=weighted") == 0
    assert table(tmp_path)["utility"] == first["utility"] and sum(table(tmp_path)["selected"]) == 20


def test_what_trains_nothing_needs_no_training(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"model": {"scratch": SCRATCH}, "selector": {"kind": "loss_band", "low": 0, "high": 0.5, "rule": "top_k"}}
    given["data"] |= {"max_length": 10, "buckets": [10]}
    assert run(tmp_path, given) == 0
    first = table(tmp_path)["utility"]
    # Nor do its scores depend on one.
    monkeypatch.setattr("duet_jax.selection.scoring.SELECTORS", {})
    assert run(tmp_path, given, "training={learning_rate: 0.5, epochs: 3}") == 0
    assert table(tmp_path)["utility"] == first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["influence", "less"])
def test_a_study_trains_on_what_the_selector_prefers(tmp_path: Path, kind: str) -> None:
    task = {"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "tags": "A"}, "batch_size": 8}
    selector = {"kind": kind, "rule": "top_k", "warmup_epochs": 1}
    tree = walks(budget=16, rounds=2, task=task, selector=selector)
    config = configs.from_dict(tree)
    result = duet.run(config, tmp_path / "study", quiet=True)
    assert result.trial is not None
    study = Study.open(tmp_path / "study")
    job = duet.jobs.prepare(config, study.folder, lambda line: None)
    for trial in study.trials():
        counts = np.array([trial.counts[name] for name in job.names])
        rows, _ = job.sample(counts, trial.seeds["sample"])
        for start, end, count, utilities in zip(job.starts, job.starts[1:], counts, job.utilities, strict=False):
            inside = rows[(rows >= start) & (rows < end)] - start
            assert len(inside) == count
            np.testing.assert_allclose(np.sort(utilities[inside]), np.sort(utilities)[len(utilities) - count :])
