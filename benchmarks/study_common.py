"""What the benchmarks with whole studies share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from duet_jax.feedback import Deployed
from duet_jax.job import Job
from duet_jax.types import Feedback


def score(
    made: Job, task: Callable[[Deployed], Feedback], mixture: Mapping[str, float], seeds: int, folder: Path
) -> float:
    """Mean of a task's score of models trained anew on a mixture, with as many seeds that no study uses."""
    counts = made.counts(np.array([mixture[name] for name in made.names]))
    found = []
    for seed in range(1000, 1000 + seeds):
        rows, _ = made.sample(counts, seed)
        place = folder / f"{'-'.join(map(str, counts))}-{seed}"
        trained = made.trainer.fit(
            made.data, rows, seed=seed, start_seed=seed, fingerprint=made.model.fingerprint, folder=place
        )
        found.append(task(Deployed(made.engine, *made.trainer.deployable(trained.trainable))).value)
    return float(np.mean(found))
