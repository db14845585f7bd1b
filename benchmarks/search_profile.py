"""Why some cells of `search_regret.py` are not won: where proposals go, and what becomes of a good domain once found.

Interior optima in 20 domains (bumps, quadratic-interior), numbers with unknown noise: of the last ten proposals the
regret, the largest share and how many domains have more than a thousandth, beside the regret of what is recommended
and its difference to BoTorch's on the same seeds (95% bootstrap interval); BoTorch, tuned, and ours as it is, with less
exploration, without the random mixtures of its first design (`initial` 1), and with ones far from each other in their
place.

Optima at a vertex in 20 domains (linear, quadratic-vertex), stars of five people: told as stars (ordinal) and as their
mean, how many domains had the largest share of some proposal, when the best one first had 30%, how often the mixture
that is recommended has it on top, and its regret where it does.

Regrets are in standard deviations over random mixtures; of recommended mixtures the mean log10.

    python benchmarks/search_profile.py --seeds 16 --peer-python PYTHON --output
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from search_common import MISSING, ask_botorch, make_search, parse, write
from search_objectives import Feedback, Objective, draw
from search_regret import bootstrap

from duet_jax.search import Stars, simplex

DOMAINS, ROUNDS, LAST, NOISE = 20, 30, 10, 0.2
INTERIOR, CORNER = ("bumps", "quadratic-interior"), ("linear", "quadratic-vertex")
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, beta 1": {"beta": 1.0},
    "ours, log EI": {"acquisition": "log_ei"},
    "ours, initial 1": {"initial": 1},
    "ours, far first": {"initial": 1, "far": 2},
}
WAYS: dict[str, dict[str, Any]] = {"ordinal": {"feedback": Stars(5)}, "mean": {}}


def search(
    objective: Objective, heard: Feedback, seed: int, far: int = 0, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The mixtures that were tried `[ROUNDS, d]`, and the one recommended.

    After the first, `far` are those of random mixtures, on faces too, that are farthest from all before on the sphere.
    """
    made = make_search(DOMAINS, **settings)
    state, key, tried = made.init(), jax.random.key(seed), []
    drawn = np.array(simplex.draws(jax.random.key(seed), 512, DOMAINS), np.float64)
    for number in range(ROUNDS):
        if 1 <= number <= far:
            mixture = drawn[np.argmin(np.max(np.sqrt(drawn) @ np.sqrt(np.array(tried)).T, axis=1))]
            mixture = mixture / mixture.sum()
        else:
            mixture, _ = made.ask(state, key=jax.random.fold_in(key, number))
        tried.append(mixture)
        value = objective(mixture)
        if "feedback" in settings:
            state = made.tell(state, mixture, heard.ratings(value, number).astype(int).tolist())
        else:
            state = made.tell(state, mixture, *heard(value, number))
    return np.array(tried), made.recommend(state).mixture


def regret(objective: Objective, mixture: np.ndarray) -> float:
    return (objective.optimum - float(objective(mixture))) / objective.scale


def means(rows: list[Mapping[str, float]]) -> dict[str, float | None]:
    """Means of what is known."""
    found: dict[str, float | None] = {}
    for name in rows[0]:
        known = [row[name] for row in rows if not np.isnan(row[name])]
        found[name] = round(float(np.mean(known)), 3) if known else None
    return found


def where(objective: Objective, tried: np.ndarray, recommended: np.ndarray) -> dict[str, float]:
    """Of an interior optimum: where the last proposals lie."""
    last = tried[-LAST:]
    return {
        "log10_regret": float(np.log10(max(regret(objective, recommended), 1e-6))),
        "last_regret": float(np.mean([regret(objective, mixture) for mixture in last])),
        "largest_share": float(last.max(axis=1).mean()),
        "domains": float((last > 1e-3).sum(axis=1).mean()),
    }


def fate(objective: Objective, tried: np.ndarray, recommended: np.ndarray) -> dict[str, float]:
    """Of an optimum at a vertex: when its domain was found, and what was made of it."""
    best = int(np.argmax(objective.best))
    found = np.flatnonzero(tried[:, best] > 0.3)
    log, on_top = float(np.log10(max(regret(objective, recommended), 1e-6))), recommended.argmax() == best
    return {
        "domains_tried": float(len(set(tried.argmax(axis=1).tolist()))),
        "first_tried": float(found[0]) if len(found) else float(ROUNDS),
        "never_tried": float(not len(found)),
        "on_top": float(on_top),
        "log10_regret": log,
        "log10_regret_on_top": log if on_top else float("nan"),
    }


def studies(
    name: str, kind: str, seeds: int, settings: dict[str, Any]
) -> Iterator[tuple[Objective, np.ndarray, np.ndarray]]:
    for seed in range(seeds):
        objective = draw(name, DOMAINS, seed=seed)
        heard = Feedback.draw(kind, objective, ROUNDS, seed, NOISE)
        yield objective, *search(objective, heard, seed, **settings)


def peer_studies(name: str, seeds: int, python: str) -> Iterator[tuple[Objective, np.ndarray, np.ndarray]]:
    about = {"objective": name, "domains": DOMAINS, "feedback": "gaussian", "rounds": ROUNDS, "fraction": NOISE}
    for answer in ask_botorch(python, {"task": "study", "mode": "tuned", "seeds": list(range(seeds)), **about}):
        objective = draw(name, DOMAINS, seed=answer["seed"])
        yield objective, np.array(answer["mixtures"]), np.array(answer["recommended"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--objectives", nargs="+", choices=(*INTERIOR, *CORNER), default=[*INTERIOR, *CORNER])
    parser.add_argument("--peer-python", help="a Python with torch and botorch")
    options = parse(parser, "search_profile")
    if not options.peer_python:
        print(MISSING)
    rows = []
    logs: dict[tuple[str, str], np.ndarray] = {}

    def add(
        name: str,
        method: str,
        look: Callable[..., dict[str, float]],
        found: Iterator[tuple[Objective, np.ndarray, np.ndarray]],
    ) -> None:
        each = [look(*one) for one in found]
        row = {"objective": name, "method": method, **means(each)}
        logs[name, method] = np.array([one["log10_regret"] for one in each])
        if look is where and method != "botorch" and options.peer_python:
            differences = logs[name, method] - logs[name, "botorch"]
            ends = float(differences.mean()), *bootstrap(differences)
            row |= {name: round(end, 3) for name, end in zip(("to_botorch", "low", "high"), ends, strict=True)}
        rows.append(row)
        write(options.output, options, {"rows": rows})
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for name in (name for name in INTERIOR if name in options.objectives):
        if options.peer_python:
            add(name, "botorch", where, peer_studies(name, options.seeds, options.peer_python))
        for method, settings in VARIANTS.items():
            add(name, method, where, studies(name, "gaussian", options.seeds, settings))
    for name in (name for name in CORNER if name in options.objectives):
        for method, settings in WAYS.items():
            add(name, method, fate, studies(name, "stars", options.seeds, settings))


if __name__ == "__main__":
    main()
