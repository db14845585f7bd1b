"""Does the mixture that a study found beat the uniform one, and each domain alone, at the same budget?

Runs the study of a configuration (or continues it), then trains the best mixture, the uniform one and, with
--vertices, every single domain again with fresh seeds, so that the best has no advantage of having been picked.

    DUET_DATA=../shared/data python benchmarks/domains.py configs/smollm2_domains.yaml --vertices
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from search_common import HERE, write

from duet_jax import config, duet
from duet_jax.feedback import Deployed
from duet_jax.job import Job, prepare


def measure(job: Job, mixture: np.ndarray, settings: dict, seed: int) -> dict:
    """Trains one mixture with a trial's settings and asks the task."""
    began = time.perf_counter()
    rows, _ = job.sample(job.counts(mixture), seed)
    trainer = job.trainer_for(settings)
    trained = trainer.fit(job.data, rows, seed=seed, start_seed=job.config.seed)
    assert job.task is not None
    feedback = job.task(Deployed(job.engine, *trainer.deployable(trained.trainable)))
    return {
        "seed": seed,
        "value": feedback.value,
        "stderr": feedback.stderr,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--study", type=Path, help="study directory (default: studies/NAME)")
    parser.add_argument("--vertices", action="store_true", help="train every domain alone as well")
    parser.add_argument("--seeds", type=int, default=1, help="fresh trainings of each mixture")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/NAME.json)")
    options = parser.parse_args()
    settings = config.load(options.config, options.overrides)
    folder = options.study or Path("studies") / settings.name
    output = options.output or HERE / "results" / f"{settings.name}.json"

    began = time.perf_counter()
    result = duet.run(settings, folder)
    study_seconds = time.perf_counter() - began
    job = prepare(settings, folder, lambda line: None)
    size = len(job.names)
    assert result.mixture is not None
    mixtures = {
        "uniform": np.full(size, 1 / size),
        "best found": np.array([result.mixture[name] for name in job.names]),
    }
    if options.vertices:
        mixtures |= {f"only {name}": vertex for name, vertex in zip(job.names, np.eye(size), strict=True)}
    kept = folder / "comparison.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in range(1000, 1000 + options.seeds):
        for name, mixture in mixtures.items():
            key = f"{name}/{seed}"
            if key not in done:
                done[key] = measure(job, mixture, result.settings or {}, seed)
                kept.write_text(json.dumps(done))
    assert job.task is not None
    base = job.task(Deployed(job.engine, job.trainer.load_base()))
    rows = [{"mixture": "no training", "value": base.value, "stderr": base.stderr, "values": [base.value]}]
    for name, mixture in mixtures.items():
        runs = [done[f"{name}/{seed}"] for seed in range(1000, 1000 + options.seeds)]
        rows.append(
            {
                "mixture": name,
                "shares": dict(zip(job.names, mixture.tolist(), strict=True)),
                "value": float(np.mean([run["value"] for run in runs])),
                "stderr": runs[0]["stderr"],
                "values": [run["value"] for run in runs],
            }
        )
    for row in rows:
        shares = row.get("shares", {})
        words = " ".join(f"{name}={share:.2f}" for name, share in shares.items() if share > 0)
        print(f"{row['mixture']:22} {row['value']:9.4f}  {words}")
    about = {
        "config": settings.name,
        "study_seconds": study_seconds,
        "rounds": settings.rounds,
        "budget": settings.budget,
        "expected": {"value": result.value, "stderr": result.stderr, "trial": result.trial},
        "rows": rows,
    }
    write(output, options, about)


if __name__ == "__main__":
    main()
