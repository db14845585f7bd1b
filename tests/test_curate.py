"""`duet curate`: every kind from a configuration to files, resumed, and every mistake told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import yaml

from duet_jax import cli
from duet_jax import config as configs
from duet_jax.config import DomainConfig, SearchConfig
from duet_jax.curation import self_guide
from duet_jax.data import load_examples
from duet_jax.feedback import Deployed
from duet_jax.training.sft import Trainer
from tests.small import write_rows

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
TRAINING = {"method": "full", "learning_rate": 0.02, "batch_size": 8, "epochs": 12, "schedule": "constant"}
# The share of examples that a domain gets right is written in them, so that accuracies are known.
REWARD = "def right(reply, example):\n    return example.meta['right']\n"


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Sixteen letters with the same in capitals: two of d are wrong, and so is one of a that a teacher wrote."""
    rows: list[dict[str, Any]] = [
        {"id": f"x{i}", "prompt": "abcd"[i % 4], "response": "ABCD"[i % 4]} for i in range(16)
    ]
    rows[3]["response"], rows[7]["response"] = "B", "B"
    rows.append({"id": "y", "prompt": "a", "response": "C", "augmented": True})
    return {
        "name": "c",
        "kind": "hard_examples",
        "model": {"scratch": SMALL},
        "data": {
            "validation_fraction": 0,
            "max_length": 12,
            "buckets": [12],
            "domains": [{"name": "a", "source": write_rows(tmp_path / "a.jsonl", rows)}],
        },
        "hard_examples": {"reward": {"kind": "exact_match"}, "max_new_tokens": 2},
    }


def run(tmp_path: Path, tree: dict[str, Any], *words: str) -> int:
    path = tmp_path / "curate.yaml"
    path.write_text(yaml.safe_dump(tree))
    return cli.main(["curate", str(path), *words, "--output", str(tmp_path / "out"), "--quiet"])


