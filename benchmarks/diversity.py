"""Seconds to choose examples that stand for all others: our compiled greedy searches beside the plain ones, in one run.

  log_det            beside a determinant for each candidate at each choice (numpy's slogdet, many matrices a call)
  facility_location  beside the gains of all candidates at each choice, from the cosines of all pairs

Vectors are synthetic: clusters of 50 vectors, in as many dimensions as hidden states of SmolLM2-135M have, with a
direction in common, as those have. Both searches compute on the same vectors in one process; ours is timed after its
compilation, which is told apart. Told as well: the objectives that they reach, in float64, and whether they choose
the same.

    python benchmarks/diversity.py
    python benchmarks/diversity.py --vectors 2000 --choices 200 --output
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from search_common import parse, write

from duet_jax.selection import greedy

# Bytes that the matrices of one call of slogdet may take.
CALL_BYTES = 1 << 26


def draw(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(-(-count // 50), dim))
    return 2 + np.repeat(centres, 50, axis=0)[:count] + 0.5 * rng.normal(size=(count, dim))


def cosines(vectors: np.ndarray) -> np.ndarray:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units @ units.T


def volume(similar: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.linalg.slogdet(similar[np.ix_(chosen, chosen)] + greedy.RIDGE * np.eye(len(chosen)))[1])


def coverage(similar: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.maximum(similar[:, chosen].max(axis=1), 0).sum())


def first_best(gains: np.ndarray) -> int:
    """The first of about the greatest, as ours: all determinants of one vector are the same but for rounding."""
    return int(np.argmax(gains > gains.max() - greedy.SLACK * max(gains.max(), 1)))


def plain_log_det(vectors: np.ndarray, choices: int) -> np.ndarray:
    kernel = cosines(vectors) + greedy.RIDGE * np.eye(len(vectors))
    chosen: list[int] = []
    for size in range(1, choices + 1):
        left = np.setdiff1d(np.arange(len(vectors)), chosen)
        sets = np.concatenate([np.tile(np.array(chosen, np.int64), (len(left), 1)), left[:, None]], axis=1)
        each = max(1, CALL_BYTES // (8 * size * size))
        parts = [sets[first : first + each] for first in range(0, len(sets), each)]
        found = [np.linalg.slogdet(kernel[part[:, :, None], part[:, None, :]])[1] for part in parts]
        chosen.append(int(left[first_best(np.concatenate(found))]))
    return np.array(chosen)


def plain_facility_location(vectors: np.ndarray, choices: int) -> np.ndarray:
    similar = np.maximum(cosines(vectors), 0)
    covered, chosen = np.zeros(len(vectors)), []
    for _ in range(choices):
        gains = np.maximum(similar - covered[:, None], 0).sum(axis=0)
        gains[chosen] = -np.inf
        chosen.append(first_best(gains))
        covered = np.maximum(covered, similar[:, chosen[-1]])
    return np.array(chosen)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = function()
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=2000)
    parser.add_argument("--choices", type=int, default=200)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the plain search runs once")
    options = parse(parser, "diversity")
    vectors = draw(options.vectors, options.dim, 0)
    similar, results = cosines(vectors), {}
    cases = (
        ("log_det", greedy.log_det, plain_log_det, volume),
        ("facility_location", greedy.facility_location, plain_facility_location, coverage),
    )
    print(f"{'search':>18} {'compile s':>9} {'ours s':>8} {'plain s':>8} {'ratio':>7} {'objective':>11} {'plain':>11}")
    for name, program, plain, objective in cases:
        (order, _), first = timed(lambda program=program: greedy.run(program, vectors, options.choices))
        seconds = [
            timed(lambda program=program: greedy.run(program, vectors, options.choices))[1]
            for _ in range(options.repeats)
        ]
        expected, theirs = timed(lambda plain=plain: plain(vectors, options.choices))
        row = {
            "compile_s": first - min(seconds),
            "ours_s": min(seconds),
            "plain_s": theirs,
            "ratio": theirs / min(seconds),
            "objective": objective(similar, order),
            "plain_objective": objective(similar, expected),
            "same_order": bool(np.array_equal(order, expected)),
        }
        results[name] = row
        print(
            f"{name:>18} {row['compile_s']:9.2f} {row['ours_s']:8.3f} {row['plain_s']:8.2f} {row['ratio']:7.0f} "
            f"{row['objective']:11.4f} {row['plain_objective']:11.4f}",
            flush=True,
        )
    write(options.output, options, {"searches": results})


if __name__ == "__main__":
    main()
