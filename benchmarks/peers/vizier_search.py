"""Vizier on the same objectives: reads one JSON request, writes a line of JSON for each seed as it is done.

Run by a Python that has google-vizier (`benchmarks/search_regret.py --vizier-python`). Its default algorithm
(GP-UCB-PE, arXiv 2408.11527) searches a box, as Vizier knows no simplex: a weight in [0, 1] for each domain, divided by
their sum. Scores are padded to multiples of ten, without which every round compiles again. It recommends the tried
mixture of the highest posterior mean. Version 0.1.24 needs an old jax, and packages that still know it:

    pip install google-vizier[jax]==0.1.24 jax==0.4.35 jaxlib==0.4.35 flax==0.10.0 optax==0.2.3 chex==0.1.87 'numpy<2'
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from vizier import algorithms
from vizier import pyvizier as vz
from vizier._src.algorithms.designers.gp_ucb_pe import VizierGPUCBPEBandit
from vizier.pyvizier.converters import padding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from search_objectives import Feedback, Objective, draw  # noqa: E402

SCHEDULE = padding.PaddingSchedule(num_trials=padding.PaddingType.MULTIPLES_OF_10)


def study(request: dict) -> Iterator[dict]:
    """`objective`, `domains`, `feedback`, `fraction`, `rounds`, `seeds`: searches of drawn objectives."""
    for seed in request["seeds"]:
        objective = draw(request["objective"], request["domains"], seed)
        feedback = Feedback.draw(request["feedback"], objective, request["rounds"], seed, request["fraction"])
        yield {"seed": seed, **run(objective, feedback, request["rounds"], seed)}


def run(objective: Objective, feedback: Feedback, rounds: int, seed: int) -> dict:
    size = len(objective.best)
    problem = vz.ProblemStatement()
    for i in range(size):
        problem.search_space.root.add_float_param(f"weight{i}", 0.0, 1.0)
    problem.metric_information.append(vz.MetricInformation("score", goal=vz.ObjectiveMetricGoal.MAXIMIZE))
    designer = VizierGPUCBPEBandit(problem, padding_schedule=SCHEDULE, rng=jax.random.PRNGKey(seed))
    rng, failures = np.random.default_rng([seed, 1]), 0
    trials: list[vz.Trial] = []
    tried: list[np.ndarray] = []
    began = time.perf_counter()
    for number in range(rounds):
        suggested = designer.suggest(1)[0]
        weights = [suggested.parameters.get_value(f"weight{i}") for i in range(size)]
        if None in weights or not 0 < sum(weights) < np.inf:
            # Its maximiser found nothing but numbers that are none.
            failures += 1
            weights = rng.uniform(size=size).tolist()
            suggested = vz.TrialSuggestion({f"weight{i}": weight for i, weight in enumerate(weights)})
        tried.append(np.array(weights) / sum(weights))
        value, _ = feedback(objective(tried[-1]), number)
        trial = suggested.to_trial(number + 1)
        trial.complete(vz.Measurement(metrics={"score": float(value)}))
        trials.append(trial)
        designer.update(algorithms.CompletedTrials([trial]), algorithms.ActiveTrials())
    mean = np.asarray(designer.predict(trials).mean).reshape(-1)
    recommended = tried[int(np.argmax(mean))]
    return {
        "regret": objective.regret(recommended),
        "recommended": recommended.tolist(),
        "failures": failures,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    versions = {"google-vizier": importlib.metadata.version("google-vizier"), "jax (vizier)": jax.__version__}
    for line in study(json.load(sys.stdin)):
        print(json.dumps({**line, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