def forbid(monkeypatch: pytest.MonkeyPatch, owner: type, *names: str) -> None:
    """From here on, calling these methods is an error: what they gave before must have been kept."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this was done before")

    for name in names:
        monkeypatch.setattr(owner, name, refuse)


def test_weights_are_those_of_known_accuracies(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curate_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    domains = []
    for name, right in (("a", 3), ("b", 0)):
        rows = [{"prompt": f"{name} {i}", "response": "r", "right": float(i < right)} for i in range(4)]
        # Every example is held out in one of the two halves, four in each: equal rows make the shares known.
        domains.append({"name": name, "source": write_rows(tmp_path / f"{name}.jsonl", rows)})
    reward = {"kind": "python", "function": "curate_reward:right", "low": 0, "high": 1}
    del given["hard_examples"]
    given |= {"kind": "error_weights", "error_weights": {"reward": reward, "max_new_tokens": 2}}
    given["data"] |= {"validation_fraction": 0.75, "domains": domains}
    assert run(tmp_path, given) == 0
    out = tmp_path / "out"
    measured = json.loads((out / "accuracy.json").read_text())
    assert measured["b"]["accuracy"] == 0 and measured["a"]["asked"] == 3 and measured["a"]["right"] in (2, 3)
    ratios = np.sqrt([1 - measured["a"]["right"] / 3, 1])
    prior = yaml.safe_load((out / "weights.yaml").read_text())["prior"]
    np.testing.assert_allclose([prior["a"], prior["b"]], ratios / ratios.sum())
    assert SearchConfig(prior=prior, penalty=1.0).prior == prior
    # "b 0", "b 1" and "b 2" have one word of three in common.
    cases = read(out, "bad_cases.jsonl")
    assert [case["domain"] for case in cases].count("b") == 3 and all(case["right"] == 0 for case in cases)
    assert len(cases) == measured["a"]["bad_cases"] + measured["b"]["bad_cases"]
    assert run(tmp_path, given, "error_weights.similarity=0.3") == 0
    assert [case["domain"] for case in read(out, "bad_cases.jsonl")].count("b") == 1
    about = json.loads((out / "curation.json").read_text())
    assert about["files"] == ["accuracy.json", "bad_cases.jsonl", "weights.yaml"]
    assert about["config"]["error_weights"]["similarity"] == 0.3


def test_hard_examples_become_requests_and_answers_data(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given["training"] = TRAINING
    assert run(tmp_path, given) == 0
    out = tmp_path / "out"
    requests = read(out, "requests.jsonl")
    # The student knows the letters; the two of d, one answer to which is wrong whatever it says, are two or more.
    asked = {row["id"] for row in requests}
    assert asked & {"x3", "x7", "x11", "x15"} and asked < {f"x{i}" for i in range(16)} and "y" not in asked
    assert all(row["seed_prompt"] in row["prompt"] and row["reply"] != row["seed_response"] for row in requests)

    # With another question to the same replies, nothing is trained or sampled again: a perfect student asks nothing.
    forbid(monkeypatch, Trainer, "fit")
    forbid(monkeypatch, Deployed, "sample")
    assert run(tmp_path, given, "hard_examples.reward={kind: regex, pattern: '.*'}") == 0
    assert not read(out, "requests.jsonl") and not (out / "grown.jsonl").exists()

    first, second = sorted(asked)[:2]
    answers = [{"id": first, "prompt": "e", "response": "E"}, {"id": second, "prompt": "a", "response": "A"}]
    path = write_rows(tmp_path / "answers.jsonl", answers)
    assert run(tmp_path, given, f"hard_examples.answers={path}") == 0
    grown = load_examples(DomainConfig(name="g", source=str(out / "grown.jsonl")))
    assert len(grown) == 18 and (grown[-1].prompt, grown[-1].response) == ("e", "E")
    assert grown[-1].meta == {"augmented": True, "seed": first} and grown[16].meta == {"augmented": True}
    assert [row["prompt"] for row in read(out, "dropped.jsonl")] == ["a"]

    for rows in ([{"id": "y", "prompt": "e", "response": "E"}], answers[:1] * 2, [{"id": first, "prompt": "e"}]):
        write_rows(tmp_path / "answers.jsonl", rows)
        assert run(tmp_path, given, f"hard_examples.answers={path}") == 2
    # A run without answers leaves none of those that an earlier one added, and nothing that is not ours is touched.
    (out / "mine.txt").write_text("mine")
    assert (out / "grown.jsonl").exists() and run(tmp_path, given) == 0
    assert not (out / "grown.jsonl").exists() and (out / "mine.txt").exists() and (out / "requests.jsonl").exists()
    (out / "curation.json").write_text("{}")
    assert run(tmp_path, given) == 2


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260K")
def test_a_model_writes_its_own_examples(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = ["Once upon a time, there was a little girl.", "One day, Tom saw a big dog.", "Lily had a red ball."]
    rows = [{"prompt": text, "response": "She was happy."} for text in starts]
    del given["hard_examples"]
    given |= {
        "kind": "self_guide",
        "model": {"source": str(STORIES)},
        "self_guide": {
            "instruction": "Go on.",
            "count": 4,
            "attempts": 16,
            "demonstrations": 2,
            "max_input_tokens": 12,
            "max_output_tokens": 12,
            "batch_size": 4,
        },
    }
    given["data"] |= {"max_length": 256, "buckets": [256]}
    given["data"]["domains"][0]["source"] = write_rows(tmp_path / "s.jsonl", rows)
    assert run(tmp_path, given) == 0
    out = tmp_path / "out"
    before = [(out / name).read_bytes() for name in ("synthetic.jsonl", "dropped.jsonl")]
    new = load_examples(DomainConfig(name="n", source=str(out / "synthetic.jsonl")))
    prompts = [example.prompt for example in new]
    assert 1 <= len(new) <= 4 and len(set(prompts)) == len(new) and not set(prompts) & set(starts)
    assert all(example.meta["augmented"] is True for example in new)
    reasons = {row["reason"] for row in read(out, "dropped.jsonl")}
    assert reasons <= {
        *("noise in the input", "repeated", "length of the input", "noise in the output", "length of the output")
    }
    # Part by part, what is there is not sampled again.
    parts = sorted((out / "work").glob("replies-*"))
    assert len(parts) >= 2
    forbid(monkeypatch, Deployed, "sample")
    assert run(tmp_path, given) == 0
    assert before == [(out / name).read_bytes() for name in ("synthetic.jsonl", "dropped.jsonl")]
    assert run(tmp_path, given, "data.max_length=32", "data.buckets=[32]") == 2
    assert "with 2 demonstrations and an input is longer than data.max_length (32" in capsys.readouterr().err


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260K")
def test_demonstrations_that_the_model_wrote_too_long_are_left_out(tmp_path: Path, given: dict[str, Any]) -> None:
    del given["hard_examples"]
    given |= {
        "kind": "self_guide",
        "model": {"source": str(STORIES)},
        "self_guide": {
            "instruction": "Go on.",
            "count": 12,
            "attempts": 12,
            "demonstrations": 6,
            "max_input_tokens": 48,
            "max_output_tokens": 2,
            "batch_size": 4,
        },
    }
    # Six of these short inputs fit, and no six inputs of 48 tokens.
    given["data"] |= {"max_length": 200, "buckets": [200]}
    rows = [{"prompt": text, "response": "b"} for text in "abcdef"]
    given["data"]["domains"][0]["source"] = write_rows(tmp_path / "s.jsonl", rows)
    lengths: list[int] = []
    made = self_guide.input_prompt

    def input_prompt(instruction: str, inputs: Iterable[str]) -> str:
        lengths.append(len(list(inputs)))
        return made(instruction, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_guide, "input_prompt", input_prompt)
        assert run(tmp_path, given) == 0
    # The first batch shows six given inputs; later ones have prompts that are tried again with fewer.
    assert lengths[:4] == [6] * 4 and min(lengths) < 6
    assert read(tmp_path / "out", "synthetic.jsonl") or read(tmp_path / "out", "dropped.jsonl")


def test_support_splits_the_data(tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = "import pathlib\n\ndef shares(document, claim):\n    pathlib.Path('calls').open('a').write('.')\n"
    (tmp_path / "curate_support.py").write_text(calls + "    return float(claim.strip('.') in document)\n")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": "good", "prompt": "?", "response": "It rained. It was cold.", "passage": "It rained. Yes. It was cold."},
        {"id": "bad", "prompt": "?", "response": "It rained. It was hot.", "passage": "It rained. It was cold."},
    ]
    for name in ("hard_examples", "model"):
        del given[name]
    grounded = {"scorer": "function", "function": "curate_support:shares", "document": "passage", "chunk_words": 2}
    given |= {"kind": "grounded", "grounded": grounded}
    given["data"]["domains"] = [{"name": "g", "source": write_rows(tmp_path / "g.jsonl", rows)}]
    assert run(tmp_path, given) == 0
    out = tmp_path / "out"
    assert [row["id"] for row in read(out, "supported.jsonl")] == ["good"]
    (bad,) = read(out, "unsupported.jsonl")
    assert bad["id"] == "bad" and bad["support"] == 0 and bad["passage"] == rows[1]["passage"]
    claims = {row["id"]: [claim["support"] for claim in row["claims"]] for row in read(out, "support.jsonl")}
    assert claims == {"good": [1, 1], "bad": [1, 0]}
    # Two claims and three chunks, two claims and two chunks; asked once.
    assert len((tmp_path / "calls").read_text()) == 10
    assert run(tmp_path, given, "grounded.threshold=0") == 0
    assert len((tmp_path / "calls").read_text()) == 10


def test_wrong_labels_are_found_and_people_correct_them(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = []
    for i in range(24):
        right = i % 2
        rows.append({"id": f"q{i}", "prompt": "ab"[right], "choices": ["A", "B"], "answer_index": right})
        rows[-1] |= {"response": f"({'AB'[right]})", "answer": "AB"[right]}
    for wrong in (4, 7):
        rows[wrong]["answer_index"] = 1 - rows[wrong]["answer_index"]
    del given["hard_examples"]
    given |= {"kind": "active_correction", "training": TRAINING, "active_correction": {"folds": 2}}
    given["data"]["domains"][0]["source"] = write_rows(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out"
    assert run(tmp_path, given, "active_correction.correct_above=1") == 0
    same = {"prompt": "prompt", "response": "response", "answer_index": "answer_index"}
    kept = read(out, "corrected.jsonl")
    assert [[row[name] for name in same] for row in kept] == [[row[name] for name in same] for row in rows]
    assert not read(out, "check.jsonl") and not read(out, "changes.jsonl")

    assert run(tmp_path, given, "active_correction={folds: 2, correct_above: 1, budget: 1, drop: 1}") == 0
    (check,) = read(out, "check.jsonl")
    changes = {row["action"]: row["id"] for row in read(out, "changes.jsonl")}
    assert {changes["to check"], changes["dropped"]} == {"q4", "q7"} and changes["to check"] == check["id"]
    assert check["suggestion"] == 1 - check["answer_index"] and 0 < check["suspicion"] < 1
    assert changes["dropped"] not in {row["id"] for row in read(out, "corrected.jsonl")}

    # What people say is kept in every later round; a label that they confirm is left alone.
    answers = write_rows(tmp_path / "answers.jsonl", [{"id": check["id"], "answer_index": check["suggestion"]}])
    words = f"active_correction={{folds: 2, correct_above: 0.5, answers: {answers}}}"
    assert run(tmp_path, given, words) == 0
    actions = {row["id"]: row["action"] for row in read(out, "changes.jsonl")}
    assert actions == {check["id"]: "people", changes["dropped"]: "corrected"}
    fixed = {
        example.id: example for example in load_examples(DomainConfig(name="f", source=str(out / "corrected.jsonl")))
    }
    for name in ("q4", "q7"):
        right = int(name[1:]) % 2
        assert (fixed[name].answer_index, fixed[name].response, fixed[name].answers) == (right, "AB"[right], ())
    write_rows(tmp_path / "answers.jsonl", [{"id": check["id"], "answer_index": 2}])
    assert run(tmp_path, given, words) == 2


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260K")
def test_stories_calibrate_a_model_of_stories_better_than_digits(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, things = ["Lily", "Tom", "Ben", "Mia"], ["ball", "dog", "tree", "cake"]
    stories = [
        {"prompt": "", "response": f"Once upon a time, {name} saw a big {thing}. {name} was happy and ran to play."}
        for name in names
        for thing in things
    ]
    rng = np.random.default_rng(0)
    digits = [{"prompt": "", "response": " ".join(map(str, rng.integers(10, 99, 16)))} for _ in stories]
    del given["hard_examples"]
    given |= {
        "kind": "calibration",
        "model": {"source": str(STORIES)},
        "calibration": {"sparsity": 0.5, "examples": 8, "batch_size": 8},
    }
    given["data"] = {
        "validation_fraction": 0.25,
        "max_length": 64,
        "domains": [
            {"name": "stories", "source": write_rows(tmp_path / "stories.jsonl", stories)},
            {"name": "digits", "source": write_rows(tmp_path / "digits.jsonl", digits)},
        ],
    }
    held_out = write_rows(tmp_path / "held_out.jsonl", stories[::3])
    words = f"calibration.held_out=[{{name: h, source: {held_out}}}]"
    assert run(tmp_path, given, words) == 0
    out = tmp_path / "out"
    measured = json.loads((out / "perplexities.json").read_text())
    assert measured["chosen"] == "stories"
    assert measured["before"] < measured["sets"]["stories"] < measured["sets"]["digits"]
    assert len(read(out, "calibration.jsonl")) == 8
    forbid(monkeypatch, Deployed, "log_probs")
    assert run(tmp_path, given, words) == 0
    assert measured == json.loads((out / "perplexities.json").read_text())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kind=calibration"], "hard_examples has no meaning for a curation of kind 'calibration'; leave it out."),
        (["hard_examples=null"], "hard_examples is missing; a curation of kind 'hard_examples' needs it."),
        (["model=null"], "model is missing; a curation of kind 'hard_examples' needs it."),
        (["data.validation_fraction=0.1"], "data.validation_fraction is 0.1; it must be 0 for a curation of kind"),
        (["hard_examples.rouge=1"], "hard_examples.rouge is not a field; did you mean hard_examples.rouge_l?"),
        (["hard_examples.rouge_l=2"], "hard_examples.rouge_l is 2.0; it must be in [0, 1]."),
        (
            ["kind=error_weights", "hard_examples=null", "error_weights={reward: {kind: exact_match}}"],
            "data.validation_fraction is 0.0; it must be greater than 0 for a curation of kind 'error_weights'",
        ),
        (
            ["kind=active_correction", "hard_examples=null", "active_correction={}"],
            "training is missing; a curation of kind 'active_correction' needs it.",
        ),
        (
            ["kind=grounded", "hard_examples=null", "grounded={scorer: judge, model: x}"],
            "model has no meaning for a curation of kind 'grounded', whose section has its own model.",
        ),
        (
            ["kind=grounded", "hard_examples=null", "model=null", "grounded={scorer: function, model: x}"],
            "grounded.function is missing; the scorer 'function' needs it.",
        ),
        (
            ["kind=self_guide", "hard_examples=null", "self_guide={instruction: x, noise: ['(']}"],
            "self_guide.noise.0 is '(', no regular expression",
        ),
        (
            ["kind=calibration", "hard_examples=null", "calibration={examples: 99}", "data.validation_fraction=0.1"],
            "fewer than calibration.examples (99).",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert run(tmp_path, given, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_one_process_at_a_time(tmp_path: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert run(tmp_path, given) == 2
    assert "Another process curates into" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("curate_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_DATA", "data")
    assert configs.load_curation(path).name == path.stem
