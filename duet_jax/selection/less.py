"""LESS (Xia et al. 2024, arXiv 2402.04333): training examples whose steps of Adam point along the targets' gradients.

A short training on a random sample leaves one checkpoint an epoch. At each, the step that Adam would make of every
training example alone and the plain gradients of the targets are sketched; the score of an example is the sum of
their cosines over checkpoints, weighted by each epoch's mean learning rate, and the maximum over target sets.

Where we differ: sketches are CountSketches in a few bits, whose measured error is told, in place of dense projections
in float16; gradients are those of the adapters that the study trains, or of all linear layers under full training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.processes import lead
from duet_jax.influence.build import is_finished, measured_error, sketch
from duet_jax.influence.gradients import PLAIN
from duet_jax.influence.scores import Checkpoint
from duet_jax.selection.pool import Pool
from duet_jax.selection.trajectory import Stage, stages, utilities


def less(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Scores float32 `[examples]` of each domain.

    Args:
      pool: what is scored, and for what.
      selector: of kind "less".
      folder: keeps the targets' sketches, and beside it stands the trajectory; a run that was killed goes on from
        what is there.
    """
    sets = pool.sets
    targets = join([examples for _, examples in sets])
    subtasks = np.repeat(np.arange(len(sets)), [len(examples) for _, examples in sets])
    checkpoints = [_sketched(pool, selector, stage, targets, folder) for stage in stages(pool, selector, folder.parent)]
    return utilities(pool, selector, checkpoints, subtasks)


def _sketched(pool: Pool, selector: SelectorConfig, stage: Stage, targets: Encoded, folder: Path) -> Checkpoint:
    """Stores of training examples and targets at one checkpoint."""
    store = sketch(
        stage.point,
        targets,
        folder / stage.name / "targets",
        pool.batching,
        projection=stage.projection,
        feature=PLAIN,
        row_format=selector.row_format,
        on_progress=pool.progress(f"{stage.name}, targets"),
    )
    if not is_finished(store):
        train = join(pool.train), stage.train
        error = measured_error(
            stage.point, train, (targets, store), pool.batching, feature=stage.feature, seed=pool.seed
        )
        lead(store.finish, error._asdict())
        pool.say(f"less, {stage.name}: {error}")
    return Checkpoint(stage.train, store, stage.weight)
