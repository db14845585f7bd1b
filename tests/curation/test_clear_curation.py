"""`duet curate` of kind `clear` with a real model: data in, curated data and its audit out."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from duet_jax import cli
from duet_jax import config as configs
from duet_jax.config import DomainConfig
from duet_jax.curate import curate
from duet_jax.curation import clear
from duet_jax.curation.clear import file_of
from duet_jax.curation.correction import OPTIONS as BETTER
from duet_jax.curation.decisions import Action
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.data import Example, load_examples
from duet_jax.display import Display
from duet_jax.feedback import Deployed
from duet_jax.training.sft import Trainer
from tests.curation.respondents import QUESTIONS, offered
from tests.small import SCRATCH, write_rows


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """Letters and their capitals, of which some are wrong, as texts and as conversations."""
    # A model from scratch knows the characters of its data: here those of the options and of Yes and No.
    known = "ABC Yes No"
    targets = ["N" if i in (0, 11) else "ABC"[i % 3] for i in range(12)]
    rows = [
        {"id": f"e{i}", "prompt": f"{known} {'abc'[i % 3]}", "response": target, "answers": [target]}
        for i, target in enumerate(targets)
    ]
    turns = [
        {"messages": [{"role": "user", "content": f"{'abc'[i % 3]}?"}, {"role": "assistant", "content": "ABC"[i % 3]}]}
        for i in range(4)
    ]
    return {
        "name": "c",
        "kind": "clear",
        "seed": 1,
        "model": {"scratch": SCRATCH},
        "training": {"method": "full", "learning_rate": 0.02, "batch_size": 4, "epochs": 4, "schedule": "constant"},
        "data": {
            "validation_fraction": 0,
            "max_length": 192,
            "buckets": [32, 192],
            "domains": [
                {"name": "a", "source": write_rows(tmp_path / "a.jsonl", rows)},
                {"name": "b", "source": write_rows(tmp_path / "b.jsonl", turns), "messages": "messages"},
            ],
        },
        "clear": {
            "correct": True,
            "eta": 0.2,
            "acceptance": "probability",
            "preference_template": "#{prompt}#{first}#{second}\n{options}",
            "max_new_tokens": 2,
            "confidence": {**QUESTIONS, "samples": 2, "max_new_tokens": 2, "batch_size": 8},
        },
    }


def load(tmp_path: Path, tree: dict[str, Any], *words: str) -> configs.CurateConfig:
    (tmp_path / "curate.yaml").write_text(yaml.safe_dump(tree))
    return configs.load_curation(tmp_path / "curate.yaml", words)


@pytest.fixture
def opinionated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not trained likes one letter wherever it stands; as a judge this one likes the earlier word."""
    read = ModelRespondent.read

    def judged(
        self: ModelRespondent, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str], *scored: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        if not str(questions[0].prompt).startswith("#"):
            return read(self, questions, groups, words, *scored)
        found = []
        for question in questions:
            asked, letters = offered(str(question.prompt))
            first, second = asked.rsplit("#", 2)[1:]
            likes = dict(zip(BETTER, (0.6, 0.3, 0.1) if first < second else (0.3, 0.6, 0.1), strict=True))
            meant = {letter: option for option, letter in letters.items()}
            found.append([likes[meant[word]] for word in words])
        return np.array(found), np.zeros((0, 2))

    monkeypatch.setattr(ModelRespondent, "read", judged)


def contents(folder: Path) -> dict[str, bytes]:
    names = ("curated-a.jsonl", "curated-b.jsonl", "audit.jsonl", "audit.parquet", "audit.html")
    return {name: (folder / name).read_bytes() for name in names}


