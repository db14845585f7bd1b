"""Generated domains: small algorithmic tasks, and one whose best mixture is known.

`walk`: the response is a random walk over letters in which the last two decide the odds of the next, by a table of
the tag's own that the prompt names. The more of a tag's walks a model has seen, the less it gains from another one.
An unseen task of equal parts of two tags is therefore, by symmetry, served best by equal shares of these two tags'
domains and nothing else. With `noise` each letter is, with that probability, replaced by any letter: the format is
right, what it teaches is wrong.

`cipher`: the prompt is a tag and random letters, the response the same letters each replaced by the tag's own fixed
permutation of the alphabet. `succession`: the response counts on in the alphabet from one letter.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from duet_jax.data.example import Example
from duet_jax.errors import DataError


@dataclass(frozen=True)
class Options:
    """Options of generated domains.

    Attributes:
      tags: capital letters, one per table or permutation; the examples take them in turn.
      letters: size of the alphabet, 5..26, from 'a'; fewer have no 26 distinct permutations.
      length: letters in a response.
      examples: number of examples.
      noise: probability that a response letter is replaced by a random one.
      seed: another seed gives other examples of the same tables or permutations.
    """

    tags: str = "A"
    letters: int = 16
    length: int = 8
    examples: int = 2048
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "tags": bool(self.tags) and set(self.tags) <= set(string.ascii_uppercase),
            "letters": 5 <= self.letters <= 26,
            "length": self.length >= 1,
            "examples": self.examples >= 1,
            "noise": 0.0 <= self.noise <= 1.0,
            "seed": self.seed >= 0,
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}")


def generate(kind: str, name: str, split: str, options: Mapping[str, Any] | None = None) -> list[Example]:
    """Generates a domain; the same arguments give the same examples in every process.

    Args:
      kind: 'cipher' or 'succession'.
      name: the domain's name; it makes ids and random numbers the domain's own.
      split: 'train', or another word for examples to evaluate on. No prompt of the split 'train'
        of a cipher is in any other split, whatever the names and seeds.
      options: see `Options`.

    Raises:
      DataError: unknown kind or option, or an option out of range.
    """
    if kind not in KINDS:
        raise DataError(
            f"domain '{name}': there is no synthetic kind '{kind}'; the kinds are {', '.join(sorted(KINDS))}"
        )
    chosen = _options(name, options or {})
    rng = np.random.default_rng([chosen.seed, zlib.crc32(f"{kind}/{name}/{split}".encode())])
    pairs = KINDS[kind](chosen, split, rng)
    return [
        Example(id=f"{name}/{split}-{chosen.seed}-{i}", prompt=prompt, response=response)
        for i, (prompt, response) in enumerate(pairs)
    ]


def permutation(tag: str, letters: int) -> np.ndarray:
    """The permutation of a tag, int64 [letters]: letter i is written as letter permutation[i].

    The 26 tags have 26 different permutations.
    """
    rng = np.random.default_rng(letters)
    distinct: dict[bytes, np.ndarray] = {}
    while len(distinct) <= string.ascii_uppercase.index(tag):
        drawn = rng.permutation(letters)
        distinct.setdefault(drawn.tobytes(), drawn)
    return list(distinct.values())[-1]


def _options(name: str, options: Mapping[str, Any]) -> Options:
    known = {f.name: type(f.default) for f in fields(Options)}
    for key, value in options.items():
        if key not in known:
            raise DataError(
                f"domain '{name}': synthetic data has no option '{key}'; the options are {', '.join(known)}"
            )
        fits = isinstance(value, (int, float) if known[key] is float else known[key])
        if not fits or isinstance(value, bool):
            raise DataError(f"domain '{name}': the option '{key}' must be of type {known[key].__name__}, not {value!r}")
    try:
        return Options(**options)
    except ValueError as error:
        raise DataError(f"domain '{name}': the synthetic option {error}, out of range") from None


def _cipher(options: Options, split: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    prompts = _prompts(options, split == "train", rng)
    tables = np.stack([permutation(tag, options.letters) for tag in options.tags])
    turn = np.arange(options.examples) % len(options.tags)
    written = tables[turn[:, None], prompts]
    replaced = rng.random(written.shape) < options.noise
    random_letters = rng.integers(options.letters, size=written.shape)
    written = np.where(replaced, random_letters, written)
    return [
        (f"{options.tags[t]} {_spell(prompt)}", _spell(response))
        for t, prompt, response in zip(turn, prompts, written, strict=True)
    ]


def _prompts(options: Options, train: bool, rng: np.random.Generator) -> np.ndarray:
    """Random letters, int64 [examples, length], from the split's own part of all prompts.

    A quarter of the possible prompts, told by a checksum of the letters, is never trained on.
    """
    found: list[np.ndarray] = []
    count = 0
    for _ in range(30):
        drawn = rng.integers(options.letters, size=(2 * options.examples, options.length))
        held_out = np.array([zlib.crc32(_spell(row).encode()) % 4 == 0 for row in drawn])
        found.append(drawn[held_out != train])
        count += len(found[-1])
        if count >= options.examples:
            return np.concatenate(found)[: options.examples]
    raise DataError(f"{options.letters} letters and length {options.length} make too few prompts to split")


def odds(tag: str, letters: int) -> np.ndarray:
    """A tag's table of walks, float64 [letters, letters, letters]: of the next letter, given the last two.

    Rows are drawn from a symmetric Dirichlet distribution of concentration 0.1, so a few letters have most of
    the probability.
    """
    rng = np.random.default_rng([ord(tag), letters, 2])
    return rng.dirichlet(np.full(letters, 0.1), size=(letters, letters))


def _walk(options: Options, split: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    count, letters = options.examples, options.letters
    limits = np.cumsum([odds(tag, letters) for tag in options.tags], axis=-1)
    turn = np.arange(count) % len(options.tags)
    path = rng.integers(letters, size=(count, 2))
    for _ in range(options.length):
        below = limits[turn, path[:, -2], path[:, -1]] < rng.random((count, 1))
        following = np.minimum(below.sum(axis=1), letters - 1)
        replaced = rng.random(count) < options.noise
        following = np.where(replaced, rng.integers(letters, size=count), following)
        path = np.column_stack([path, following])
    return [(f"{options.tags[t]} {_spell(walk[:2])}", _spell(walk[2:])) for t, walk in zip(turn, path, strict=True)]


def _succession(options: Options, split: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    starts = rng.integers(options.letters, size=options.examples)
    steps = np.arange(1, options.length + 1)
    return [
        (f"{options.tags[i % len(options.tags)]} {_spell([start])}", _spell((start + steps) % options.letters))
        for i, start in enumerate(starts)
    ]


def _spell(letters: Any) -> str:
    return "".join(string.ascii_lowercase[i] for i in letters)


KINDS: dict[str, Callable[[Options, str, np.random.Generator], list[tuple[str, str]]]] = {
    "cipher": _cipher,
    "succession": _succession,
    "walk": _walk,
}
