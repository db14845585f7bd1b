from __future__ import annotations

import itertools
import string
import subprocess
import sys

import numpy as np
import pytest

from duet_jax.data import synthetic
from duet_jax.errors import DataError

PRINT_DIGEST = """
import hashlib
from duet_jax.data import synthetic
text = repr([
    synthetic.generate(kind, "d", split, {"tags": "AQ", "examples": 50, "noise": 0.3, "seed": 7})
    for kind in ("cipher", "succession") for split in ("train", "eval")
])
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.parametrize("letters", [5, 8, 16, 26])
def test_the_tags_permutations_are_permutations_and_distinct(letters):
    tables = [synthetic.permutation(tag, letters) for tag in string.ascii_uppercase]
    for table in tables:
        assert sorted(table.tolist()) == list(range(letters))
    for one, other in itertools.combinations(tables, 2):
        assert not np.array_equal(one, other)
    np.testing.assert_array_equal(tables[3], synthetic.permutation("D", letters))


def test_a_cipher_response_is_the_tags_permutation_of_the_prompt():
    examples = synthetic.generate("cipher", "d", "train", {"tags": "AC", "examples": 40, "letters": 8, "length": 5})
    assert [e.prompt[:2] for e in examples[:4]] == ["A ", "C ", "A ", "C "]
    for example in examples:
        tag, letters = example.prompt.split(" ")
        table = synthetic.permutation(tag, 8)
        assert example.response == "".join(
            string.ascii_lowercase[table[string.ascii_lowercase.index(c)]] for c in letters
        )
        assert len(letters) == 5
    assert len({e.id for e in examples}) == 40


def test_noise_replaces_the_stated_share_of_letters():
    clean, noisy = (
        synthetic.generate("cipher", "d", "train", {"examples": 2000, "noise": noise}) for noise in (0.0, 0.5)
    )
    assert [e.prompt for e in clean] == [e.prompt for e in noisy]
    pairs = [(c, n) for a, b in zip(clean, noisy, strict=True) for c, n in zip(a.response, b.response, strict=True)]
    changed = np.mean([c != n for c, n in pairs])
    expected = 0.5 * 15 / 16  # a random letter is the right one in one of 16 cases
    assert abs(changed - expected) < 4 * np.sqrt(expected * (1 - expected) / len(pairs))


def test_training_and_evaluation_prompts_are_disjoint_whatever_name_and_seed():
    options = {"letters": 6, "length": 4, "examples": 1500}
    train = {
        e.prompt
        for seed in range(3)
        for name in "xy"
        for e in synthetic.generate("cipher", name, "train", options | {"seed": seed})
    }
    evaluation = {
        e.prompt for seed in range(3) for e in synthetic.generate("cipher", "x", "eval", options | {"seed": seed})
    }
    assert len(train) > 900 and len(evaluation) > 250
    assert not train & evaluation


def test_seeds_and_names_change_examples_but_processes_do_not():
    first, again, seed, name = (
        [e.prompt for e in synthetic.generate("cipher", n, "train", {"examples": 20, "seed": s})]
        for n, s in (("a", 0), ("a", 0), ("a", 1), ("b", 0))
    )
    assert first == again and first != seed and first != name
    digests = {
        subprocess.run([sys.executable, "-c", PRINT_DIGEST], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_succession_counts_on():
    for example in synthetic.generate("succession", "d", "train", {"letters": 6, "length": 4, "examples": 30}):
        start = string.ascii_lowercase.index(example.prompt[2])
        assert example.response == "".join(string.ascii_lowercase[(start + i) % 6] for i in range(1, 5))


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("sums", {}, "there is no synthetic kind 'sums'; the kinds are cipher, succession"),
        ("cipher", {"letter": 8}, "has no option 'letter'; the options are tags, letters"),
        ("cipher", {"letters": "8"}, "the option 'letters' must be of type int, not '8'"),
        ("cipher", {"letters": True}, "the option 'letters' must be of type int, not True"),
        ("cipher", {"letters": 4}, "the synthetic option letters is 4, out of range"),
        ("cipher", {"tags": "a"}, "the synthetic option tags is 'a', out of range"),
        ("cipher", {"noise": 1.5}, "the synthetic option noise is 1.5, out of range"),
        ("cipher", {"tags": ""}, "the synthetic option tags is '', out of range"),
    ],
)
def test_bad_options_are_named(kind, options, text):
    with pytest.raises(DataError, match=f"domain 'd'.*{text}|domain 'd': {text}"):
        synthetic.generate(kind, "d", "train", options)


def test_walks_follow_their_tags_table():
    """Observed transitions of 40,000 letters agree with the table, by a chi-squared test per context."""
    rows = synthetic.generate("walk", "w", "train", {"tags": "AB", "letters": 5, "length": 20, "examples": 4000})
    table = synthetic.odds("B", 5)
    seen = np.zeros((5, 5, 5))
    for row in rows:
        tag, start = row.prompt.split()
        path = [ord(letter) - ord("a") for letter in start + row.response]
        if tag == "B":
            for one, two, three in zip(path, path[1:], path[2:], strict=False):
                seen[one, two, three] += 1
    assert seen.sum() == 2000 * 20
    totals = seen.sum(-1, keepdims=True)
    expected = totals * table
    counted = expected > 5
    statistic = ((seen - expected)[counted] ** 2 / expected[counted]).sum()
    freedom = counted.sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    assert np.abs(table - synthetic.odds("A", 5)).max() > 0.5


def test_noisy_walks_use_every_letter_alike():
    rows = synthetic.generate("walk", "w", "train", {"letters": 5, "length": 20, "examples": 2000, "noise": 1.0})
    counts = np.bincount([ord(letter) - ord("a") for row in rows for letter in row.response], minlength=5)
    assert np.abs(counts / counts.sum() - 0.2).max() < 0.02
