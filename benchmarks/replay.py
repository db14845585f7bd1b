"""Does the outer search find better data? Replays over a table of real trainings (`mixture_table.py`), many seeds.

An unseen task is some of the table's held-out sets: ones that are trained on (`in`) or that no domain is of (`out`).
A round tries one row of the table and hears minus its loss, or that with noise of half the standard deviation over
random rows, or the mean of five people's stars (thresholds are quintiles of all rows; people disagree by a half of that
standard deviation). After as many rounds each method recommends a row:

  uniform   the even mixture
  natural   proportions of the domains' sizes
  random    of random rows, the one that was heard to be best
  law       of all rows, the best by c - exp(b + t.r), fitted to random rows
  trees     of all rows, the best by gradient boosting, fitted to random rows (RegMix, arXiv 2407.01492)
  duet      of all rows, the best by the posterior mean; rows are tried by the upper confidence bound

Regret is the best row's value less the recommended one's, in standard deviations over random rows, so that tasks
compare; beside it, its share of the uniform mixture's. With --ablate our search is varied instead, a setting at a time;
tables of --small, of the same mixtures, were trained on fewer examples, and what is recommended of what is heard there
is judged by the table itself.

    python benchmarks/replay.py --seeds 20 --output
    python benchmarks/replay.py --seeds 20 --ablate --output benchmarks/results/replay_ablations.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mixture_table import TABLE
from scipy.stats import norm
from search_common import make_search, parse, write
from search_regret import bootstrap, fit_law
from sklearn.ensemble import GradientBoostingRegressor

from duet_jax.search import Stars

TASKS = {
    "in: gsm8k + code_alpaca": ("gsm8k", "code_alpaca"),
    "in: all eight domains": (),
    "in: triviaqa + roleplay": ("triviaqa", "roleplay"),
    "out: math": ("math",),
    "out: mbpp": ("mbpp",),
    "out: arc + siqa": ("arc", "siqa"),
    "out: dolly + alpaca_en": ("dolly", "alpaca_en"),
    "out: c4 + wikitext2": ("c4", "wikitext2"),
}
KINDS = ("clean", "noisy", "stars")
NOISE, RATERS = 0.5, 5
OURS = "as it is"
# Varied one at a time, by what is asked: what it is called, settings of the search, and how feedback is told.
ABLATIONS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "kernel and transform": {
        "raw shares": ({"map": "raw"}, "mean"),
        "log-ratios": ({"map": "log"}, "mean"),
        "one lengthscale": ({"ard": False}, "mean"),
        "linear trend": ({"trend": "linear"}, "mean"),
    },
    "beta and acquisition": {
        "beta 0": ({"beta": 0.0}, "mean"),
        "beta 1": ({"beta": 1.0}, "mean"),
        "beta 4": ({"beta": 4.0}, "mean"),
        "expected improvement": ({"acquisition": "log_ei"}, "mean"),
        "Thompson": ({"acquisition": "thompson"}, "mean"),
    },
    "noise model": {"known noise": ({}, "stderr"), "ordinal stars": ({}, "ordinal")},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Mixtures `[n, d]` of the table's rows, of which the first is uniform and the second natural, and values `[n]`.

    `again` are values of the uniform mixture with other examples and seeds `[k]`, `budget` is how many examples each
    was trained on, and `seconds` are what a training took with what it was measured by.
    """

    mixtures: np.ndarray
    values: np.ndarray
    again: np.ndarray
    budget: int
    seconds: float

    @property
    def spread(self) -> float:
        return float(self.values.std())

    def heard(self, row: int, number: int, kind: str, seed: int, levels: int = 5) -> np.ndarray:
        """What is heard of a row in a round: a number `[1]`, or stars `[RATERS]`."""
        drawn = np.random.default_rng([seed, number]).standard_normal(RATERS)
        if kind == "clean":
            return self.values[row : row + 1]
        if kind == "noisy":
            return self.values[row] + NOISE * self.spread * drawn[:1]
        thresholds = np.quantile(self.values, np.arange(1, levels) / levels)
        return 1.0 + np.sum(self.values[row] + NOISE * self.spread * drawn[:, None] > thresholds, axis=1)


