"""How good is the recommended mixture after some rounds, on objectives whose optimum is known?

Every seed draws an objective and its noise (search_objectives.py), the same for all methods:

  search    ours; of stars it hears the mean
  timid     ours, with one standard deviation in the confidence bound instead of two (on demand)
  log-ei    ours, with log expected improvement (on demand)
  ordinal   ours, told each rater's stars (only where there are stars)
  random    Dirichlet draws, the recommendation by our surrogate, so that only what is tried differs
  uniform   equal shares, nothing tried
  law       the same draws; c - exp(b + t.r) fitted by least squares, the recommendation is its optimum
  botorch   BoTorch, tuned (peers/botorch_search.py); `botorch-ei` (on demand) with log expected improvement
  loop      BoTorch inside the loop of DUET's public code, defects included
  vizier    Vizier's default algorithm (peers/vizier_search.py; on demand: minutes a study)

Regret is in units of the objective's standard deviation over random mixtures, at least 1e-6. A cell is an objective,
a number of domains and a kind of feedback; ours wins or loses it if the 95% paired bootstrap interval of the mean
difference of log10 regrets excludes 0, which needs ten seeds. The last table takes all cells together, with the same
interval over cells: a study of the loop takes a minute, so that there is one seed of it in a cell. Every regret is
appended to a file as it comes, and not computed again; with --output all of them are in the JSON, too, in the order
of the seeds.

    python benchmarks/search_regret.py
    python benchmarks/search_regret.py --domains 3 9 20 --seeds 50 --feedback gaussian known stars --peer-python PYTHON
    python benchmarks/search_regret.py --domains 3 9 20 --seeds 50 --report --output    # what there is so far
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import least_squares
from search_common import HERE, MISSING, ask, make_search, parse, recommend, write
from search_objectives import KINDS, NAMES, Feedback, Objective, draw

from duet_jax.search import Stars

NO_VIZIER = "Vizier is left out: --vizier-python names no Python that has google-vizier."
LEAST = 1e-6
FEWEST = 10  # seeds of a cell that is won or lost
STANDARD = ["search", "ordinal", "random", "uniform", "law", "botorch", "loop"]
BOTORCH = {"botorch": "tuned", "loop": "loop", "botorch-ei": "tuned-ei"}
PEERS = {**dict.fromkeys(BOTORCH, "botorch_search"), "vizier": "vizier_search"}


def run_search(objective: Objective, feedback: Feedback, rounds: int, seed: int, **settings: Any) -> np.ndarray:
    search = make_search(len(objective.best), **settings)
    state, key = search.init(), jax.random.key(seed)
    for number in range(rounds):
        mixture, _ = search.ask(state, key=jax.random.fold_in(key, number))
        state = search.tell(state, mixture, *feedback(objective(mixture), number))
    return recommend(search, state)


def run_ordinal(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> np.ndarray:
    search = make_search(len(objective.best), feedback=Stars(len(feedback.thresholds) + 1))
    state, key = search.init(), jax.random.key(seed)
    for number in range(rounds):
        mixture, _ = search.ask(state, key=jax.random.fold_in(key, number))
        stars = feedback.ratings(objective(mixture), number).astype(int).tolist()
        state = search.tell(state, mixture, stars)
    return recommend(search, state)


def random_rounds(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> tuple[np.ndarray, list]:
    mixtures = np.random.default_rng([seed, 2]).dirichlet(np.ones(len(objective.best)), rounds)
    return mixtures, [feedback(objective(mixture), number) for number, mixture in enumerate(mixtures)]


def run_random(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> np.ndarray:
    search = make_search(len(objective.best))
    state = search.init()
    for mixture, heard in zip(*random_rounds(objective, feedback, rounds, seed), strict=True):
        state = search.tell(state, mixture, *heard)
    return recommend(search, state)


def run_uniform(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> np.ndarray:
    return np.full(len(objective.best), 1 / len(objective.best))


def run_law(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> np.ndarray:
    mixtures, heard = random_rounds(objective, feedback, rounds, seed)
    slopes = fit_law(mixtures, np.array([value for value, _ in heard]))
    # A monotone function of a linear one: its optimum is a vertex.
    return np.eye(len(slopes))[np.argmin(slopes)]


def fit_law(mixtures: np.ndarray, values: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """The slopes t of `c - exp(b + t.r)`, by least squares with a little ridge: there may be fewer values."""
    values = (values - values.mean()) / (values.std() or 1.0)

    def residuals(numbers: np.ndarray) -> np.ndarray:
        exponent = np.minimum(numbers[1] + mixtures @ numbers[2:], 20.0)
        return np.concatenate([numbers[0] - np.exp(exponent) - values, ridge * numbers[2:]])

    def jacobian(numbers: np.ndarray) -> np.ndarray:
        falls = -np.exp(np.minimum(numbers[1] + mixtures @ numbers[2:], 20.0))[:, None]
        top = np.concatenate([np.ones_like(falls), falls, falls * mixtures], 1)
        size = mixtures.shape[1]
        return np.concatenate([top, np.concatenate([np.zeros((size, 2)), ridge * np.eye(size)], 1)])

    start = np.concatenate([[1.0, 0.0], np.zeros(mixtures.shape[1])])
    return least_squares(residuals, start, jacobian, max_nfev=200).x[2:]


OURS: dict[str, Callable[[Objective, Feedback, int, int], np.ndarray]] = {
    "search": run_search,
    "timid": partial(run_search, beta=1.0),
    "log-ei": partial(run_search, acquisition="log_ei"),
    "ordinal": run_ordinal,
    "random": run_random,
    "uniform": run_uniform,
    "law": run_law,
}


class Cells:
    """Regrets by cell, method and seed, kept in a file of JSON lines; several processes may append to it."""

    def __init__(self, path: Path, rounds: int, fraction: float) -> None:
        self.path, self.settings = path, {"rounds": rounds, "fraction": fraction}
        self.regrets: dict[tuple, dict[int, float]] = {}
        self.versions: dict[str, str] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # The process was killed while it wrote.
                continue
            if all(row[name] == value for name, value in self.settings.items()):
                self._keep(row)

    def _keep(self, row: dict) -> None:
        at = (row["objective"], row["domains"], row["feedback"], row["method"])
        self.regrets.setdefault(at, {})[row["seed"]] = row["regret"]
        self.versions |= row.get("versions", {})

    def add(self, row: dict) -> None:
        self._keep(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._broken() + json.dumps({**row, **self.settings}) + "\n")

    def _broken(self) -> bool:
        """Whether the last line was never finished."""
        with self.path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read() != b"\n"

    def missing(self, at: tuple, seeds: int) -> list[int]:
        done = self.regrets.get(at, {})
        return [seed for seed in range(seeds) if seed not in done]

    def logs(self, at: tuple, seeds: list[int]) -> np.ndarray:
        return np.log10([max(self.regrets[at][seed], LEAST) for seed in seeds])


def compute(cells: Cells, at: tuple, seeds: int, pythons: Mapping[str, str | None]) -> None:
    """The regrets of a cell and a method that are missing; of peers where there is a Python of their script."""
    name, size, kind, method = at
    rounds, fraction = cells.settings["rounds"], cells.settings["fraction"]
    row = {"objective": name, "domains": size, "feedback": kind, "method": method}
    missing = cells.missing(at, seeds)
    if method in OURS:
        for seed in missing:
            objective = draw(name, size, seed)
            feedback = Feedback.draw(kind, objective, rounds, seed, fraction)
            mixture = OURS[method](objective, feedback, rounds, seed)
            cells.add({**row, "seed": seed, "regret": objective.regret(mixture)})
    elif missing and (python := pythons[PEERS[method]]):
        request = {"task": "study", "mode": BOTORCH.get(method), "seeds": missing, **row, **cells.settings}
        for answer in ask(PEERS[method], python, request):
            known = answer["versions"].items() <= cells.versions.items()
            kept = ("seed", "regret", "failures", *(() if known else ("versions",)))
            cells.add({**row, **{key: answer[key] for key in kept}})


def bootstrap(differences: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """95% interval of the mean."""
    picks = np.random.default_rng(0).integers(0, len(differences), (draws, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def summarise(cells: Cells, place: tuple, methods: list[str], seeds: int) -> dict:
    """The mean log10 regret of each method in a cell, and the differences of ours to it on the seeds of both."""
    row: dict = dict(zip(("objective", "domains", "feedback"), place, strict=True))
    ours = cells.regrets.get((*place, "search"), {})
    for method in methods:
        theirs = cells.regrets.get((*place, method), {})
        common = [seed for seed in range(seeds) if seed in ours and seed in theirs]
        if not common:
            continue
        logs = cells.logs((*place, method), common)
        regrets = " ".join(f"{theirs[seed]:.3g}" for seed in common)
        row[method] = {"seeds": len(common), "log10_regret": float(logs.mean()), "regrets": regrets}
        if method != "search":
            differences = cells.logs((*place, "search"), common) - logs
            row[method] |= {"difference": float(differences.mean())}
            if len(common) >= FEWEST:
                low, high = bootstrap(differences)
                verdict = "won" if high < 0 else "lost" if low > 0 else "tied"
                row[method] |= {"interval": [low, high], "verdict": verdict}
    return row


def show(row: dict, methods: list[str]) -> str:
    text = f"{row['objective']:18} {row['domains']:3} {row['feedback']:8}"
    for method in methods:
        cell = row.get(method)
        mark = {"won": "+", "lost": "-"}.get(cell.get("verdict", ""), " ") if cell else ""
        text += f" {cell['log10_regret']:9.2f}{mark}" if cell else f" {'':10}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME")
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--feedback", nargs="+", default=["gaussian"], choices=KINDS)
    parser.add_argument("--methods", nargs="+", default=STANDARD, choices=[*OURS, *PEERS])
    parser.add_argument("--seeds", type=int, default=3, help="objectives per cell (default 3)")
    parser.add_argument("--rounds", type=int, default=30, help="scores per search (default 30)")
    parser.add_argument("--noise", type=float, default=0.2, help="of a score, in units of the scale (default 0.2)")
    parser.add_argument("--peer-python", help="a Python with torch and botorch")
    parser.add_argument("--vizier-python", help="a Python with google-vizier")
    parser.add_argument(
        "--cells", type=Path, default=HERE / "results" / "search_regret.jsonl", help="where to continue"
    )
    parser.add_argument("--report", action="store_true", help="compute nothing")
    options = parse(parser, "search_regret")
    pythons = {"botorch_search": options.peer_python, "vizier_search": options.vizier_python}
    if not options.report:
        for script in {PEERS[name] for name in options.methods if name in PEERS and not pythons[PEERS[name]]}:
            print(MISSING if script == "botorch_search" else NO_VIZIER)

    cells = Cells(options.cells, options.rounds, options.noise)
    places = list(itertools.product(options.objectives, options.domains, options.feedback))
    print(
        f"mean log10 regret (+ ours is better, - worse)\n{'':31}" + "".join(f" {name:>10}" for name in options.methods)
    )
    rows = []
    for place in places:
        if not options.report:
            for method in options.methods:
                if method == "ordinal" and place[2] != "stars":
                    continue
                compute(cells, (*place, method), options.seeds, pythons)
        rows.append(summarise(cells, place, options.methods, options.seeds))
        print(show(rows[-1], options.methods), flush=True)

    print(f"\n{'rival':11} {'cells':>5} {'studies':>7} {'won':>5} {'tied':>5} {'lost':>5}  mean difference (95%)")
    rivals = {}
    for method in options.methods:
        found = [row[method] for row in rows if "difference" in row.get(method, {})]
        if not found:
            continue
        counts = {verdict: sum(cell.get("verdict") == verdict for cell in found) for verdict in ("won", "tied", "lost")}
        differences = np.array([cell["difference"] for cell in found])
        mean, (low, high) = float(differences.mean()), bootstrap(differences)
        studies = sum(cell["seeds"] for cell in found)
        rivals[method] = {"cells": len(found), "studies": studies, **counts}
        rivals[method] |= {"difference": mean, "interval": [low, high]}
        won = " ".join(f"{count:5}" for count in counts.values())
        print(f"{method:11} {len(found):5} {studies:7} {won}  {mean:.3f} ({low:.3f} to {high:.3f})")
    write(options.output, options, {"rivals": rivals, "cells": rows}, cells.versions)


if __name__ == "__main__":
    main()
