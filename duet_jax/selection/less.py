"""LESS (Xia et al. 2024, arXiv 2402.04333): training examples whose steps of Adam point along the targets' gradients.

A short training on a random sample leaves one checkpoint an epoch. At each, the step that Adam would make of every
training example alone and the plain gradients of the targets are sketched; the score of an example is the sum of
their cosines over checkpoints, weighted by each epoch's mean learning rate, and the maximum over target sets.

Where we differ: sketches are CountSketches in a few bits, whose measured error is told, in place of dense projections
in float16; gradients are those of the adapters that the study trains, or of all linear layers under full training.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.influence import scores
from duet_jax.influence.build import Point, measured_error, sketch
from duet_jax.influence.features import Adam, moments
from duet_jax.influence.gradients import PLAIN
from duet_jax.influence.projections import CountSketch
from duet_jax.influence.scores import LESS_CODE, LESS_PAPER, Checkpoint, checkpoint_weights
from duet_jax.selection.pool import Pool
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.optimiser import learning_rates
from duet_jax.training.sft import Trainer, TrainState


def less(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Scores float32 `[examples]` of each domain.

    Args:
      pool: what is scored, and for what.
      selector: of kind "less".
      folder: keeps checkpoints and stores; a run that was killed goes on from what is there.
    """
    data = join(pool.train)
    sets = pool.targets or tuple(zip(pool.names, pool.validation, strict=True))
    targets = join([examples for _, examples in sets])
    subtasks = np.repeat(np.arange(len(sets)), [len(examples) for _, examples in sets])
    trainer = pool.warm_up_trainer(selector.warmup_epochs)
    ends = _warm_up(pool, trainer, data, selector.warmup_examples, folder)
    weights = checkpoint_weights(learning_rates(trainer.settings, ends[-1]), ends)
    checkpoints = [
        _sketched(pool, selector, _load(pool, trainer, place), data, targets, place, weight)
        for place, weight in zip(_epochs(folder, len(ends)), weights.tolist(), strict=True)
    ]
    scoring = LESS_PAPER if selector.form == "paper" else LESS_CODE
    sizes = [len(part) for part in pool.train]
    if pool.targets:
        found = scores.utilities(checkpoints, scoring, subtasks)
    else:
        each = np.concatenate([np.asarray(block) for _, block in scores.blocks(checkpoints, scoring, subtasks)])
        found = each[np.arange(len(data)), np.repeat(np.arange(len(sizes)), sizes)]
    return np.split(found, np.cumsum(sizes)[:-1])


def _warm_up(pool: Pool, trainer: Trainer, data: Encoded, most: int, folder: Path) -> list[int]:
    """Trains, keeping the state of each epoch's end, and gives the number of steps at each."""
    rows = pool.sample(len(data), most, 0)
    epochs = trainer.settings.epochs
    each = len(trainer.plan(data, rows, pool.seed)) // epochs
    ends = [each * (epoch + 1) for epoch in range(epochs)]

    def keep(step: int, state: TrainState) -> None:
        with Checkpoints(_epochs(folder, epochs)[step // each - 1] / "state", {}) as checkpoints:
            checkpoints.save(step, state, {})

    if not (folder / "trained").exists():
        pool.warm_up(trainer, data, rows, folder / "training", "warm-up", keep)
        (folder / "trained").touch()
    return ends


def _epochs(folder: Path, count: int) -> list[Path]:
    return [folder / f"epoch-{number}" for number in range(1, count + 1)]


def _load(pool: Pool, trainer: Trainer, place: Path) -> Point:
    with Checkpoints(place / "state", {}) as checkpoints:
        found = checkpoints.restore(trainer.start(jax.random.key(0)))
    assert found is not None
    return pool.point(trainer, found[1].trainable, moments(found[1].optimiser))


def _sketched(
    pool: Pool, selector: SelectorConfig, point: Point, data: Encoded, targets: Encoded, folder: Path, weight: float
) -> Checkpoint:
    """Stores of training examples and targets at one checkpoint."""
    feature = Adam("paper" if selector.form == "paper" else "less_code")
    stores = [
        sketch(
            point,
            examples,
            folder / name,
            pool.batching,
            projection=CountSketch(selector.k, pool.seed),
            feature=of,
            row_format=selector.row_format,
            on_progress=pool.progress(f"{folder.name}, {name}"),
        )
        for name, examples, of in (("training", data, feature), ("targets", targets, PLAIN))
    ]
    if not stores[0].finished:
        error = measured_error(
            point, (data, stores[0]), (targets, stores[1]), pool.batching, feature=feature, seed=pool.seed
        )
        stores[0].finish(error._asdict())
        pool.say(f"less, {folder.name}: {error}")
    return Checkpoint(stores[0], stores[1], weight)
