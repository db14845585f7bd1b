from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from duet_jax.data import load_domains, load_examples
from duet_jax.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
DEFAULTS = {
    "name": "d",
    "split": "train",
    "prompt": "prompt",
    "response": "response",
    "messages": None,
    "max_examples": None,
    "options": {},
}
ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"question {i}",
        "response": f"answer {i}",
        "choices": ["a", "b"],
        "answer_index": i % 2,
        "meta": {"answer": str(i)} if i % 3 else {"style": "x", "answers": ["u", "v"]},
    }
    for i in range(12)
]


def _spec(source, **fields):
    """The fields of duet_jax.config.DomainConfig that loading reads."""
    return SimpleNamespace(**(DEFAULTS | {"source": str(source)} | fields))


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _error(spec):
    with pytest.raises(DataError) as caught:
        load_examples(spec)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"domain '{spec.name}'"), message
    return message


def test_all_formats_give_equal_examples(tmp_path):
    lines = _write(tmp_path / "rows.jsonl", ROWS)
    expected = load_examples(_spec(lines))
    first = expected[1]
    assert (first.id, first.prompt, first.response) == ("r1", "question 1", "answer 1")
    assert (first.choices, first.answer_index, first.answers) == (("a", "b"), 1, ("1",))
    assert expected[0].answers == ("u", "v") and expected[0].meta["style"] == "x"

    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=5)
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "plain").mkdir()
    _write(tmp_path / "plain" / "train.jsonl", ROWS)
    _write(tmp_path / "plain" / "train-extra.jsonl", ROWS)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for shard, part in enumerate((ROWS[:7], ROWS[7:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"train-0000{shard}-of-00002.parquet")
    for source in ("rows.json", "rows.parquet", "saved", "dict", "plain", "hub"):
        assert load_examples(_spec(tmp_path / source)) == expected, source
    assert len(load_examples(_spec(tmp_path / "dict", split="test"))) == 1


def test_columns_are_mapped_and_others_kept(tmp_path):
    path = _write(tmp_path / "x.jsonl", [{"q": "hi", "a": "ho", "level": 3}, {"q": "", "a": "x", "level": None}])
    first, second = load_examples(_spec(path, prompt="q", response="a"))
    assert (first.prompt, first.response, dict(first.meta), first.id) == ("hi", "ho", {"level": 3}, "d/1")
    assert (second.prompt, dict(second.meta), second.id) == ("", {}, "d/2")


def test_the_last_assistant_message_is_the_response(tmp_path):
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
    ]
    path = _write(tmp_path / "x.jsonl", [{"chat": turns}])
    (example,) = load_examples(_spec(path, messages="chat"))
    assert example.response == "4" and example.prompt == tuple(turns[:3])
    for bad, text in (
        ("hi", "has malformed messages"),
        ([{"role": "user"}], "has malformed messages"),
        ([{"role": "user", "content": "1"}], "has no message with the role 'assistant'"),
        ([{"role": "assistant", "content": " "}], "has an empty response"),
    ):
        message = _error(_spec(_write(tmp_path / "y.jsonl", [{"chat": bad}]), messages="chat"))
        assert f"y.jsonl, line 1 {text}" in message


def test_prompts_without_responses(tmp_path):
    path = _write(tmp_path / "x.jsonl", [{"prompt": "p", "answer": "4"}, {"prompt": "q", "response": "not read"}])
    first, second = load_examples(_spec(path, response=None))
    assert (first.prompt, first.response, first.answers) == ("p", "", ("4",))
    assert (second.prompt, second.response) == ("q", "")
    turns = [
        {"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    ]
    chat = _write(tmp_path / "c.jsonl", [{"chat": turns}])
    (example,) = load_examples(_spec(chat, messages="chat", response=None))
    assert example.prompt == tuple(turns[:3]) and example.response == ""
    chat = _write(tmp_path / "c.jsonl", [{"chat": turns[1:2]}])
    assert "line 1 has no message with the role 'user' to reply to" in (
        _error(_spec(chat, messages="chat", response=None))
    )
    walks = load_examples(_spec("synthetic:walk", response=None, options={"examples": 3}))
    assert [walk.response for walk in walks] == [""] * 3 and all(walk.prompt for walk in walks)


def test_repeated_ids_are_made_unique(tmp_path):
    rows = [{"id": i, "prompt": "", "response": "x"} for i in ("a", "a", 7, "a#2", "a")]
    ids = [e.id for e in load_examples(_spec(_write(tmp_path / "x.jsonl", rows)))]
    assert ids[:3] == ["a", "a#2", "7"] and len(set(ids)) == 5


def test_a_row_without_the_mapped_column_names_file_and_line(tmp_path):
    path = _write(tmp_path / "x.jsonl", [*ROWS[:2], {"prompt": "p", "reply": "r"}])
    assert f"{path}, line 3 has no column 'response' (mapped as the response); its columns are prompt, reply" in (
        _error(_spec(path))
    )
    assert f"{path}, line 1 has no column 'question' (mapped as the prompt)" in _error(_spec(path, prompt="question"))
    assert "line 1 has no column 'messages' (mapped as the messages)" in _error(_spec(path, messages="messages"))
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p"}]), path)
    assert f"{path}, row 1 has no column 'response'" in _error(_spec(path))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "p", "response": 3}', "line 2 has a value of type int in the column 'response'"),
        ('{"prompt": null, "response": "r"}', "line 2 has a value of type NoneType in the column 'prompt'"),
        ('{"prompt": "p", "response": " \\n"}', "line 2 has an empty response"),
        ('{"prompt": "p", "response": "\\ud800"}', "line 2 holds half of a surrogate pair"),
        ('{"prompt": "p", ', "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 holds a JSON list; each row must be an object"),
        (
            '{"prompt": "p", "response": "r", "choices": ["a"], "answer_index": 1}',
            "line 2 has answer_index 1, which must be an integer from 0 to 0",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, text):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    assert f"{path}, {text}" in _error(_spec(path))


def test_blank_lines_and_unicode_line_separators_do_not_shift_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps({"prompt": "a\u2028b", "response": "r"}, ensure_ascii=False)
    path.write_text("\ufeff" + good + "\n\n" + good + "\n{}\n", encoding="utf-8")
    assert "line 4 has no column 'prompt'" in _error(_spec(path))
    path.write_bytes(b"\xff\xfe\n")
    assert "line 1 is not UTF-8 text" in _error(_spec(path))


def test_missing_empty_and_unreadable_sources(tmp_path):
    missing = tmp_path / "no.jsonl"
    assert f"there is no file or folder '{missing}'" in _error(_spec(missing))
    for name, content in (("x.jsonl", "\n"), ("x.json", "[]")):
        (tmp_path / name).write_text(content)
        assert f"is empty: '{tmp_path / name}' has no rows" in _error(_spec(tmp_path / name))
    (tmp_path / "x.csv").write_text("a,b\n")
    assert "is of an unknown type; its name must end in one of .jsonl, .json, .parquet" in _error(
        _spec(tmp_path / "x.csv")
    )
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    assert "bad.parquet is not a readable Parquet file" in _error(_spec(tmp_path / "bad.parquet"))
    (tmp_path / "bad.json").write_text("[{,]")
    assert "bad.json, line 1 is not valid JSON" in _error(_spec(tmp_path / "bad.json"))
    assert "is of an unknown type" in _error(_spec("s3://bucket/x"))


def test_folders_say_what_they_have(tmp_path):
    _write(tmp_path / "eval.jsonl", ROWS)
    assert "has no file of the split 'train' (such as train.jsonl); it has eval.jsonl" in _error(_spec(tmp_path))
    _write(tmp_path / "eval.json", ROWS)
    assert "has the split 'eval' more than once (eval.json, eval.jsonl)" in _error(_spec(tmp_path, split="eval"))
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(saved))
    assert "has no split 'test'; it has train" in _error(_spec(saved, split="test"))


def test_an_unreachable_hub_name_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("cannot reach the hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "its split 'train' could not be loaded from the Hugging Face hub (ConnectionError: cannot reach the " in (
        _error(_spec("owner/name"))
    )


def test_a_hub_name_is_loaded_by_the_datasets_library(monkeypatch, tmp_path):
    asked = []

    def load(repository, configuration, *, split):
        asked.append((repository, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = load_examples(_spec(_write(tmp_path / "x.jsonl", ROWS)))
    assert load_examples(_spec("owner/name:main", split="test")) == expected
    assert load_examples(_spec("owner/name")) == expected
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, "train")]


def test_split_is_disjoint_ordered_and_independent_of_other_domains(tmp_path):
    path = _write(tmp_path / "x.jsonl", [{"id": i, "prompt": "", "response": "x"} for i in range(100)])
    specs = [_spec(path, name="a"), _spec(path, name="b")]
    a, b = load_domains(specs, validation_fraction=0.2, seed=0)
    assert (len(a.train), len(a.validation), a.name, a.source) == (80, 20, "a", str(path))
    assert {e.id for e in a.train} | {e.id for e in a.validation} == set(map(str, range(100)))
    assert [int(e.id) for e in a.train] == sorted(int(e.id) for e in a.train)
    assert a.validation != b.validation
    assert load_domains(specs[:1], validation_fraction=0.2, seed=0) == [a]
    (other,) = load_domains(specs[:1], validation_fraction=0.2, seed=1)
    assert other.validation != a.validation
    (none,) = load_domains(specs[:1], validation_fraction=0.0, seed=0)
    assert len(none.train) == 100 and none.validation == ()


def test_small_domains_keep_a_training_example(tmp_path):
    for count, expected in ((1, (1, 0)), (2, (1, 1)), (3, (1, 2))):
        path = _write(tmp_path / f"{count}.jsonl", ROWS[:count])
        (domain,) = load_domains([_spec(path)], validation_fraction=0.7, seed=0)
        assert (len(domain.train), len(domain.validation)) == expected


def test_max_examples_is_a_seeded_subsample_in_source_order(tmp_path):
    path = _write(tmp_path / "x.jsonl", ROWS)
    chosen = [[e.id for e in load_examples(_spec(path, max_examples=5), seed=s)] for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 5
    assert chosen[0] == sorted(chosen[0], key=lambda i: int(i[1:]))
    assert len(load_examples(_spec(path, max_examples=50))) == 12
    assert "max_examples must be at least 1, not 0" in _error(_spec(path, max_examples=0))


def test_duplicate_names_fail_before_anything_is_read():
    specs = [_spec("/nowhere.jsonl", name="a"), _spec("/nowhere.jsonl", name="a")]
    with pytest.raises(DataError, match="two domains are named 'a'; every domain needs its own name"):
        load_domains(specs, validation_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"validation_fraction must be in \[0, 1\), not 1.0"):
        load_domains(specs[:1], validation_fraction=1.0, seed=0)


def test_the_real_domains_load():
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here")
    folders = sorted(p for p in SHARED.iterdir() if (p / "train.jsonl").is_file())
    specs = [_spec(p / "train.jsonl", name=p.name) for p in folders]
    domains = load_domains(specs, validation_fraction=0.1, seed=0)
    assert len(domains) == 34
    total = 0
    for folder, domain in zip(folders, domains, strict=True):
        with (folder / "train.jsonl").open("rb") as file:
            rows = sum(1 for _ in file)
        assert len(domain.train) + len(domain.validation) == rows
        assert abs(len(domain.validation) - 0.1 * rows) <= 1
        assert len({e.id for e in (*domain.train, *domain.validation)}) == rows
        total += rows
    assert total == 41163
    by_name = {domain.name: domain for domain in domains}
    assert all(len(e.answers) >= 1 for e in by_name["gsm8k"].train)
    assert all(e.choices and e.answer_index is not None for e in by_name["arc"].train)
    # A folder with the split's name is the same source.
    assert load_examples(_spec(SHARED / "arc", split="eval", name="arc")) == load_examples(
        _spec(SHARED / "arc" / "eval.jsonl", name="arc")
    )
