"""Greedy searches against brute force, embeddings against plain forward passes, and both through `score`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import linecache
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax import cli
from duet_jax.config import SelectorConfig, TrainingConfig
from duet_jax.data import Encoded, Example
from duet_jax.errors import ConfigError, DataError
from duet_jax.models import llama
from duet_jax.selection import Pool, greedy, passes, score
from duet_jax.selection.embeddings import embeddings
from duet_jax.training.sft import Trainer

PROGRAMS = {"log_det": greedy.log_det, "facility_location": greedy.facility_location, "k_center": greedy.k_center}
# Sizes of all random sets: they share one program, which is filled up to 32.
SIZES = st.integers(17, 32)


def cosines(vectors: np.ndarray) -> np.ndarray:
    units = vectors.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return units @ units.T


def volume(similar: np.ndarray, chosen: list[int]) -> float:
    return np.linalg.slogdet(similar[np.ix_(chosen, chosen)] + greedy.RIDGE * np.eye(len(chosen)))[1]


def coverage(similar: np.ndarray, chosen: list[int]) -> float:
    return np.maximum(similar, 0)[:, chosen].max(axis=1, initial=0).sum()


def naive_gain(kind: str, similar: np.ndarray, chosen: list[int], one: int) -> float:
    """What one more vector adds, from the definition."""
    if kind == "log_det":
        return np.exp(volume(similar, [*chosen, one]) - volume(similar, chosen))
    if kind == "facility_location":
        return coverage(similar, [*chosen, one]) - coverage(similar, chosen)
    return 2 - 2 * similar[one, chosen].max() if chosen else similar[one].mean()


def draw(seed: int, size: int, dim: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, dim))


@pytest.mark.parametrize("kind", PROGRAMS)
@settings(max_examples=15)
@given(seed=st.integers(0, 999), size=SIZES)
def test_every_choice_adds_the_most(kind: str, seed: int, size: int) -> None:
    """Also far beyond the number of dimensions, where determinants live on the ridge alone."""
    vectors = draw(seed, size)
    similar, order = cosines(vectors), greedy.run(PROGRAMS[kind], vectors, 16)[0].tolist()
    assert len(set(order)) == 16
    for i, one in enumerate(order):
        gains = [naive_gain(kind, similar, order[:i], j) for j in range(size) if j not in order[:i]]
        assert naive_gain(kind, similar, order[:i], one) >= max(gains) - 3e-6 * max(max(gains), 1)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_is_left_is_told_by_its_gain(kind: str) -> None:
    vectors = draw(3, 20)
    similar, (order, gains) = cosines(vectors), greedy.run(PROGRAMS[kind], vectors, 5)
    rest = [j for j in range(20) if j not in order]
    expected = [naive_gain(kind, similar, order.tolist(), j) for j in rest]
    np.testing.assert_allclose(gains[rest], expected, rtol=1e-4, atol=1e-5)
    assert (gains[order] == -np.inf).all()


@pytest.mark.parametrize("kind", PROGRAMS)
@settings(max_examples=10)
@given(seed=st.integers(0, 999), size=SIZES)
def test_the_order_of_the_vectors_decides_ties_alone_and_prefixes_are_nested(kind: str, seed: int, size: int) -> None:
    vectors = draw(seed, size)
    order = greedy.run(PROGRAMS[kind], vectors, 12)[0].tolist()
    np.testing.assert_array_equal(greedy.run(PROGRAMS[kind], vectors, 10)[0], order[:10])
    # All determinants of one vector are the same, so the first one stays at its place.
    shuffle = np.array([0, *np.random.default_rng(seed + 1).permutation(np.arange(1, size))])
    shuffled = shuffle[greedy.run(PROGRAMS[kind], vectors[shuffle] * 3.0, 12)[0]].tolist()
    similar = cosines(vectors)
    for i, (one, other) in enumerate(zip(order, shuffled, strict=True)):
        rest = [naive_gain(kind, similar, order[:i], j) for j in range(size) if j not in order[:i]]
        second, best = np.sort(rest)[-2:]
        if best - second < 1e-5 and not (kind == "log_det" and i == 0):
            assert i >= 1
            break
        assert one == other


@pytest.mark.parametrize("kind", PROGRAMS)
@settings(max_examples=10)
@given(seed=st.integers(0, 999), distinct=st.integers(3, 6))
def test_copies_come_after_all_that_are_distinct_and_the_first_of_them_counts(
    kind: str, seed: int, distinct: int
) -> None:
    """Orthogonal vectors, each several times: a set of one of each has every distinct one covered."""
    basis = np.linalg.qr(draw(seed, 6))[0][:distinct]
    copies = np.random.default_rng(seed).permutation(np.resize(np.arange(distinct), 20))
    order, _ = greedy.run(PROGRAMS[kind], basis[copies], 20)
    assert set(copies[order[:distinct]]) == set(range(distinct))
    assert sorted(order) == list(range(20))
    firsts = {int(np.flatnonzero(copies == which)[0]) for which in range(distinct)}
    assert set(order[:distinct].tolist()) == firsts


def test_equal_vectors_are_taken_in_order() -> None:
    for program in PROGRAMS.values():
        np.testing.assert_array_equal(greedy.run(program, np.ones((20, 6)), 20)[0], np.arange(20))
        # Vectors without a direction are like nothing, and are chosen last.
        vectors = np.concatenate([np.zeros((3, 6)), np.eye(6)[[0, 1, 2]], np.zeros((14, 6))])
        if program is not greedy.k_center:
            assert set(greedy.run(program, vectors, 3)[0].tolist()) == {3, 4, 5}


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_greedy_choices_against_the_best_of_all(seed: int) -> None:
    """1 - 1/e of a monotone submodular optimum (Nemhauser, Wolsey and Fisher 1978); radius within twice (Gonzalez)."""
    vectors = draw(seed, 17, 3)
    similar, every = cosines(vectors), list(itertools.combinations(range(17), 3))
    chosen = {kind: greedy.run(program, vectors, 3)[0].tolist() for kind, program in PROGRAMS.items()}
    bound = 1 - np.exp(-1)

    def scaled(of: list[int]) -> float:
        # log det(I + K / ridge), which is monotone and differs by a constant for sets of one size.
        return volume(similar, of) - len(of) * np.log(greedy.RIDGE)

    def radius(of: list[int]) -> float:
        return np.sqrt(np.maximum(2 - 2 * similar[:, of].max(axis=1), 0)).max()

    assert scaled(chosen["log_det"]) >= bound * max(scaled(list(of)) for of in every)
    best = max(coverage(similar, list(of)) for of in every)
    assert coverage(similar, chosen["facility_location"]) >= bound * best
    assert radius(chosen["k_center"]) <= 2 * min(radius(list(of)) for of in every) + 1e-6


def test_many_vectors_in_blocks_are_found_as_by_all_gains_at_once() -> None:
    """More than one block, in clusters, so that most bounds stay behind: the lazy search is the greedy one."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(12, 8)), 25, axis=0) + 0.2 * rng.normal(size=(300, 8))
    similar, covered, expected = np.maximum(cosines(vectors), 0), np.zeros(300), []
    for _ in range(40):
        gains = np.maximum(similar - covered[:, None], 0).sum(axis=0)
        gains[expected] = -np.inf
        expected.append(int(gains.argmax()))
        covered = np.maximum(covered, similar[:, expected[-1]])
    np.testing.assert_array_equal(greedy.run(greedy.facility_location, vectors, 40)[0], expected)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_sets_of_about_one_size_share_a_program(kind: str) -> None:
    program: Any = PROGRAMS[kind]
    greedy.run(program, draw(0, 32), 16)
    before = program._cache_size()
    for size, depth in ((17, 9), (25, 12), (32, 16)):
        greedy.run(program, draw(size, size), depth)
    assert program._cache_size() == before


