"""Searches over a table of real trainings (RegMix, arXiv 2407.01492): how many until one of the best is found?

The table is in `$DUET_DATA/tables/regmix`: 512 language models of one million parameters, each trained on another
mixture of 17 domains of the Pile, and their losses on 13 of them; 256 more are held out. A search picks among the
rows it has not tried, by its acquisition function, after 3 random rows that are the same for all methods:

  search    ours, upper confidence bound
  random    any row
  law       the best row by c - exp(b + t.r), fitted anew to all rows tried
  botorch   BoTorch, tuned (peers/botorch_search.py)

Counted are the rows tried until one of the best 1% is among them. Then calibration: fitted to n random rows, how well
are the held-out ones expected? Intervals contain the noise that was learned; `nlpd` is in nats a row, of standardised
losses.

    DUET_DATA=data python benchmarks/search_table.py
    DUET_DATA=data python benchmarks/search_table.py --seeds 50 --draws 10 --peer-python PYTHON --output
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import NormalDist

import jax
import numpy as np
from scipy.stats import spearmanr
from search_common import MISSING, ask_botorch, make_search, parse, write
from search_regret import fit_law

FIRST, SHARE = 3, 0.01
TARGETS = ("pile-cc", "mean")
METHODS = ("search", "random", "law", "botorch")
LEVELS = (0.5, 0.8, 0.95)


def read(folder: Path, part: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures `[n, 17]` and minus the loss `[n]`, of the rows of "train" or "test"."""
    mixtures = np.loadtxt(folder / f"{part}_mixture_1m.csv", delimiter=",", skiprows=1)[:, 1:]
    path = folder / f"{part}_pile_loss_1m.csv"
    names = path.open().readline().strip().split(",")[1:]
    losses = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1:]
    loss = losses.mean(1) if target == "mean" else losses[:, names.index("metric/the_pile_pile_cc_val_loss")]
    # The shares are rounded to three digits.
    return mixtures / mixtures.sum(1, keepdims=True), -loss


def begin(seed: int, count: int) -> list[int]:
    return np.random.default_rng([seed, 3]).permutation(count)[:FIRST].tolist()


def run(
    pick: Callable[[list[int], np.random.Generator], np.ndarray], stop: set[int], limit: int, seed: int, count: int
) -> int:
    """Rows tried until one of `stop` is among them, at most `limit`; `pick` scores all rows."""
    rng = np.random.default_rng([seed, 4])
    tried = begin(seed, count)
    while len(tried) < limit and not stop & set(tried):
        scores = np.array(pick(tried, rng), np.float64)
        scores[tried] = -np.inf
        tried.append(int(np.argmax(scores)))
    return found(tried, stop, limit)


def found(tried: list[int], stop: set[int], limit: int) -> int:
    """How many rows had been tried with the first of `stop`; `limit + 1` where there is none."""
    return next((number for number, row in enumerate(tried, 1) if row in stop), limit + 1)


def pick_search(rows: np.ndarray, values: np.ndarray, tried: list[int], rng: np.random.Generator) -> np.ndarray:
    search = make_search(rows.shape[1])
    state = search.init()
    for row in tried:
        state = search.tell(state, rows[row], float(values[row]))
    mean, deviation = search.predict(state, rows)
    return mean + search.beta * deviation


def pick_random(rows: np.ndarray, values: np.ndarray, tried: list[int], rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(size=len(rows))


def pick_law(rows: np.ndarray, values: np.ndarray, tried: list[int], rng: np.random.Generator) -> np.ndarray:
    return -(rows @ fit_law(rows[tried], values[tried]))


PICKS = {"search": pick_search, "random": pick_random, "law": pick_law}


def count_all(rows: np.ndarray, values: np.ndarray, options: argparse.Namespace, versions: dict) -> dict[str, list]:
    """Rows needed, by method and seed."""
    best = np.argsort(-values)[: round(SHARE * len(values))].tolist()
    stop, limit, seeds = set(best), options.evaluations, range(options.seeds)
    counts: dict[str, list] = {}
    for name in options.methods:
        if name in PICKS:
            pick = partial(PICKS[name], rows, values)
            counts[name] = [run(pick, stop, limit, seed, len(rows)) for seed in seeds]
        elif options.peer_python:
            request = {
                "task": "table",
                "mode": "tuned",
                "rows": rows.tolist(),
                "values": values.tolist(),
                "begin": {str(seed): begin(seed, len(rows)) for seed in seeds},
                "stop": best,
                "evaluations": limit,
            }
            answers = list(ask_botorch(options.peer_python, request))
            counts[name] = [found(answer["tried"], stop, limit) for answer in answers]
            versions |= answers[0]["versions"]
    return counts


def median_interval(counts: list[int]) -> tuple[float, float, float]:
    """Median and its 95% bootstrap interval."""
    numbers = np.array(counts)
    picks = np.random.default_rng(0).integers(0, len(numbers), (4000, len(numbers)))
    low, high = np.quantile(np.median(numbers[picks], 1), [0.025, 0.975])
    return float(np.median(numbers)), float(low), float(high)


def expect_search(mixtures: np.ndarray, values: np.ndarray, queries: np.ndarray) -> tuple:
    search = make_search(mixtures.shape[1])
    state = search.init()
    for mixture, value in zip(mixtures, values, strict=True):
        state = search.tell(state, mixture, float(value))
    _, diagnostics = search.ask(state, key=jax.random.key(0))
    return *search.predict(state, queries), diagnostics.noise


def expect_botorch(python: str, mixtures: np.ndarray, values: np.ndarray, queries: np.ndarray) -> tuple:
    request = {"task": "predict", "mode": "tuned", "mixtures": mixtures, "values": values, "queries": queries}
    request = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in request.items()}
    (answer,) = ask_botorch(python, request)
    return np.array(answer["mean"]), np.array(answer["std"]), answer["noise"]


