"""What a selection is worth: models trained on it, and on what it is compared with, scored on an unseen task.

Each is trained anew from the base, as in a round of a study. All have the same seed, so that they differ by their
examples alone. Beneath a folder are

    NAME-HASH/training/    the training's checkpoint, by a hash of the base, the examples and the settings
    NAME-HASH/HASH.json    the result, by a hash of the task

so that a run that was killed goes on to the same numbers, another selection finds the baselines, and another task the
trained models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax._files import write
from duet_jax.config import SelectConfig
from duet_jax.data import join
from duet_jax.distributed.processes import lead
from duet_jax.feedback import Deployed, Task
from duet_jax.loading import Loaded

# Of random numbers; other parts of a selection draw from [seed, number].
RANDOM_BASELINE = 10


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What one model was trained on, and how it does.

    Attributes:
      name: "selected", or of a baseline.
      examples: that it was trained on.
      steps: of the optimiser.
      loss: mean training loss per response token, nats; None where nothing was trained, or it was not finite.
      score: of the task, higher is better; None where the loss was not finite.
      stderr: standard error of the score, if the task has one.
      details: further numbers of the task, by name.
      seconds: of training and scoring, in the process that finished them.
    """

    name: str
    examples: int
    steps: int
    loss: float | None
    score: float | None
    stderr: float | None
    details: Mapping[str, float]
    seconds: float

    def __str__(self) -> str:
        line = f"{self.name}: {self.examples} examples, {self.steps} steps"
        if self.score is None:
            return f"{line}; no score, for the training loss is not finite: lower training.learning_rate"
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{line}{loss}, score {self.score:.4g}{error}, {self.seconds:.0f} s"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """How models are trained and scored.

    Attributes:
      loaded: the base, the training examples of all domains, and compiled training.
      task: that scores them.
      task_identity: what decides its scores, as values of JSON.
      seed: of the order of examples, of dropout and of the first values of adapters.
      folder: for checkpoints and results.
      on_progress: is given what is done, how much of it is done, and of how much.
    """

    loaded: Loaded
    task: Task
    task_identity: list[Any]
    seed: int
    folder: Path
    on_progress: Callable[[str, int, int], None]

    def __call__(self, name: str, rows: np.ndarray) -> Evaluated:
        """Trains on some examples and scores the model; from the folder where it is there already.

        Args:
          name: of the model.
          rows: int64 `[n]`, of the training examples of all domains, one after the other; in any order. Without any
            the base is scored as it is.

        Raises:
          FeedbackError: the task could not be asked; the trained model is kept, and a new run asks again.
        """
        rows = np.sort(rows)
        place = self.folder / f"{name}-{_hash(self._training(rows))}"
        kept = place / f"{_hash(self.task_identity)}.json"
        if lead(kept.is_file):
            return Evaluated(**json.loads(kept.read_text(encoding="utf-8")))
        place.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        steps, loss, model = self._train(name, rows, place / "training")
        score = stderr = None
        details: Mapping[str, float] = {}
        if loss is None or math.isfinite(loss):
            self.on_progress(f"{name}, scoring", 0, 1)
            feedback = self.task(model)
            score, stderr, details = feedback.value, feedback.stderr, dict(feedback.details)
        else:
            loss = None
        result = Evaluated(name, len(rows), steps, loss, score, stderr, details, time.perf_counter() - began)
        lead(write, kept, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
        return result

    def _train(self, name: str, rows: np.ndarray, folder: Path) -> tuple[int, float | None, Deployed]:
        """Steps, mean loss (None without a training) and the model."""
        loaded, trainer = self.loaded, self.loaded.trainer
        if not len(rows):
            return 0, None, Deployed(loaded.engine, trainer.load_base())
        trained = trainer.fit(
            join(loaded.train),
            rows,
            seed=self.seed,
            start_seed=self.seed,
            fingerprint=loaded.model.fingerprint,
            folder=folder,
            on_step=lambda report: self.on_progress(f"{name}, training", report.step, report.steps),
        )
        return trained.steps, trained.loss, Deployed(loaded.engine, *trainer.deployable(trained.trainable))

    def _training(self, rows: np.ndarray) -> dict[str, Any]:
        """What decides a model, as values of JSON."""
        loaded, trainer = self.loaded, self.loaded.trainer
        base = {
            "model": loaded.model.fingerprint,
            "chat": loaded.chat,
            "dtype": str(np.dtype(trainer.compute_dtype)),
            "buckets": trainer.buckets,
        }
        if not len(rows):
            return base
        examples = join(loaded.train).take(rows).digest
        return base | {"examples": examples, "training": repr(trainer.settings), "seed": self.seed}


def choices(
    config: SelectConfig, sizes: Sequence[int], chosen: Sequence[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """What is trained on: the selection, and then each baseline.

    Args:
      config: of the selection.
      sizes: training examples of each domain.
      chosen: rows of each domain that were selected.

    Yields:
      The name and rows int64 of all domains, one after the other; none of "none".
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    yield "selected", np.concatenate([start + rows for start, rows in zip(starts, chosen, strict=False)])
    counts = [len(rows) for rows in chosen]
    for name in config.baselines:
        if name == "random":
            rng = np.random.default_rng([config.seed, RANDOM_BASELINE])
            groups = [(0, sum(sizes), sum(counts))] if config.pooled else list(zip(starts, sizes, counts, strict=False))
            parts = [start + rng.choice(size, count, replace=False) for start, size, count in groups]
            yield name, np.concatenate(parts)
        else:
            yield name, np.arange(sum(sizes) if name == "all" else 0)


def _hash(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
