"""Rows in flat arrays are what tuples of arrays were; in files they and their texts are the same again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.data import Encoded, Example, encode, join, token_files
from duet_jax.data.arrow import open_file
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.data.rows import Rows
from duet_jax.data.texts import NotPlain, Texts, ids_of, taken, write_texts
from duet_jax.data.token_files import TokenFiles
from duet_jax.errors import DataError

LENGTHS = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=4)


def arrays(lengths: list[int], first: int) -> list[np.ndarray]:
    return [np.arange(first + row, first + row + length, dtype=np.int32) for row, length in enumerate(lengths)]


@given(lengths=LENGTHS, data=st.data())
def test_rows_are_what_arrays_of_their_own_are(lengths: list[list[int]], data: st.DataObject) -> None:
    plain = [arrays(part, 100 * number) for number, part in enumerate(lengths)]
    wanted = [row for part in plain for row in part]
    rows = Rows.join([Rows.of(part) for part in plain])
    assert len(rows) == len(wanted) and rows.lengths.dtype == np.int32
    assert rows.lengths.tolist() == [len(row) for row in wanted]
    chosen = data.draw(st.lists(st.integers(-len(wanted), len(wanted) - 1), max_size=9)) if wanted else []
    some = rows.take(np.array(chosen, np.int64))
    for found, expected in ((rows, wanted), (some, [wanted[i] for i in chosen]), (rows[1:-1], wanted[1:-1])):
        assert [row.tolist() for row in found] == [row.tolist() for row in expected]
        assert all(row.dtype == np.int32 for row in found)
    twice = Rows.join([some, rows])
    assert [row.tolist() for row in twice] == [[*wanted[i]] for i in chosen] + [[*row] for row in wanted]


def test_rows_are_views_and_end() -> None:
    rows = Rows.of(arrays([3, 2], 0))
    assert np.shares_memory(rows.take([1])[0], rows[1]) and np.shares_memory(Rows.join([rows, rows])[3], rows[1])
    with pytest.raises(IndexError):
        rows[2]


def test_the_digest_is_that_of_runs_before() -> None:
    """By which the work of earlier versions is known."""
    tokens, prompts = arrays([3, 1, 4], 5), np.array([1, 0, 2], np.int32)
    digest = hashlib.sha256()
    for row, prompt in zip(tokens, prompts, strict=True):
        digest.update(np.array([len(row), prompt], np.int64).tobytes() + row.tobytes())
    parts = [Encoded(tokens[:1], prompts[:1], ("a",)), Encoded(tokens[1:], prompts[1:], ("b", "c"))]
    assert join(parts).digest == Encoded(tuple(tokens), prompts, ("a", "b", "c")).digest == digest.hexdigest()


EXAMPLES = [
    Example("whole", "ab", "cd", meta={"topic": "é", "n": 1, "x": 0.1, "none": None, "list": [{"a": [True]}]}),
    Example("half \ud800", "", "a" * 30, ("x", "y"), 1, ("y",)),
    Example("gone", "b" * 30, "c"),
    Example("chat", ({"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}), "d"),
]


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    write_texts(tmp_path / "t.arrow", "key", EXAMPLES)
    found = Texts.open(tmp_path / "t.arrow", "key")
    assert found is not None
    return found


def test_examples_come_back_from_their_file_as_they_were(texts: Texts, tmp_path: Path) -> None:
    assert list(texts) == EXAMPLES and texts[-1] == EXAMPLES[-1] and len(texts) == 4
    assert list(texts[1:3]) == EXAMPLES[1:3] and list(texts[1:][::2]) == [EXAMPLES[1], EXAMPLES[3]]
    some = taken(texts, np.array([2, 0]))
    assert (
        isinstance(some, Texts)
        and list(some) == [EXAMPLES[2], EXAMPLES[0]]
        and list(ids_of(some))
        == [
            "gone",
            "whole",
        ]
    )
    assert list(ids_of(texts)) == list(ids_of(EXAMPLES))
    assert len({texts.digest, some.digest, texts[:3].digest}) == 3
    with pytest.raises(IndexError):
        texts[4]
    assert Texts.open(tmp_path / "t.arrow", "other") is None and Texts.open(tmp_path / "none", "key") is None


def test_what_json_does_not_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for value in (b"bytes", (1, 2), {1: 2}, np.float32(1)):
        with pytest.raises(NotPlain):
            write_texts(tmp_path / "t.arrow", "key", [*EXAMPLES, Example("x", "a", "b", meta={"list": [value]})])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(texts: Texts, tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    before = path.stat().st_ino
    write_texts(path, "key", EXAMPLES[:1])
    assert path.stat().st_ino == before and list(texts) == EXAMPLES


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_file_that_is_cut_is_none(texts: Texts, tmp_path: Path, left: int) -> None:
    path = tmp_path / "cut.arrow"
    path.write_bytes((tmp_path / "t.arrow").read_bytes()[:left])
    assert open_file(path, "key") is None
    write_texts(path, "key", EXAMPLES)
    again = Texts.open(path, "key")
    assert again is not None and list(again) == EXAMPLES


class Counting(CharacterTokenizer):
    """Counts the texts it has been given."""

    texts = 0

    def encode_batch(self, texts):  # type: ignore[no-untyped-def]
        Counting.texts += len(texts)
        return super().encode_batch(texts)


def files(folder: Path, examples: object, **changes: object) -> TokenFiles:
    given = {"tokenizer": Counting("\nabcd: ersuitn"), "chat": False, "max_length": 26} | changes
    return TokenFiles(folder=folder, name="d", examples=examples, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [1, 3, 100])
def test_tokens_in_files_are_those_in_memory(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(token_files, "PART", part)
    wanted = encode(EXAMPLES, Counting("\nabcd: ersuitn"), chat=False, max_length=26)
    assert (wanted.truncated, wanted.dropped) == (1, 1)
    for examples in (EXAMPLES, texts):
        one = files(tmp_path, examples)
        with pytest.raises(FileNotFoundError):
            one.read()
        for number in one.numbers:
            one.write(number)
        found = one.read()
        assert [row.tolist() for row in found.tokens] == [row.tolist() for row in wanted.tokens]
        for name in ("prompt_lengths", "cut", "lengths"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).dtype == getattr(wanted, name).dtype
        assert (found.digest, found.dropped, tuple(found.ids)) == (wanted.digest, wanted.dropped, wanted.ids)
        both, chosen = join([found, found]), [4, 0]
        assert tuple(both.ids) == wanted.ids * 2 and tuple(both.take(chosen).ids) == ("half \ud800", "whole")
        assert both.take(chosen).digest == join([wanted, wanted]).take(chosen).digest


def test_tokens_are_made_once_for_what_decides_them(texts: Texts, tmp_path: Path) -> None:
    Counting.texts = 0
    one = files(tmp_path, texts)
    one.write(0)
    assert Counting.texts == 8
    again = files(tmp_path, texts)
    again.write(0)
    assert Counting.texts == 8 and again.read().digest == one.read().digest
    others = (
        files(tmp_path, texts[:3]),
        files(tmp_path, EXAMPLES[:3]),
        files(tmp_path, [*EXAMPLES[:3], Example("chat", "b", "d")]),
        files(tmp_path, texts, max_length=27),
        files(tmp_path, texts, chat=True),
        files(tmp_path, texts, tokenizer=Counting("\nabcd")),
    )
    assert len({one.key, *(other.key for other in others)}) == 7
    one.path(0).unlink()
    one.path(0).write_bytes(b"cut")
    again.write(0)
    assert Counting.texts == 16 and again.read().ids[0] == "whole"


def test_an_example_without_a_response_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="domain 'd': the example 'x' has no response to train on"):
        files(tmp_path, [Example("x", "a", "")]).write(0)
    assert not list(tmp_path.iterdir())


def test_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job has hundreds of files, more than a process may have open."""
    monkeypatch.setattr(token_files, "PART", 1)
    one = files(tmp_path, [Example(str(i), "a", "b") for i in range(40)])
    for number in one.numbers:
        one.write(number)
    before = len(os.listdir("/proc/self/fd"))
    found = one.read()
    assert len(os.listdir("/proc/self/fd")) < before + 10 and len(found) == 40
    assert json.dumps(found.ids[39]) == '"39"'
