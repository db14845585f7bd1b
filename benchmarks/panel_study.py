"""The quickstart, rated by people instead of scored: what its mixture loses, with real trainings, processes and HTTP.

For each seed the quickstart's study is run twice: with its own feedback, and with `duet run --feedback people` beside
`duet serve --rule count=N`, two processes, whose open trials a scripted panel rates through POST /api/ratings. A rater
of a trial goes by what the quickstart would have measured of that very model: 3 stars at the score of the uniform
mixture, one more for each 0.35 nats, and to that the rater's bias (standard deviation 0.6 stars), noise (0.7) and
rounding. Each trial is rated by some of the panel, drawn anew.

Regret is the best mixture's score (half cats, half dogs, by the task's symmetry) less that of the recommended one, each
the mean of several models trained anew, in nats; `share` is the part of what the uniform mixture loses that is lost.

    python benchmarks/panel_study.py --output
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from search_common import HERE, parse, write
from study_common import score

from duet_jax import config, duet, job
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study, Trial

CONFIG = HERE.parent / "configs" / "quickstart.yaml"
BEST = {"cats": 0.5, "dogs": 0.5, "birds": 0.0, "noise": 0.0}
UNIFORM = dict.fromkeys(BEST, 0.25)
UNIT, BIAS, NOISE, STARS = 0.35, 0.6, 0.7, 5


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """One of ours, ended at the end."""
    line = [sys.executable, "-m", "duet_jax.cli", *command]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as found:
        try:
            yield found
        finally:
            found.terminate()


def rate(
    client: httpx.Client, tokens: Tokens, trial: Trial, value: float, options: argparse.Namespace, seed: int
) -> int:
    """The panel rates one trial until it is told; how many ratings were sent."""
    bias = np.random.default_rng([seed, 99]).normal(0, BIAS, options.panel)
    rng = np.random.default_rng([seed, trial.trial])
    chosen = rng.choice(options.panel, options.raters, replace=False)
    headers = {"authorization": f"Bearer {tokens.trial(trial.trial)}"}
    for i in range(options.ratings):
        rater = int(chosen[i % options.raters])
        star = int(np.clip(np.rint(value + bias[rater] + rng.normal(0, NOISE)), 1, STARS))
        vote = {"key": str(i), "trial": trial.trial, "stars": star, "rater": f"r{rater}", "item": str(i)}
        while (found := client.post("/api/ratings", json=vote, headers=headers)).status_code == 429:
            time.sleep(float(found.headers["retry-after"]))
        found.raise_for_status()
    return options.ratings


def rated_study(made: job.Job, options: argparse.Namespace, seed: int, folder: Path, middle: float) -> duet.Result:
    """The study that people rate, from beginning to end."""
    changes = [f"seed={seed}", f"task.people={{open: {options.open}, heard: {options.heard}}}", "task.max_new_tokens=8"]
    run = ["run", str(CONFIG), "--study", str(folder), "--quiet", "--feedback", "people", *changes]
    with process(*run) as training:
        while not Study.exists(folder):
            assert training.poll() is None, "the run ended before it began"
            time.sleep(0.2)
        study, tokens = Study.open(folder), Tokens(folder)
        rated: set[int] = set()
        with process("serve", str(folder), "--port", "0", "--rule", f"count={options.ratings}") as serving:
            assert serving.stdout is not None
            address = next(found[1] for line in serving.stdout if (found := re.match(r"testers: (http://[^/]+)", line)))
            with httpx.Client(base_url=address, timeout=60) as client:
                while training.poll() is None:
                    for trial in study.trials():
                        if trial.stage == "trained" and trial.status == "pending" and trial.trial not in rated:
                            assert made.task is not None
                            truth = made.task(duet.deployed(made, study, trial)).value
                            rate(client, tokens, trial, 3 + (truth - middle) / UNIT, options, seed)
                            rated.add(trial.trial)
                    time.sleep(0.2)
        assert training.returncode == 0, f"the run ended with status {training.returncode}"
    assert rated == set(range(study.config.rounds))
    # All rounds are told, so that nothing is trained: the result of the run that has ended.
    return duet.run(study.config, folder, quiet=True)


def distance(mixture: dict[str, float]) -> float:
    """Total variation from the best mixture."""
    return 0.5 * sum(abs(mixture[name] - share) for name, share in BEST.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratings", type=int, default=24, help="of each trial (default 24)")
    parser.add_argument("--raters", type=int, default=4, help="that rate a trial (default 4)")
    parser.add_argument("--panel", type=int, default=12, help="raters there are (default 12)")
    parser.add_argument("--open", type=int, default=1, help="trials rated at a time (default 1)")
    parser.add_argument("--heard", choices=("ordinal", "mean"), default="ordinal", help="how the search hears stars")
    parser.add_argument("--trainings", type=int, default=5, help="models that a mixture's score is the mean of")
    options = parse(parser, "panel_study")
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.perf_counter()
            told = config.load(CONFIG, [f"seed={seed}"])
            exact = duet.run(told, folder / "exact", quiet=True)
            seconds = {"exact": time.perf_counter() - began}
            made = job.prepare(told, folder, lambda line: None)
            task = made.task
            assert task is not None
            middle = Study.open(folder / "exact").trials()[0].feedback
            assert middle is not None
            began = time.perf_counter()
            people = rated_study(made, options, seed, folder / "people", middle["value"])
            seconds["people"] = time.perf_counter() - began
            best, uniform = (score(made, task, mixture, options.trainings, folder) for mixture in (BEST, UNIFORM))
            row: dict = {"seed": seed, "best": best, "uniform": uniform}
            for way, result in (("exact", exact), ("people", people)):
                assert result.mixture is not None
                regret = best - score(made, task, result.mixture, options.trainings, folder)
                row[way] = {
                    "mixture": result.mixture,
                    "distance": distance(result.mixture),
                    "regret": regret,
                    "share": regret / (best - uniform),
                    "seconds": seconds[way],
                }
        rows.append(row)
        shown = (f"{way} {row[way]['regret']:.3f} nats ({row[way]['share']:.0%})" for way in ("exact", "people"))
        print(f"seed {seed}: best {best:.3f}, uniform {uniform:.3f}; regret {', '.join(shown)}", flush=True)
    names = ("distance", "regret", "share")
    middles = {way: {name: float(np.median([row[way][name] for row in rows])) for name in names} for way in seconds}
    for way, found in middles.items():
        print(f"{way}: median " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    write(options.output, options, {"median": middles, "rows": rows})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
