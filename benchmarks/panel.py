"""What a search loses by hearing people instead of numbers: panels of known bias and noise, no model trained.

    exact     the objective itself
    ordinal   stars as counts, whose thresholds and noise the search learns (`heard: ordinal`)
    mean      stars less what raters differ by, with a standard error (`heard: mean`)
    plain     the mean of all stars and its standard error, whoever gave them

A trial's value, in stars, is 3 at the average of random mixtures and moves by 0.8 with their standard deviation. Raters
have biases of 0.6 stars and noise of 0.7; each trial is rated by a few of them, drawn anew, so that who was asked
matters. Regret is of the mixture that is recommended, in standard deviations of the objective over random mixtures.

    python benchmarks/panel.py --output
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import numpy as np
from search_common import make_search, parse, recommend, write
from search_objectives import NAMES, draw

from duet_jax.search import Scores, Stars, mean_rating
from duet_jax.serve.panel import estimate
from duet_jax.serve.ratings import Vote

BIAS, NOISE, STARS, UNIT = 0.6, 0.7, 5, 0.8
WAYS = ("exact", "ordinal", "mean", "plain")


def ask_people(value: float, trial: int, options: argparse.Namespace, bias: np.ndarray, seed: int) -> list[Vote]:
    """The ratings of one trial: `options.raters` of the panel give as many each."""
    rng = np.random.default_rng([seed, trial])
    chosen = rng.choice(len(bias), options.raters, replace=False)
    votes = []
    for i in range(options.ratings):
        rater = chosen[i % options.raters]
        star = int(np.clip(np.rint(value + bias[rater] + rng.normal(0, NOISE)), 1, STARS))
        votes.append(Vote(key=str(i), trial=trial, stars=star, rater=f"r{rater}", item=str(i)))
    return votes


def heard(way: str, value: float, votes: list[Vote], trial: int) -> tuple[Any, float | None]:
    """What the search is told of a trial, and its standard error."""
    given = [vote.stars for vote in votes if vote.trial == trial]
    if way == "exact":
        return value, None
    if way == "ordinal":
        return given, None
    if way == "plain":
        return mean_rating(given, STARS)
    panel = estimate(votes, STARS)
    return panel.of(trial)[0], panel.own_error(trial, len(given))


def regrets(way: str, options: argparse.Namespace, seed: int) -> list[float]:
    """Regret of the recommended mixture after each round from the fourth on."""
    objective = draw(options.objective, options.domains, seed=seed)
    middle = float(np.mean(objective(np.random.default_rng(0).dirichlet(np.ones(options.domains), 4096))))
    bias = np.random.default_rng([seed, 99]).normal(0, BIAS, options.panel)
    search = make_search(options.domains, feedback=Stars(STARS) if way == "ordinal" else Scores())
    state, votes, found = search.init(), [], []
    for trial in range(options.rounds):
        mixture, _ = search.ask(state, key=jax.random.fold_in(jax.random.key(seed), trial))
        value = 3 + UNIT * (float(objective(mixture)) - middle) / objective.scale
        votes += ask_people(value, trial, options, bias, seed)
        state = search.tell(state, mixture, *heard(way, value, votes, trial))
        if trial >= 3:
            found.append(objective.regret(recommend(search, state)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="weighted-log", choices=NAMES)
    parser.add_argument("--domains", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--ratings", type=int, default=24, help="of each trial")
    parser.add_argument("--raters", type=int, default=4, help="that rate a trial")
    parser.add_argument("--panel", type=int, default=12, help="raters there are")
    parser.add_argument("--seeds", type=int, default=20)
    options = parse(parser, "panel")
    results = {}
    for way in WAYS:
        table = np.array([regrets(way, options, seed) for seed in range(options.seeds)])
        last = table[:, -1]
        results[way] = {
            "regret": round(float(last.mean()), 4),
            "stderr": round(float(last.std(ddof=1) / np.sqrt(len(last))), 4) if len(last) > 1 else None,
            "by_round": [round(float(x), 4) for x in table.mean(axis=0)],
        }
        print(way, json.dumps(results[way]), flush=True)
    write(options.output, options, {"regret": results})


if __name__ == "__main__":
    main()
