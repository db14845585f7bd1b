"""`duet curate` of kind `clear`: decisions of models that know, the whole with a real model, and the page."""

from __future__ import annotations

import base64
import gc
import hashlib
import html.parser
import io
import json
import re
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
from duet_jax.config import ClearConfig, ConfidenceConfig, DomainConfig
from duet_jax.curate import curate
from duet_jax.curation import audit, clear
from duet_jax.curation.clear import Settled, file_of, settle
from duet_jax.curation.contradiction import OPTIONS as YES_NO
from duet_jax.curation.correction import OPTIONS as BETTER
from duet_jax.curation.decisions import Action
from duet_jax.curation.reflection import OPTIONS, READ
from duet_jax.curation.respondent import ModelRespondent, Reply
from duet_jax.data import Example, load_examples
from duet_jax.display import Display
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed
from duet_jax.training.sft import Trainer

TEMPLATES: dict[str, Any] = {
    "sample_template": "{prompt}",
    "reflection_templates": ["{prompt} {answer}\n{options}"],
    "contradiction_template": "{prompt}|{first}|{second}\n{options}",
}


def offered(text: str) -> tuple[str, dict[str, str]]:
    """A question without the options at its end, and the letters of these."""
    lines = text.splitlines()
    letters: dict[str, str] = {}
    while lines and (option := lines[-1][3:]) in (*OPTIONS, *YES_NO, *BETTER) and option not in letters:
        letters[option] = lines.pop()[0]
    return "\n".join(lines), letters


