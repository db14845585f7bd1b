"""What a job reads is kept in its folder: the same examples and tokens as in memory, made once."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from duet_jax.config import DataConfig, DomainConfig
from duet_jax.data import Example, domains, encode, keeping, token_files, tokenised
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.data.texts import Texts
from duet_jax.errors import DataError
from duet_jax.reading import encode_all, load_all, rows_left

TOKENIZER = CharacterTokenizer("\nabcdefgh")


def write(path: Path, count: int = 40) -> Path:
    rows = [{"id": i % 30, "prompt": "ab" * (i % 5), "response": "cde"[: 1 + i % 3], "n": [i]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(*sources: Path | str, **changes: Any) -> DataConfig:
    specs = [DomainConfig(name=f"d{i}", source=str(source), **changes) for i, source in enumerate(sources)]
    return DataConfig(domains=tuple(specs), validation_fraction=0.2)


def cut(path: Path, left: int) -> None:
    """Puts the beginning of a file into its place; whoever has mapped the file still has all of it."""
    content = path.read_bytes()[:left]
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the domains that were parsed, in order."""
    names: list[str] = []

    def noted(spec: DomainConfig) -> Any:
        names.append(spec.name)
        yield from domains.parsed(spec)

    monkeypatch.setattr(keeping, "parsed", noted)
    return names