MODEL = llama.LlamaConfig(
    vocab_size=9, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)
TEXTS = [["one", "two", "three", "four", "five"], ["six", "seven", "eight"]]


def make_pool(**more: Any) -> Pool:
    """Two domains of short sequences of different lengths."""
    base = llama.init(MODEL, key=jax.random.key(0))
    settings = TrainingConfig(learning_rate=1e-2, batch_size=2)
    trainer = Trainer(MODEL, lambda: jax.tree.map(jnp.copy, base), settings, (12,), 0, remat="none")
    rng, train = np.random.default_rng(0), []
    for number, texts in enumerate(TEXTS):
        tokens = tuple(rng.integers(1, 9, rng.integers(3, 13)).astype(np.int32) for _ in texts)
        ids = tuple(f"{number}-{i}" for i in range(len(texts)))
        train.append(Encoded(tokens, np.ones(len(texts), np.int32), ids))
    examples = tuple(tuple(Example(str(i), "say", text) for i, text in enumerate(texts)) for texts in TEXTS)
    nothing = Encoded((), np.zeros(0, np.int32), ())
    return Pool(("a", "b"), tuple(train), (nothing,) * 2, (), trainer, "f", 0, examples=examples, **more)


def test_embeddings_are_the_mean_states_of_each_example_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches and in parts, whatever stands beside an example, and read again instead of computed."""
    monkeypatch.setattr(passes, "PART", 3)
    pool = make_pool()
    found = embeddings(pool, SelectorConfig(kind="log_det"), tmp_path)
    params, states = pool.trainer.load_base(), jax.jit(partial(llama.hidden_states, MODEL))
    for part, vectors in zip(pool.train, found, strict=True):
        for tokens, vector in zip(part.tokens, vectors, strict=True):
            alone = np.asarray(states(params, np.resize(tokens, (1, 12))))[0, : len(tokens)]
            np.testing.assert_allclose(vector, alone.mean(axis=0), rtol=1e-4, atol=1e-5)
    (folder,) = tmp_path.glob("embeddings-*")
    assert len(list(folder.glob("part-*.npy"))) == 3
    monkeypatch.setattr(passes, "plan_forward", None)
    again = embeddings(pool, SelectorConfig(kind="k_center"), tmp_path)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(found))
    (folder / "part-00001.npy").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(passes, "PART", 3)
    resumed = embeddings(pool, SelectorConfig(kind="k_center"), tmp_path)
    np.testing.assert_array_equal(np.concatenate(resumed), np.concatenate(found))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the module `embedder` into the working directory, with a body of its function `f`."""
    monkeypatch.chdir(tmp_path)

    def put(body: str) -> None:
        (tmp_path / "embedder.py").write_text(f"import numpy as np\n\n\ndef f(texts):\n    {body}\n")
        sys.modules.pop("embedder", None)
        sys.path_importer_cache.pop(str(tmp_path), None)
        linecache.clearcache()

    return put