class Oracle:
    """Knows what is right of each prompt, or as a judge always says one letter; is `sure` of an option so far."""

    identity, writing, longest = "oracle", "", 10**6

    def __init__(self, right: dict[str, str], letter: str | None = None, sure: float = 1.0) -> None:
        self.right, self.letter, self.sure = right, letter, sure
        self.judged: list[str] = []

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        return [len(str(example.prompt)) for example in examples]

    def read(
        self,
        questions: Sequence[Example],
        groups: Sequence[int],
        words: Sequence[str],
        scored: Sequence[Example] = (),
        owners: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.options(questions, groups, words), np.tile([-1.0, 2.0], (len(scored), 1))

    def answers(
        self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[Reply]]:
        return [[Reply(self._answer(str(example.prompt)), True)] * samples for example in examples]

    def options(self, questions: Sequence[Example], groups: Sequence[int], words: Sequence[str]) -> np.ndarray:
        return np.array([self._one(str(question.prompt), list(words)) for question in questions])

    def _one(self, text: str, words: list[str]) -> np.ndarray:
        said = self._says(text, words)
        return np.where(np.arange(len(words)) == words.index(said), self.sure, (1 - self.sure) / (len(words) - 1))

    def _says(self, text: str, words: list[str]) -> str:
        asked, letters = offered(text)
        if "Yes" in letters:
            _, first, second = asked.rsplit("|", 2)
            return letters["No" if first == second else "Yes"]
        if "Correct" in letters:
            prompt, said = asked.removesuffix(READ.rstrip()).rstrip().rsplit(" ", 1)
            return letters["Correct" if self._answer(prompt) == said else "Incorrect"]
        self.judged.append(asked)
        return self.letter or letters[self._better(asked)]

    def _answer(self, prompt: str) -> str:
        if "#" not in prompt:
            return self.right[prompt]
        asked, letters = offered(prompt)
        return letters[self._better(asked)]

    def _better(self, asked: str) -> str:
        prompt, first, second = asked.split("#")
        right = self.right[prompt]
        return BETTER[2] if (first == right) == (second == right) else BETTER[0] if first == right else BETTER[1]


def clear_config(**changes: Any) -> ClearConfig:
    confidence = ConfidenceConfig(samples=changes.pop("samples", 2), **TEMPLATES)
    return ClearConfig(
        **{
            "correct": True,
            "threshold": 0.5,
            "preference_template": "{prompt}#{first}#{second}\n{options}",
            "confidence": confidence,
        }
        | changes
    )


RIGHT = {f"x{i}": f"w{i}" for i in range(20)}
# Every fifth target is wrong.
NOISY = [Example(f"e{i}", f"x{i}", "odd" if i % 5 == 0 else f"w{i}") for i in range(20)]


def settled(
    folder: Path,
    oracle: Oracle,
    proposals: list[list[str]],
    examples: Sequence[Example] = NOISY,
    **changes: Any,
) -> tuple[Settled, list[list[Example]]]:
    """What is decided, and what the proposing models were trained on; each iteration's `proposals` are given."""
    trained: list[list[Example]] = []

    def propose(kept: list[Example]) -> list[str]:
        trained.append(kept)
        return proposals[len(trained) - 1]

    names = ["a"] * len(examples)
    return settle(lambda: oracle, examples, names, clear_config(**changes), folder, propose), trained


def test_planted_noise_is_corrected_where_the_proposal_is_right(tmp_path: Path) -> None:
    proposals = ["odd" if i == 5 else "" if i == 10 else f"w{i}" for i in range(20)]
    oracle = Oracle(RIGHT)
    found, trained = settled(tmp_path, oracle, [proposals])
    expected = ["drop" if i in (5, 10) else "correct" if i % 5 == 0 else "keep" for i in range(20)]
    assert [decision.action for decision in found.decisions] == expected
    assert trained == [[example for example in NOISY if example.response != "odd"]]
    assert [found.decisions[0].proposal, found.decisions[0].acceptance] == ["w0", 1.0]
    # Only what differs and is not empty is judged, in both positions and three orders of options: here of x0 and x15.
    assert sorted(oracle.judged) == [
        text for text in ("x0#odd#w0", "x0#w0#odd", "x15#odd#w15", "x15#w15#odd") for _ in range(3)
    ]
    rows = audit.rows(NOISY, ["a"] * 20, found)
    assert rows[0]["first_proposal"] == rows[0]["second_proposal"] == 1.0 and rows[1]["first_proposal"] is None
    assert [rows[i]["response"] for i in (0, 1, 5)] == ["w0", "w1", None]


def test_c6_the_whole_state_machine(tmp_path: Path) -> None:
    """Every combination of a target above the threshold, a proposal that is better, and a verdict that is sure."""
    right = {"x0": "y", "x1": "y", "x2": "y", "x3": "y"}
    examples = [Example("a", "x0", "y"), Example("b", "x1", "n"), Example("c", "x2", "y"), Example("d", "x3", "n")]
    proposals = [["z", "y", "y", "z"]]
    # The acceptance is the probability of the verdict, and must be greater than eta, not equal to it.
    changes: dict[str, Any] = {"acceptance": "probability", "samples": 0}
    below, _ = settled(tmp_path, Oracle(right, sure=0.9), proposals, examples, eta=0.89, **changes)
    assert [decision.action for decision in below.decisions] == ["keep", "correct", "keep", "drop"]
    sure = below.decisions[1].acceptance
    assert sure == pytest.approx(0.9)
    at, _ = settled(tmp_path, Oracle(right, sure=0.9), proposals, examples, eta=sure, **changes)
    assert [decision.action for decision in at.decisions] == ["keep", "drop", "keep", "drop"]
    assert at.decisions[1].better and at.decisions[1].acceptance == sure
    # A target above the threshold is corrected just as well.
    low, _ = settled(tmp_path, Oracle(right, sure=0.9), proposals, examples, eta=0.89, threshold=0.01, **changes)
    assert [decision.action for decision in low.decisions] == ["keep", "correct", "keep", "keep"]


def test_c10_a_judge_of_one_letter_corrects_nothing(tmp_path: Path) -> None:
    for letter in "ABC":
        oracle = Oracle(RIGHT, letter)
        found, _ = settled(tmp_path / letter, oracle, [["new"] * 20], eta=0.0, acceptance="probability")
        assert len(oracle.judged) == 3 * 40 and not any(decision.better for decision in found.decisions)
        assert {decision.action for decision in found.decisions} == {Action.KEEP, Action.DROP}


def test_a_second_iteration_begins_with_what_the_first_left(tmp_path: Path) -> None:
    first = ["bad" if i in (5, 10) else f"w{i}" for i in range(20)]
    second = ["bad" if i in (0, 5) else f"w{i}" for i in range(20)]
    found, trained = settled(tmp_path, Oracle(RIGHT), [first, second], iterations=2)
    assert [(e.id, e.response) for e in trained[1]] == [(f"e{i}", f"w{i}") for i in range(20) if i not in (5, 10)]
    assert [found.decisions[i].action for i in (0, 1, 5, 10, 15)] == ["correct", "keep", "drop", "correct", "correct"]
    # What the first iteration corrected stays, though nothing better was found in the second.
    assert [int(found.deciding[i]) for i in (0, 1, 5, 10, 15)] == [0, 1, 1, 1, 0]
    row = audit.rows(NOISY, ["a"] * 20, found)[0]
    assert row["proposal"] == "w0" and [one["proposal"] for one in row["rounds"]] == ["w0", "bad"]


def test_a_prompt_has_one_target_in_the_end(tmp_path: Path) -> None:
    examples = [Example("a", "x0", "w0"), Example("b", "x0", "odd"), Example("c", "x0", "w0"), Example("d", "x1", "n")]
    # Another answer than the kept one is right of b alone: the judge is asked about "odd" and "w0" apart.
    oracle = Oracle({"x0": "w0", "x1": "w1"})
    found, _ = settled(tmp_path, oracle, [["w0", "w0", "w0", "w1"]], examples)
    assert [decision.action for decision in found.decisions] == ["keep", "correct", "keep", "correct"]

    class Fond(Oracle):
        def _better(self, asked: str) -> str:
            _, first, second = asked.split("#")
            return BETTER[2] if "w0" in (first, second) else BETTER[0] if first == "new" else BETTER[1]

    fond = Fond({"x0": "w0", "x1": "w1"})
    found, _ = settled(tmp_path / "fond", fond, [["new"] * 4], examples)
    # "new" is better than "odd", but not than "w0", which stays.
    assert [decision.action for decision in found.decisions] == ["keep", "drop", "keep", "correct"]
    assert found.decisions[1].beaten and found.decisions[1].better


def test_equal_confidences_and_no_samples(tmp_path: Path) -> None:
    clean = [Example(f"e{i}", f"x{i}", f"w{i}") for i in range(4)]
    found, _ = settled(tmp_path, Oracle(RIGHT), [], clean, samples=0, correct=False, threshold=None)
    assert found.level == ("a",) and {decision.action for decision in found.decisions} == {Action.KEEP}
    assert not found.rounds and audit.rows(clean, ["a"] * 4, found)[0]["eta"] is None
    wrong = [Example(f"e{i}", f"x{i}", "odd") for i in range(4)]
    with pytest.raises(DataError, match=r"No target has a confidence above its threshold \(0.5\)"):
        settled(tmp_path, Oracle(RIGHT), [], wrong)


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
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [
        {"messages": [{"role": "user", "content": f"{'abc'[i % 3]}?"}, {"role": "assistant", "content": "ABC"[i % 3]}]}
        for i in range(4)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    small = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    return {
        "name": "c",
        "kind": "clear",
        "seed": 1,
        "model": {"scratch": small},
        "training": {"method": "full", "learning_rate": 0.02, "batch_size": 4, "epochs": 4, "schedule": "constant"},
        "data": {
            "validation_fraction": 0,
            "max_length": 192,
            "buckets": [32, 192],
            "domains": [
                {"name": "a", "source": str(tmp_path / "a.jsonl")},
                {"name": "b", "source": str(tmp_path / "b.jsonl"), "messages": "messages"},
            ],
        },
        "clear": {
            "correct": True,
            "eta": 0.2,
            "acceptance": "probability",
            "preference_template": "#{prompt}#{first}#{second}\n{options}",
            "max_new_tokens": 2,
            "confidence": {**TEMPLATES, "samples": 2, "max_new_tokens": 2, "batch_size": 8},
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
    assert not list(out.glob("work/*/*"))


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"'><svg onload='alert(1)'>&lt;b&gt; &amp;",
    "line\u2028separator\u2029and\u0085 \u202eright to left\u202c \x00\x1f",
    "{{ 7 * 7 }} {% raw %}",
    "\\u003c ${alert(1)} `",
]


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and what stands in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def test_the_page_holds_hostile_texts_as_texts(tmp_path: Path) -> None:
    right = {text: f"right {i}" for i, text in enumerate(HOSTILE)}
    examples = [Example(text, text, text) for text in HOSTILE]

    class Calm(Oracle):
        def _says(self, text: str, words: list[str]) -> str:
            return words[0]

    found, _ = settled(tmp_path, Calm(right), [HOSTILE[::-1]], examples, threshold=0.0, acceptance="probability")
    rows = audit.rows(examples, HOSTILE, found)
    page = audit.page(rows)
    parsed = Tags()
    parsed.feed(page)
    assert len(parsed.scripts) == 3 and {tag for tag, _ in parsed.tags} & {"img", "svg"} == set()
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    # Nothing but the two blocks of JSON and our own script, which the page allows by its hash.
    read = json.loads(parsed.scripts[0])
    assert [dict(zip(read["columns"], row, strict=True)) for row in read["rows"]] == rows
    assert json.loads(parsed.scripts[1])["domains"] == HOSTILE
    (policy,) = [a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[2].encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    # In the blocks no character that could end one, or a line of a script.
    for block in re.findall(r'type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        assert not re.search("[<>&\u2028\u2029]", block)
    # Nothing is fetched, and texts enter the page as nodes of text.
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", page.split("<main>")[0])
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import", parsed.scripts[2]
    )


def test_numbers_that_are_missing_are_null_everywhere(tmp_path: Path) -> None:
    examples = [Example("e", "x0", "w0"), Example("f", "x1", "w1")]
    found, _ = settled(tmp_path, Oracle(RIGHT), [], examples, samples=0, correct=False)
    rows = audit.rows(examples, ["a", "b"], found)
    assert rows[0]["similarity"] is None and rows[0]["samples"] == [] and rows[0]["rounds"] == []
    assert pyarrow.parquet.read_table(io.BytesIO(audit.parquet(rows))).to_pylist() == rows
    assert "NaN" not in audit.page(rows).split('id="data"')[1].split("</script>")[0]
