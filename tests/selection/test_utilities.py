from __future__ import annotations

import json

import numpy as np
import pytest

from duet_jax.data import Example
from duet_jax.errors import DataError
from duet_jax.selection import load_utilities, utilities

EXAMPLES = [Example(i, "", "x") for i in ("a", "b", "c")]
VALUES = np.array([0.5, 2.0, -1.25])


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(**extra):
    return [{"id": i, "utility": float(v), **extra} for i, v in zip("cab", VALUES[[2, 0, 1]], strict=True)]


def _load(path, **fields):
    return load_utilities("utilities", "d", EXAMPLES, path=path, **fields)


def _error(path):
    with pytest.raises(DataError) as caught:
        _load(path)
    message = str(caught.value)
    assert message.startswith("domain 'd': ") and "\n" not in message
    return message


def test_random_utilities_are_equal():
    np.testing.assert_array_equal(load_utilities("random", "d", EXAMPLES), np.ones(3))
    with pytest.raises(ValueError, match="there are no utilities of kind 'best'; the kinds are random, utilities"):
        load_utilities("best", "d", EXAMPLES)


def test_all_file_formats_give_equal_utilities(tmp_path):
    other = {"id": "a", "utility": 99.0, "domain": "other"}
    extra = {"id": "zzz", "utility": 3}
    paths = [
        _lines(tmp_path / "plain.jsonl", [*_rows(), extra]),
        _lines(tmp_path / "domains.jsonl", [other, *_rows(domain="d")]),
        tmp_path / "x.json",
        tmp_path / "x.csv",
        tmp_path / "x.npy",
        tmp_path / "x.npz",
    ]
    paths[2].write_text(json.dumps(_rows()))
    paths[3].write_text("id,utility,note\n" + "".join(f'{r["id"]},{r["utility"]},"n\n,"\n' for r in _rows()))
    np.save(paths[4], VALUES.astype(np.float32))
    np.savez(paths[5], d=VALUES, other=np.ones(7))
    for path in paths:
        loaded = _load(path)
        assert loaded.dtype == np.float64
        np.testing.assert_array_equal(loaded, VALUES, err_msg=str(path))


def test_numeric_ids_match_text(tmp_path):
    path = _lines(tmp_path / "x.jsonl", [{"id": 7, "utility": 1.5}])
    assert load_utilities("utilities", "d", [Example("7", "", "x")], path=path).tolist() == [1.5]


def test_row_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "x.jsonl"
    cases = [
        (_rows()[:1], "has no utility for 2 of the domain's 3 training examples, the first of which is 'a'"),
        ([*_rows(), _rows()[0]], "line 4 gives a utility to 'c' a second time"),
        ([{"id": "a"}], "line 1 has no column 'utility'"),
        ([{"utility": 1}], "line 1 has no column 'id'"),
        ([{"id": "a", "utility": "high"}], "line 1 has the utility 'high', which is no number"),
        ([{"id": "a", "utility": True}], "line 1 has the utility True, which is no number"),
        ([{"id": i, "utility": float("nan")} for i in "abc"], "gives the example 'a' the utility nan"),
        ([{"id": i, "utility": float("inf")} for i in "abc"], "gives the example 'a' the utility inf"),
    ]
    for rows, text in cases:
        assert text in _error(_lines(path, rows))
    csv = tmp_path / "x.csv"
    csv.write_text("id,utility\na,1\nb,much\n")
    assert f"{csv}, line 3 has the utility 'much', which is no number" in _error(csv)
    csv.write_bytes(b"id,utility\n\xff,1\n")
    assert "is not a readable CSV file" in _error(csv)


def test_array_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones(2))
    assert "holds an array of shape (2,), but the domain has 3 training examples" in _error(path)
    np.save(path, np.array(["a", "b", "c"]))
    assert "utilities must be numbers" in _error(path)
    np.save(path, np.array([{}, {}, {}], dtype=object), allow_pickle=True)
    assert "cannot be used as an array file" in _error(path)
    np.save(path, np.array([1, np.nan, 1]))
    assert "gives the example 'b' the utility nan" in _error(path)
    for content in (b"", b"PK\x03\x04 broken", b"nonsense"):
        path.write_bytes(content)
        assert "cannot be used as an array file" in _error(path)
    archive = tmp_path / "x.npz"
    np.savez(archive, other=np.ones(3))
    assert "it has no array 'd'; its arrays are other" in _error(archive)


def test_missing_and_unknown_files(tmp_path):
    assert f"there is no file '{tmp_path / 'no.csv'}'" in _error(tmp_path / "no.csv")
    assert "utilities are to come from a file, but none is given" in _error(None)
    (tmp_path / "x.txt").write_text("")
    assert "is of an unknown type; its name must end in one of .jsonl" in _error(tmp_path / "x.txt")


def test_utilities_are_kept_by_content(tmp_path, monkeypatch):
    path, cache = _lines(tmp_path / "x.jsonl", _rows()), tmp_path / "study" / "selections"
    np.testing.assert_array_equal(_load(path, cache_folder=cache), VALUES)
    (kept,) = cache.iterdir()
    assert kept.suffix == ".npy"

    read = utilities._read
    reads = []
    monkeypatch.setattr(utilities, "_read", lambda *args: reads.append(args) or read(*args))
    path = path.rename(tmp_path / "renamed.jsonl")
    np.testing.assert_array_equal(_load(path, cache_folder=cache), VALUES)
    assert not reads
    # Other content, another domain's name or other examples are read anew.
    _lines(path, [{"id": i, "utility": 4} for i in "abc"])
    np.testing.assert_array_equal(_load(path, cache_folder=cache), [4, 4, 4])
    load_utilities("utilities", "e", EXAMPLES, path=path, cache_folder=cache)
    load_utilities("utilities", "d", EXAMPLES[:2], path=path, cache_folder=cache)
    assert len(reads) == 3 and len(list(cache.iterdir())) == 4


def test_a_failed_read_leaves_nothing_in_the_cache(tmp_path):
    path = _lines(tmp_path / "x.jsonl", _rows()[:1])
    with pytest.raises(DataError):
        _load(path, cache_folder=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