def judge(mean: np.ndarray, deviation: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """How well values are expected by normal distributions."""
    unit, z = values.std(), (values - mean) / deviation
    covered = {
        f"cover{100 * level:.0f}": float(np.mean(np.abs(z) <= NormalDist().inv_cdf(0.5 + level / 2)))
        for level in LEVELS
    }
    return {
        **covered,
        "nrmse": float(np.sqrt(np.mean((values - mean) ** 2)) / unit),
        "spearman": float(spearmanr(mean, values).statistic),
        "nlpd": float(np.mean(0.5 * z**2 + np.log(deviation / unit) + 0.5 * np.log(2 * np.pi))),
    }


def calibrate(folder: Path, target: str, count: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Means over draws of the rows that are fitted, by method."""
    rows, values = read(folder, "train", target)
    queries, truth = read(folder, "test", target)
    expects: dict[str, Callable] = {"search": expect_search}
    if options.peer_python:
        expects["botorch"] = partial(expect_botorch, options.peer_python)
    judged: dict[str, dict[str, float]] = {}
    for name in [name for name in expects if name in options.methods]:
        each = []
        for draw in range(options.draws):
            picked = np.random.default_rng([draw, 5]).permutation(len(rows))[:count]
            mean, deviation, noise = expects[name](rows[picked], values[picked], queries)
            each.append(judge(mean, np.hypot(deviation, noise), truth))
        judged[name] = {measure: float(np.mean([one[measure] for one in each])) for measure in each[0]}
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5, help="searches of each method (default 5)")
    parser.add_argument("--evaluations", type=int, default=150, help="rows tried at most (default 150)")
    parser.add_argument("--observations", type=int, nargs="+", default=[25, 50, 100], help="for the calibration")
    parser.add_argument("--draws", type=int, default=3, help="fits of the calibration (default 3)")
    parser.add_argument("--peer-python", help="a Python with torch and botorch")
    options = parse(parser, "search_table")
    folder = Path(os.environ.get("DUET_DATA", "data")) / "tables" / "regmix"
    if not folder.is_dir():
        parser.error("DUET_DATA names no folder with tables/regmix.")
    if "botorch" in options.methods and not options.peer_python:
        print(MISSING)

    versions: dict[str, str] = {}
    searches, calibrations = [], []
    print(f"{'target':8} {'method':8} {'rows until the top 1%, median':>30} {'95% interval':>14} {'never':>6}")
    for target in options.targets:
        for name, counts in count_all(*read(folder, "train", target), options, versions).items():
            median, low, high = median_interval(counts)
            row = {"target": target, "method": name, "median": median, "interval": [low, high], "counts": counts}
            row["never"] = sum(count > options.evaluations for count in counts)
            searches.append(row)
            print(f"{target:8} {name:8} {median:30.1f} {low:7.1f}{high:7.1f} {row['never']:6}", flush=True)

    measures = [f"cover{100 * level:.0f}" for level in LEVELS] + ["nrmse", "spearman", "nlpd"]
    print(f"\n{'target':8} {'n':>4} {'method':8}" + "".join(f" {measure:>8}" for measure in measures))
    for target in options.targets:
        for count in options.observations:
            for name, judged in calibrate(folder, target, count, options).items():
                calibrations.append({"target": target, "observations": count, "method": name, **judged})
                numbers = "".join(f" {judged[measure]:8.3f}" for measure in measures)
                print(f"{target:8} {count:4} {name:8}{numbers}", flush=True)
    write(options.output, options, {"searches": searches, "calibrations": calibrations}, versions)


if __name__ == "__main__":
    main()