@pytest.mark.parametrize("changes", [{}, {"max_examples": 17}, {"response": None}])
def test_kept_examples_are_split_as_those_in_memory(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = config(write(tmp_path / "a.jsonl"), "synthetic:cipher", **changes)
    for inside, outside in zip(load_all(source, 3), load_all(source, 3, tmp_path / "kept"), strict=True):
        assert tuple(outside.train) == inside.train and tuple(outside.validation) == inside.validation
    first, second = load_all(source, 3, tmp_path / "kept")
    assert isinstance(first.train, Texts) and isinstance(first.validation, Texts), "texts stay in their file"
    assert isinstance(second.train, tuple), "what is generated is in no file"


def test_sources_are_parsed_again_when_they_change(tmp_path: Path, parsed: list[str]) -> None:
    source, folder = write(tmp_path / "a.jsonl"), tmp_path / "kept"
    found = load_all(config(source), 0, folder)[0]
    load_all(config(source), 5, folder)
    load_all(config(source, max_examples=3), 0, folder)
    assert parsed == ["d0"], "other splits are of the same examples"
    os.utime(source, ns=(1, 1))
    touched = load_all(config(source), 0, folder)[0]
    assert parsed == ["d0"] * 2 and isinstance(found.train, Texts) and isinstance(touched.train, Texts)
    assert found.train.digest == touched.train.digest, "so that its tokens are those it had"
    write(source, 41)
    grown = load_all(config(source), 0, folder)[0]
    assert parsed == ["d0"] * 3 and len(grown.train) + len(grown.validation) == 41
    (folder / f".{next(folder.glob('examples-*.arrow')).name}.killed.tmp").touch()
    for path in folder.glob("examples-*.arrow"):
        cut(path, -20)
    assert list(load_all(config(source), 0, folder)[0].train) == list(grown.train)
    assert parsed == ["d0"] * 4, "one that is cut is made anew"
    assert not list(folder.glob(".examples-*")), "what a killed run left is removed"


def test_folders_are_known_by_the_files_that_are_read(tmp_path: Path, parsed: list[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train-00000-of-00002.jsonl", 3)
    write(data / "train-00001-of-00002.jsonl", 4)
    assert len(load_all(config(data), 0, data / "study")[0].train) == 6
    write(data / "validation.jsonl")
    load_all(config(data), 0, data / "study")
    assert parsed == ["d0"]
    write(data / "train-00001-of-00002.jsonl", 5)
    load_all(config(data), 0, data / "study")
    assert parsed == ["d0"] * 2


def test_saved_data_sets_are_kept_too(tmp_path: Path, parsed: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["a", "b", "c"], "response": ["d", "e", "f"], "none": [None, 1, 2]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "saved"))
    for _ in range(2):
        found = load_all(config(tmp_path / "saved"), 0, tmp_path / "kept")[0]
    assert parsed == ["d0"] and tuple(found.train) == load_all(config(tmp_path / "saved"), 0)[0].train


def test_data_sets_of_the_hub_are_known_by_their_files(
    tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    table = pyarrow.table({"prompt": ["a", "b"], "response": ["c", "d"]})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "cache"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *given, **options: datasets.load_from_disk(str(tmp_path / "cache"))
    )
    for _ in range(2):
        assert isinstance(load_all(config("owner/name"), 0, tmp_path / "kept")[0].train, Texts)
    assert parsed == ["d0"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: datasets.Dataset(table))
    assert isinstance(load_all(config("owner/name"), 0, tmp_path / "kept")[0].train, tuple), "in no file"


def test_what_is_no_json_stays_in_memory(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    table = pyarrow.table({"prompt": ["a", "b"], "response": ["c", "d"], "day": [None, day]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = load_all(config(tmp_path / "a.parquet"), 0, tmp_path / "kept")[0]
    assert {example.meta.get("day") for example in (*found.train, *found.validation)} == {None, day}
    assert not list((tmp_path / "kept").glob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n'),
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{\n'),
        ("a.jsonl", "\n"),
        ("a.csv", "a"),
        ("none.jsonl", None),
        ("folder/train.txt", "x"),
    ],
)
def test_mistakes_are_told_in_the_same_words(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_text(content)
    source = config(path.parent if name.startswith("folder") else path)
    said = []
    for folder in (None, tmp_path / "kept"):
        with pytest.raises(DataError) as raised:
            load_all(source, 0, folder)
        said.append(str(raised.value))
    assert said[0] == said[1] and not list(tmp_path.glob("kept/*.arrow"))


@pytest.mark.parametrize("part", [4, 100])
def test_tokens_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(token_files, "PART", part)
    monkeypatch.setattr(tokenised, "TOGETHER", 3)
    generated = DomainConfig(name="d1", source="synthetic:cipher", options={"examples": 20, "length": 3})
    source = DataConfig(domains=(*config(write(tmp_path / "a.jsonl")).domains, generated), validation_fraction=0.2)
    options = {"chat": False, "max_length": 10}

    def tokens(tokenizer: Any = TOKENIZER) -> Any:
        named = [(domain.name, domain.train) for domain in load_all(source, 0, tmp_path / "kept")]
        return encode_all(named, tokenizer, folder=tmp_path / "kept", **options)  # type: ignore[arg-type]

    found = tokens()
    for one, domain in zip(found, load_all(source, 0), strict=True):
        wanted = encode(domain.train, TOKENIZER, **options)  # type: ignore[arg-type]
        assert (one.digest, tuple(one.ids), one.dropped) == (wanted.digest, wanted.ids, wanted.dropped)
        kept = set(wanted.ids)
        rows = [i for i, example in enumerate(domain.train) if example.id in kept]
        assert rows_left(domain.train, one).tolist() == rows
    assert found[0].dropped and not found[1].dropped

    class Idle(CharacterTokenizer):
        def encode_batch(self, texts: Any) -> Any:
            raise AssertionError("nothing is tokenised a second time")

    assert [one.digest for one in tokens(Idle(TOKENIZER.alphabet))] == [one.digest for one in found]
    (tmp_path / "kept").joinpath("tokens.lock").unlink()
    first = min((tmp_path / "kept").glob("tokens-*-00000.arrow"), key=lambda path: path.name)
    cut(first, 0)
    assert [one.digest for one in tokens()] == [one.digest for one in found], "what is cut is made anew"


def test_when_no_response_is_left_it_is_told(tmp_path: Path) -> None:
    named = [("d0", [Example(str(i), "abc", "d") for i in range(2)])]
    with pytest.raises(DataError, match="domain 'd0': no response is left of any of its 2 examples within max_length"):
        encode_all(named, TOKENIZER, chat=False, max_length=2, folder=tmp_path / "kept")
    assert encode_all([("d0", [])], TOKENIZER, chat=False, max_length=2, folder=tmp_path / "kept")[0].ids == ()


def test_rows_of_no_dropped_example_are_all() -> None:
    found = encode([], TOKENIZER, chat=False, max_length=4)
    np.testing.assert_array_equal(rows_left([], found), np.zeros(0, np.int64))