def read(path: Path, sets: tuple[str, ...]) -> Table:
    """The table, with minus the mean loss on some sets, or on all domains."""
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    names = [*head["domains"], *head["others"]]
    columns = [names.index(name) for name in sets or head["domains"]]
    rows = sorted((line for line in lines if line["seed"] == 0), key=lambda line: line["row"])
    counts = np.array([line["counts"] for line in rows], float)
    values, again = (
        np.array([-np.mean([line["losses"][column] for column in columns]) for line in some])
        for some in (rows, [line for line in lines if line["row"] == 0])
    )
    seconds = float(np.median([line["seconds"] for line in rows]))
    return Table(counts / counts.sum(1, keepdims=True), values, again, head["settings"]["budget"], seconds)


def random_rows(table: Table, rounds: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).permutation(len(table.values))[:rounds]


def recommend_random(table: Table, rounds: int, kind: str, seed: int) -> list[int]:
    rows = random_rows(table, rounds, seed)
    told = [table.heard(row, number, kind, seed).mean() for number, row in enumerate(rows)]
    return [int(rows[int(np.argmax(told[:n]))]) for n in range(1, rounds + 1)]


def regressed(fit: Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]) -> Callable[..., list[int]]:
    """A method that fits random rows and recommends the row of the highest prediction, after each round."""

    def recommend(table: Table, rounds: int, kind: str, seed: int) -> list[int]:
        rows = random_rows(table, rounds, seed)
        told = np.array([table.heard(row, number, kind, seed).mean() for number, row in enumerate(rows)])
        found = [int(rows[0]), int(rows[0])]
        for n in range(3, rounds + 1):
            predict = fit(table.mixtures[rows[:n]], told[:n])
            found.append(int(np.argmax(predict(table.mixtures))))
        return found

    return recommend


