"""A short training with its checkpoints and sketches: what the selectors that follow a training share.

A model trains on a random sample of all domains, and what it was at each epoch's end is kept, Adam's moments included.
There, the step that Adam would make of every training example alone is sketched (LESS, Xia et al. 2024, arXiv
2402.04333, sections 3.1 and 4.1). None of it depends on the targets: LESS and NICE, which differ only in what they
make of those, find one trajectory in one folder, and whichever comes second trains and sketches nothing of it again.

    trajectory-HASH/training/              the training's own checkpoint; trained: it is over
    trajectory-HASH/epoch-1/state/         factors or parameters, and moments
    trajectory-HASH/epoch-1/FORM-K-FORMAT/ a store of sketches of all training examples
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.processes import lead
from duet_jax.influence import scores
from duet_jax.influence.build import Point, is_finished, sketch
from duet_jax.influence.features import Adam, moments
from duet_jax.influence.projections import CountSketch
from duet_jax.influence.scores import LESS_CODE, LESS_PAPER, Checkpoint, checkpoint_weights
from duet_jax.influence.store import Store
from duet_jax.selection.pool import Pool
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.optimiser import learning_rates
from duet_jax.training.sft import Trainer, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A trajectory at the end of one epoch.

    Attributes:
      name: as "epoch-1".
      point: gradients there.
      train: sketches of what Adam makes of each training example, a complete store.
      weight: mean learning rate of the epoch, over the sum of all epochs'.
      feature: what `train` holds of a gradient.
      projection: that sketches are made by.
    """

    name: str
    point: Point
    train: Store
    weight: float
    feature: Adam
    projection: CountSketch


def stages(pool: Pool, selector: SelectorConfig, folder: Path) -> Iterator[Stage]:
    """The stages of the pool's trajectory, in order; each is sketched when it is asked for.

    Args:
      pool: what is trained on.
      selector: how: `warmup_examples`, `warmup_epochs`, `form`, `k` and `row_format` count.
      folder: of all trajectories. A run that was killed goes on from what is there.
    """
    data = join(pool.train)
    trainer = pool.warm_up_trainer(selector.warmup_epochs)
    place = folder / f"trajectory-{_digest(pool, trainer, selector)[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    ends = _train(pool, trainer, data, selector.warmup_examples, place)
    weights = checkpoint_weights(learning_rates(trainer.settings, ends[-1]), ends)
    feature = Adam("paper" if selector.form == "paper" else "less_code")
    projection = CountSketch(selector.k, pool.seed)
    for epoch, weight in zip(_epochs(place, len(ends)), weights.tolist(), strict=True):
        point = _load(pool, trainer, epoch)
        train = sketch(
            point,
            data,
            epoch / f"{feature.name}-{selector.k}-{selector.row_format}",
            pool.batching,
            projection=projection,
            feature=feature,
            row_format=selector.row_format,
            on_progress=pool.progress(f"{epoch.name}, training"),
        )
        if not is_finished(train):
            lead(train.finish)
        yield Stage(epoch.name, point, train, weight, feature, projection)


def utilities(
    pool: Pool, selector: SelectorConfig, checkpoints: list[Checkpoint], subtasks: np.ndarray
) -> list[np.ndarray]:
    """Scores float32 `[examples]` of each domain, from sketches at all stages.

    Args:
      pool: its `targets` say whether each example is scored for its best target, or for its own domain.
      selector: `form` says whether an example is compared with a target's mean, or with each of its sketches.
      checkpoints: one a stage.
      subtasks: int `[m]`, the number of each target sketch's target or domain.
    """
    scoring = LESS_PAPER if selector.form == "paper" else LESS_CODE
    sizes = [len(part) for part in pool.train]
    if pool.targets:
        found = scores.utilities(checkpoints, scoring, subtasks)
    else:
        each = np.concatenate([np.asarray(block) for _, block in scores.blocks(checkpoints, scoring, subtasks)])
        found = each[np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)]
    return np.split(found, np.cumsum(sizes)[:-1])


def _digest(pool: Pool, trainer: Trainer, selector: SelectorConfig) -> str:
    """A hash of everything that decides the checkpoints, hexadecimal."""
    whole = pool.training_identity(trainer) | {
        "examples": [part.digest for part in pool.train],
        "warmup_examples": selector.warmup_examples,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _train(pool: Pool, trainer: Trainer, data: Encoded, most: int | None, folder: Path) -> list[int]:
    """Trains, keeping the state of each epoch's end, and gives the number of steps at each."""
    rows = pool.sample(len(data), most, 0)
    epochs = trainer.settings.epochs
    each = len(trainer.plan(data, rows, pool.seed)) // epochs
    ends = [each * (epoch + 1) for epoch in range(epochs)]

    def keep(step: int, state: TrainState) -> None:
        with Checkpoints(_epochs(folder, epochs)[step // each - 1] / "state", {}) as checkpoints:
            checkpoints.save(step, state, {})

    if not lead((folder / "trained").exists):
        pool.warm_up(trainer, data, rows, folder / "training", "warm-up", keep)
        lead((folder / "trained").touch)
    return ends


def _epochs(folder: Path, count: int) -> list[Path]:
    return [folder / f"epoch-{number}" for number in range(1, count + 1)]


def _load(pool: Pool, trainer: Trainer, place: Path) -> Point:
    with Checkpoints(place / "state", {}) as checkpoints:
        found = checkpoints.restore(trainer.start(jax.random.key(0)))
    assert found is not None
    return pool.point(trainer, found[1].trainable, moments(found[1].optimiser))