GIVEN = SelectorConfig(kind="k_center", embedding="embedder:f", rule="top_k", depth=2)


def test_a_function_of_texts_gives_embeddings(tmp_path: Path, module: Callable[[str], None]) -> None:
    module("return [[len(t), t.count('e')] for t in texts if not print(len(texts), file=open('calls', 'a'))]")
    pool = make_pool()
    found = embeddings(pool, GIVEN, tmp_path)
    assert found[1].tolist() == [[len(f"say\n{text}"), text.count("e")] for text in TEXTS[1]]
    score(pool, GIVEN, tmp_path)
    score(pool, dataclasses.replace(GIVEN, kind="log_det"), tmp_path)
    assert len((tmp_path / "calls").read_text().splitlines()) == 8  # one call, which saw 8 texts
    # Another text of the module, or other examples, and it is called again.
    module("return np.ones((8, 2))  # new")
    assert embeddings(pool, GIVEN, tmp_path)[0].tolist() == [[1, 1]] * 5
    before = pool.digest(GIVEN)
    other = dataclasses.replace(pool, examples=(pool.examples[0], pool.examples[0][:3]))
    assert other.digest(GIVEN) != before != pool.digest(dataclasses.replace(GIVEN, embedding=None))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return np.ones((3, 2))", r"embedder:f gave an array of shape \[3, 2\] for 8 texts; it must give one row"),
        ("return np.ones(8)", r"embedder:f gave an array of shape \[8\] for 8 texts"),
        ("return 'abc'", "embedder:f gave str, which is no array of numbers"),
        ("return texts[9]", "embedder:f failed: IndexError: list index out of range"),
        ("return np.log([[len(t) - 7] for t in texts])", "what embedder:f gives is not finite for the example '0-0'"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_wrong_embeddings_are_told(body: str, sentence: str, tmp_path: Path, module: Callable[[str], None]) -> None:
    module(body)
    with pytest.raises(DataError, match=sentence):
        score(make_pool(), GIVEN, tmp_path)


def test_an_unknown_function_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="selector.embedding: the module 'nowhere' cannot be imported"):
        score(make_pool(), dataclasses.replace(GIVEN, embedding="nowhere:f"), tmp_path)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_utilities_are_in_the_order_of_the_choice(kind: str, tmp_path: Path) -> None:
    pool = make_pool()
    selector = SelectorConfig(kind=kind, rule="top_k", depth=3)  # type: ignore[arg-type]
    found = score(pool, selector, tmp_path)
    for values, vectors in zip(found, embeddings(pool, selector, tmp_path), strict=True):
        order, gains = greedy.run(PROGRAMS[kind], vectors, 3)
        rest = [j for j in np.argsort(-gains) if j not in order]
        np.testing.assert_array_equal(np.argsort(-values, kind="stable"), [*order, *rest])
        assert (values[order] > 1).all() and (values[rest] <= 1).all() and (values >= 0).all()


def test_select_takes_the_greedy_choice(tmp_path: Path) -> None:
    """`duet select` with a model from scratch: of two kinds of lines, each many times, it takes one of each first."""
    rows = [{"id": f"{i}", "prompt": "p", "response": "aaaa" if i < 8 else "bbbbbbbb"} for i in range(12)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    tree = {
        "name": "pick",
        "count": 2,
        "data": {
            "max_length": 12,
            "buckets": [12],
            "validation_fraction": 0,
            "domains": [{"name": "lines", "source": str(tmp_path / "lines.jsonl")}],
        },
        "model": {"scratch": scratch},
        "training": {"learning_rate": 0.01, "batch_size": 4, "lora": {"rank": 2}},
        "selector": {"kind": "facility_location", "rule": "top_k", "depth": 4},
    }
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["select", str(tmp_path / "select.yaml"), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    chosen = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in chosen] == ["0", "8"]
    assert [row["utility"] for row in chosen] == [2.0, 1.75]