def test_data_in_curated_data_and_its_audit_out(
    tmp_path: Path, tree: dict[str, Any], opinionated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    summary = curate(load(tmp_path, tree), out, quiet=True).summary
    rows = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    assert [row["domain"] for row in rows] == ["a"] * 12 + ["b"] * 4
    assert pyarrow.parquet.read_table(out / "audit.parquet").to_pylist() == rows
    sides = ("proposal", "target", "tie")
    for row in rows:
        # From the numbers in the row alone, its decision.
        verdicts = [[row[f"{place}_{side}"] for side in sides] for place in ("first", "second")]
        better = all(v[0] is not None and v[0] > max(v[1:]) for v in verdicts)
        sure = None if verdicts[0][0] is None else (verdicts[0][0] + verdicts[1][0]) / 2
        assert row["better"] == better and row["acceptance"] == pytest.approx(sure)
        accepted, keeps = better and row["acceptance"] > row["eta"], row["confidence"] > row["threshold"]
        expected = "correct" if accepted else "keep" if keeps else "drop"
        assert row["action"] == expected or (row["action"] == "drop" and row["beaten"])
        weights = {"similarity": 0.56, "match": 0.14, "reflection": 0.3}
        parts = [(weight, row[name]) for name, weight in weights.items() if row[name] is not None]
        mean = sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)
        assert row["confidence"] == pytest.approx(mean)
    counted = {action: sum(row["action"] == action for row in rows) for action in Action}
    assert summary.startswith(f"16 examples: {' · '.join(f'{a} {n}' for a, n in counted.items())} (a: keep ")
    assert counted[Action.KEEP] and counted[Action.DROP] and counted[Action.CORRECT]

    # Each domain is one again, with its prompts as they were, texts in one and conversations in the other; a corrected
    # example lost what belonged to its old target.
    for name, changes in (("a", {}), ("b", {"messages": "messages"})):
        again = load_examples(DomainConfig(name=name, source=str(out / f"curated-{name}.jsonl"), **changes))
        left = [row for row in rows if row["action"] != "drop" and row["domain"] == name]
        before_ = load_examples(DomainConfig(name=name, source=str(tmp_path / f"{name}.jsonl"), **changes))
        given = {example.id: example.prompt for example in before_}
        assert name == "b" or {row["action"] for row in left} == {"keep", "correct"}
        assert [example.response for example in again] == [row["response"] for row in left]
        for example, row in zip(again, left, strict=True):
            assert example.meta["clear"]["action"] == row["action"] and example.prompt == given[row["id"]]
            assert example.answers == () or row["action"] == "keep"

    # By a second run nothing is trained, sampled or asked.
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this was done before")

    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", refuse)
        for name in ("sample", "log_probs"):
            patch.setattr(Deployed, name, refuse)
        patch.setattr(ModelRespondent, "read", refuse)
        curate(load(tmp_path, tree), out, quiet=True)
        assert contents(out) == before
        # Other thresholds are the same work, as long as the same examples are kept.
        curate(load(tmp_path, tree, "clear.eta=1"), out, quiet=True)
        actions = {json.loads(line)["action"] for line in (out / "audit.jsonl").read_text().splitlines()}
        assert actions == {"keep", "drop"}

    # Killed in one stage after another, it goes on each time, and ends with the same files.
    stages: list[str] = []
    for stage in ("samples", "questions", "training", "proposals", "judge"):

        def kill(display: Display, name: str, done: int, of: int, stage: str = stage) -> None:
            stages.append(name)
            if name == stage:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Display, "work", kill)
            curate(load(tmp_path, tree), tmp_path / "killed", quiet=True)
        assert stages[-1] == stage and not (tmp_path / "killed" / "audit.html").exists()
    curate(load(tmp_path, tree), tmp_path / "killed", quiet=True)
    assert contents(tmp_path / "killed") == before


def test_a_domain_has_a_file_whatever_its_name() -> None:
    assert [file_of(name) for name in ("a", "a/b", "a%2Fb", "ü b")] == [
        "curated-a.jsonl",
        "curated-a%2Fb.jsonl",
        "curated-a%252Fb.jsonl",
        "curated-ü b.jsonl",
    ]


def log_of(folder: Path) -> str:
    return "\n".join(json.loads((folder / "curation.json").read_text())["log"])


def test_cut_proposals_and_long_examples_correct_nothing_and_end_nothing(
    tmp_path: Path, tree: dict[str, Any], opinionated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "abc" * 64, "response": "A"}) + "\n")
    alive: list[weakref.ref] = []
    fit = Trainer.fit

    def deployed(*args: Any) -> Deployed:
        found = Deployed(*args)
        alive.append(weakref.ref(found))
        return found

    def fitted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        # The model that was asked is not kept while another one is trained.
        gc.collect()
        assert alive and not any(one() is not None for one in alive)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(clear, "Deployed", deployed)
    monkeypatch.setattr(Trainer, "fit", fitted)
    out = tmp_path / "out"
    # A letter alone has no end yet.
    curate(load(tmp_path, tree, "clear.max_new_tokens=1"), out, quiet=True)
    rows = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    assert {row["action"] for row in rows} == {"keep", "drop"}
    assert {row["proposal"] for row in rows} == {""} and {row["better"] for row in rows} == {False}
    (long,) = [row for row in rows if row["id"] == "long"]
    assert long["action"] == "drop" and long["confidence"] is None
    said = log_of(out)
    assert "clear: 1 of 17 examples are too long to be corrected ('long')" in said
    assert "clear: 16 of 16 proposals had not ended after 1 tokens and are not judged" in said
    assert "1 of 17 examples have none and are left out; 1 are longer than the model takes with the questions" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["training=null"], "training is missing; a curation of kind 'clear' needs it."),
        (["clear.correct=false"], "training has no meaning where clear.correct is false; leave it out."),
        (["clear.correct=false", "clear.iterations=2"], "clear.iterations is of corrections; set correct to true"),
        (["data.validation_fraction=0.1"], "data.validation_fraction is 0.1; it must be 0 for a curation of kind"),
        (["clear.quantile=2"], "clear.quantile is 2.0; it must be in [0, 1]."),
        (["clear.preference_template=x"], "clear.preference_template is 'x'; it must be a text with {first}"),
        (["clear.confidence.alpha=2"], "clear.confidence.alpha is 2.0; it must be in [0, 1]."),
        (
            ["clear.max_new_tokens=192"],
            "clear: of none of 16 examples a proposal of up to 192 tokens and the questions",
        ),
        (
            ["clear.confidence.max_new_tokens=192"],
            "no question about any of 16 examples, such as 'e0', fits into",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    (tmp_path / "curate.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    assert cli.main(["curate", str(tmp_path / "curate.yaml"), *words, "--output", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    # Examples and tokens are read before.
    assert not [path for path in out.glob("work/*/*") if path.parent.name != "data"]