def law(mixtures: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    slopes = fit_law(mixtures, values)
    return lambda queries: -(queries @ slopes)


def trees(mixtures: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return GradientBoostingRegressor(random_state=0, min_samples_leaf=2).fit(mixtures, values).predict


def recommend_duet(
    table: Table,
    rounds: int,
    kind: str,
    seed: int,
    told_as: str = "mean",
    levels: int = 5,
    trainings: int = 1,
    **settings: Any,
) -> list[int]:
    """Each row that is tried is heard of in so many rounds one after another, as if it was trained so many times."""
    ordinal = kind == "stars" and told_as == "ordinal"
    search = make_search(table.mixtures.shape[1], **settings, **({"feedback": Stars(levels)} if ordinal else {}))
    state, key = search.init(), jax.random.key(seed)
    # The uniform row first, as a study does, then two random ones.
    row, first = 0, np.random.default_rng([seed, 2]).permutation(len(table.values))[:2].tolist()
    tried: list[int] = []
    found = []
    for number in range(rounds):
        heard = table.heard(row, number, kind, seed, levels)
        tried.append(row)
        if ordinal:
            state = search.tell(state, table.mixtures[row], heard.astype(int).tolist())
        else:
            known = kind == "noisy" and told_as == "stderr"
            state = search.tell(state, table.mixtures[row], heard.mean(), NOISE * table.spread if known else None)
        mean, deviation = search.predict(state, table.mixtures)
        found.append(int(np.argmax(mean)) if number else row)
        scores = score(search, state, mean, deviation, tried, jax.random.fold_in(key, number))
        scores[tried] = -np.inf
        new, last = divmod(number + 1, trainings)
        if not last:
            row = first[new - 1] if new <= len(first) else int(np.argmax(scores))
    return found


def score(
    search: Any, state: Any, mean: np.ndarray, deviation: np.ndarray, tried: list[int], key: jax.Array
) -> np.ndarray:
    """The acquisition of every row."""
    if search.acquisition == "log_ei":
        gain = (mean - mean[tried].max()) / np.maximum(deviation, 1e-12)
        return deviation * (norm.pdf(gain) + gain * norm.cdf(gain))
    if search.acquisition == "thompson":
        return mean + deviation * np.asarray(jax.random.normal(key, mean.shape))
    return mean + search.beta * deviation


RECOMMEND: Mapping[str, Callable[..., list[int]]] = {
    "uniform": lambda table, rounds, kind, seed: [0] * rounds,
    "natural": lambda table, rounds, kind, seed: [1] * rounds,
    "random": recommend_random,
    "law": regressed(law),
    "trees": regressed(trees),
    "duet": recommend_duet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--feedback", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ablate", action="store_true", help="vary our search instead of comparing it")
    parser.add_argument("--small", type=Path, nargs="+", default=[], help="tables of smaller budgets, for --ablate")
    options = parse(parser, "replay")
    ours = OURS if options.ablate else "duet"
    kept: dict[tuple[str, str, str], np.ndarray] = {}
    groups: dict[str, list[str]] = {}
    cells = []
    for task, sets in TASKS.items():
        table, small = read(options.table, sets), [read(path, sets) for path in options.small]
        if any(len(one.values) != len(table.values) for one in small):
            parser.error(f"the tables of --small must have the {len(table.values)} rows of {options.table}")
        best = table.values.max()
        for kind in options.feedback:
            ways = {"": {OURS: recommend_duet}} | variants(kind, small) if options.ablate else {"": RECOMMEND}
            for group, some in ways.items():
                groups[group] = list(dict.fromkeys([*groups.get(group, []), *some]))
                for name, way in some.items():
                    rows = [way(table, options.rounds, kind, seed) for seed in range(options.seeds)]
                    kept[task, kind, name] = (best - table.values[np.array(rows)]) / table.spread
            methods = {
                name: compared(kept[task, kind, name], kept[task, kind, ours])
                for some in ways.values()
                for name in some
            }
            uniform = float((best - table.values[0]) / table.spread)
            told = {"uniform": uniform, "seed_deviation": float(table.again.std(ddof=1) / table.spread)}
            cells.append({"task": task, "feedback": kind, **told, "methods": methods})
            shown = ", ".join(f"{name} {found['regret']:.2f}" for name, found in methods.items())
            print(f"{task:26} {kind:6} {shown}", flush=True)
    kinds = {kind: summarise(kind, kept, cells, ours) for kind in options.feedback}
    for kind, methods in kinds.items():
        for name, found in methods.items():
            print(f"{kind:6} {name:24} {found['regret']:.3f}, more than ours by {found['more_than_ours']}")
    cost = {"rows": len(table.values), "budget": table.budget, "seconds_a_round": table.seconds}
    write(options.output, options, {"table_of": cost, "groups": groups, "kinds": kinds, "cells": cells})


def summarise(
    kind: str, kept: Mapping[tuple[str, str, str], np.ndarray], cells: list[dict[str, Any]], ours: str
) -> dict[str, dict[str, Any]]:
    """Of each method means over tasks, and in how many of them it is worse and better than ours.

    Tasks of one seed hear the same noise, so an interval is of seeds.
    """
    some = [one["methods"] for one in cells if one["feedback"] == kind]
    means = {name: np.mean([kept[task, kind, name] for task in TASKS], axis=0) for name in some[0]}
    found = {}
    for name, curves in means.items():
        intervals = [methods[name]["more_than_ours"][1:] for methods in some]
        found[name] = compared(curves, means[ours]) | {
            "worse_than_ours": sum(low is not None and low > 0 for low, _ in intervals),
            "better_than_ours": sum(high is not None and high < 0 for _, high in intervals),
            "by_round": np.round(curves.mean(0), 4).tolist(),
        }
    return found


def compared(curves: np.ndarray, ours: np.ndarray) -> dict[str, Any]:
    """The mean regret at the end, of curves `[seeds, rounds]`, and how much more than ours it is, with its interval."""
    more = (curves - ours)[:, -1]
    low, high = bootstrap(more) if len(more) > 1 else (None, None)
    return {"regret": float(curves[:, -1].mean()), "more_than_ours": [float(more.mean()), low, high]}


def variants(kind: str, small: list[Table]) -> dict[str, dict[str, Callable[..., list[int]]]]:
    """Our search varied, those that mean something for a kind of feedback, by what is asked."""
    found: dict[str, dict[str, Callable[..., list[int]]]] = {
        group: {
            name: functools.partial(recommend_duet, told_as=told_as, **settings)
            for name, (settings, told_as) in some.items()
            if told_as in ("mean", {"noisy": "stderr", "stars": "ordinal"}.get(kind))
        }
        for group, some in ABLATIONS.items()
    }
    if kind == "noisy":
        found["trainings a mixture"] = {
            f"{n} trainings a mixture": functools.partial(recommend_duet, trainings=n) for n in (2, 4)
        }
    if kind == "stars":
        found["coarse feedback"] = {f"{n} stars": functools.partial(recommend_duet, levels=n) for n in (2, 3, 10)}
    found["budget"] = {f"{one.budget} examples a training": heard_of(one) for one in small}
    return {group: some for group, some in found.items() if some}


def heard_of(cheap: Table) -> Callable[..., list[int]]:
    """Our search that hears of another table than it is judged by."""
    return lambda table, rounds, kind, seed: recommend_duet(cheap, rounds, kind, seed)


if __name__ == "__main__":
    main()
