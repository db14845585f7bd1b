"""`duet curate` of kind `answers`: answers with their confidence, what it is worth, and the page."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given as given_that
from hypothesis import strategies as st

from duet_jax import cli, loading, reading
from duet_jax import config as configs
from duet_jax.config import DataConfig
from duet_jax.curation.answers import answer, measured
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.feedback import Deployed
from duet_jax.report.abstention import page
from tests.small import SCRATCH, write_rows

# An answer of two characters or more is right, whatever it says.
REWARD = "def long(reply, example):\n    return float(len(reply) > 1)\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "answers_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    # A model from scratch knows the characters of its data: here those of the options and of Yes and No.
    labelled = [{"id": f"a{i}", "prompt": f"ABC Yes No {'abcd'[i % 4] * i}", "response": "AB"} for i in range(8)]
    turns = [{"id": "b0", "messages": [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "No"}]}]
    bare = [{"id": f"c{i}", "prompt": f"abc {i}"} for i in range(3)]
    for name, rows in (("a", labelled), ("b", turns), ("c", bare)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return {
        "name": "said",
        "kind": "answers",
        "seed": 1,
        "model": {"scratch": SCRATCH},
        "data": {
            "validation_fraction": 0,
            "max_length": 128,
            "buckets": [128],
            "domains": [
                {"name": "a", "source": str(tmp_path / "a.jsonl")},
                {"name": "b", "source": str(tmp_path / "b.jsonl"), "messages": "messages"},
                {"name": "c", "source": str(tmp_path / "c.jsonl"), "response": None},
            ],
        },
        "answers": {
            "threshold": 0.5,
            "reward": {"kind": "python", "function": "answers_reward:long", "low": 0, "high": 1},
            "confidence": {
                "samples": 2,
                "max_new_tokens": 3,
                "batch_size": 8,
                "sample_template": "{prompt}",
                "reflection_templates": ["{prompt} {answer}\n{options}"],
                "contradiction_template": "{prompt}|{first}|{second}\n{options}",
            },
        },
    }


def run(tmp_path: Path, tree: dict[str, Any], *words: str, output: str = "out") -> int:
    (tmp_path / "curate.yaml").write_text(yaml.safe_dump(tree))
    return cli.main(["curate", str(tmp_path / "curate.yaml"), *words, "--output", str(tmp_path / output), "--quiet"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_answers_their_confidence_and_what_it_is_worth(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, tree) == 0
    rows = rows_of(out)
    assert [(row["domain"], row["id"]) for row in rows] == [("a", f"a{i}") for i in range(8)] + [("b", "b0")] + [
        ("c", f"c{i}") for i in range(3)
    ]
    assert rows[8]["prompt"] == "user: c?" and rows[9]["prompt"] == "abc 0"

    # They are the model's own, and so is the confidence in each.
    config = configs.load_curation(tmp_path / "curate.yaml")
    assert config.model is not None and config.answers is not None
    domains = reading.load_all(config.data, config.seed)
    examples = [example for domain in domains for example in domain.train]
    loaded = loading.load(config.model, config.data, None, [], examples, config.seed, lambda line: None)
    model = Deployed(loaded.engine, loaded.trainer.load_base())
    respondent = ModelRespondent(model, loaded.model.fingerprint, config.answers.confidence, config.seed)
    expected = answer(respondent, examples, config.answers.confidence, tmp_path / "again")
    assert tuple(row["answer"] for row in rows) == expected.texts
    sure = np.array([row["confidence"] for row in rows])
    np.testing.assert_array_equal(sure, expected.confidence)
    assert [row["abstain"] for row in rows] == (sure < 0.5).tolist()
    # A function that says that it needs a label is not asked about prompts without one.
    score = np.array([row["score"] for row in rows[:9]])
    assert score.tolist() == [float(len(row["answer"]) > 1) for row in rows[:9]] and 0 < score.mean() < 1
    assert [row["score"] for row in rows[9:]] == [None] * 3
    told = json.loads((out / "calibration.json").read_text())
    assert told == measured(sure[:9], score, 0.5) | {"metric": told["metric"]}
    assert (out / "calibration.html").read_text() == page(told)

    # Another threshold is the same work.
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(Deployed, "sample", refuse)
    monkeypatch.setattr(ModelRespondent, "read", refuse)
    least = float(np.median(sure))
    assert run(tmp_path, tree, f"answers.threshold={least!r}") == 0
    again = rows_of(out)
    assert [row["abstain"] for row in again] == (sure < least).tolist()
    assert [row | {"abstain": 0} for row in again] == [row | {"abstain": 0} for row in rows]
    assert json.loads((out / "calibration.json").read_text())["given"] == int((sure[:9] >= least).sum())


def test_an_exported_model_answers_prompts_alone(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert run(tmp_path, tree) == 0 and (tmp_path / "out" / "calibration.html").exists()
    config = configs.load_curation(tmp_path / "curate.yaml")
    assert config.model is not None
    examples = [example for domain in reading.load_all(config.data, 1) for example in domain.train]
    loaded = loading.load(config.model, config.data, None, [], examples, config.seed, lambda line: None)
    Deployed(loaded.engine, loaded.trainer.load_base()).export(tmp_path / "best_model")
    before = rows_of(tmp_path / "out")
    tree["model"] = {"source": str(tmp_path / "best_model")}
    del tree["data"]["domains"][:2]
    assert run(tmp_path, tree) == 0
    found = rows_of(tmp_path / "out")
    assert [row["answer"] for row in found] == [row["answer"] for row in before[9:]]
    assert {row["score"] for row in found} == {None}
    # Nothing says what is right, and what an earlier run wrote of it is gone.
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} <= {
        *("answers.jsonl", "curation.json", ".lock")
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["answers.threshold=2"], "answers.threshold is 2.0; it must be in (0, 1]."),
        (["answers.threshold=0"], "answers.threshold is 0.0; it must be in (0, 1]."),
        (["training={learning_rate: 1}"], "training has no meaning for a curation of kind 'answers', whose model is"),
        (["model=null"], "model is missing; a curation of kind 'answers' needs it."),
        (["data.validation_fraction=0.1"], "data.validation_fraction is 0.1; it must be 0 for a curation of kind"),
        (["kind=clear", "answers=null", "clear={}"], "data.domains.2.response is null, but responses are read here"),
        (["answers.reward.low=-1"], "lie in [-1, 1], but how right an answer is must lie in [0, 1]; take another"),
        (["answers.reward={kind: unit_test}"], "answers.reward.kind is 'unit_test'; it must be one of"),
        (["answers.reward={kind: multiple_choice}"], "a0"),
        (["answers.confidence.max_new_tokens=128"], "and an answer of up to 128 are more than the 128 tokens"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(tmp_path, tree, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("work/*/*"))


def test_prompts_without_responses_are_refused_elsewhere() -> None:
    data = DataConfig(domains=(configs.DomainConfig(name="p", source="x", response=None),))
    with pytest.raises(configs.ConfigError, match="data.domains.0.response is null, but responses are read here"):
        data.require_responses()


CONFIDENCES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0])


@given_that(st.lists(st.tuples(CONFIDENCES, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12), CONFIDENCES)
def test_the_curve_is_what_each_threshold_gives(rows: list[tuple[float, float]], threshold: float) -> None:
    sure, score = (np.array(column) for column in zip(*rows, strict=True))
    told = measured(sure, score, threshold)
    assert [point["threshold"] for point in told["curve"]] == sorted(set(sure.tolist()), reverse=True)
    for point in told["curve"]:
        given = sure >= point["threshold"]
        assert point["coverage"] == pytest.approx(given.mean()) and point["score"] == pytest.approx(score[given].mean())
    assert told["given"] == (sure >= threshold).sum() and told["score"] == pytest.approx(score.mean())
    assert sum(part["answers"] for part in told["bins"]) == told["answers"] == len(rows)
    weighted = sum(part["answers"] * abs(part["score"] - part["confidence"]) for part in told["bins"])
    assert told["expected_calibration_error"] == pytest.approx(weighted / len(rows))
    if told["given"]:
        assert told["score_given"] == pytest.approx(score[sure >= threshold].mean())
    else:
        assert told["score_given"] is None
    assert json.loads(json.dumps(told, allow_nan=False)) == told


class Tags(html.parser.HTMLParser):
    """Names of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.names.append(tag)


def test_the_page_has_both_figures_and_needs_nothing_else() -> None:
    told = measured(np.array([0.2, 0.7, 0.7, 0.95]), np.array([0.0, 1.0, 0.0, 1.0]), 0.6) | {"metric": "<b>&exact"}
    text = page(told)
    assert text == page(told)
    parsed = Tags()
    parsed.feed(text)
    assert parsed.names.count("svg") == 2 and not {"script", "img", "b&exact"} & set(parsed.names)
    assert "&lt;b&gt;&amp;exact" in text and "<b>0.500</b>" in text and "<b>0.667</b>" in text
    assert not re.search(r"https?:|url\((?!#)|@import|\bsrc=", text)
    # No answer is sure enough, and there is one bin alone.
    nobody = measured(np.array([0.2]), np.array([1.0]), 0.9) | {"metric": "exact_match"}
    assert "<b>none</b>" in page(nobody)
    # One id is drawn once.
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
