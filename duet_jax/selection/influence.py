"""Influence functions: how much a training example lowers the loss of the targets, with the curvature in between.

`I(z) = <g(targets), (F + damping)^-1 g(z)>`, with F the Fisher matrix as EK-FAC has it (see `influence.kfac`): what an
infinitely small part of z more in the training would lower the targets' mean loss by (Koh and Liang 2017, with the
sign turned, so that more is better). In DUET (arXiv 2502.00270, section 3.2) every domain has a model of its own,
trained on it, and the targets are held-out examples of the domain; given targets share one model of all domains.

Gradients of the targets are few, so nothing is projected: scores are exact inner products, one backward pass each.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax._files import save_array
from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.processes import lead
from duet_jax.influence import kfac
from duet_jax.selection.pool import Pool
from duet_jax.training.sft import Trainer

# Examples whose scores are written together.
PART = 1024


def influence(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Scores float32 `[examples]` of each domain.

    Args:
      pool: what is scored, and for what.
      selector: of kind "influence".
      folder: keeps checkpoints and finished parts; a run that was killed goes on from what is there.
    """
    trainer = pool.warm_up_trainer(selector.warmup_epochs)
    if pool.targets:
        data = join(pool.train)
        sets = [examples for _, examples in pool.targets]
        found = _scores(pool, selector, trainer, data, sets, folder / "all", 0)
        return np.split(found, np.cumsum([len(part) for part in pool.train])[:-1])
    return [
        _scores(pool, selector, trainer, data, [targets], folder / f"domain-{number}", number, name)
        for number, (name, data, targets) in enumerate(zip(pool.names, pool.train, pool.validation, strict=True))
    ]


def _scores(
    pool: Pool,
    selector: SelectorConfig,
    trainer: Trainer,
    data: Encoded,
    sets: list[Encoded],
    folder: Path,
    number: int,
    name: str = "all domains",
) -> np.ndarray:
    """Scores `[n]` of some examples for the mean of target sets, by a model that is trained on a sample of them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [np.arange(first, min(first + PART, len(data))) for first in range(0, len(data), PART)]
    paths = [folder / f"scores-{part:05d}.npy" for part in range(len(parts))]
    if not lead(lambda: all(path.exists() for path in paths)):
        rows = pool.sample(len(data), selector.warmup_examples, number)
        trained = pool.warm_up(trainer, data, rows, folder / "training", f"{name}, warm-up")
        point = pool.point(trainer, trained.trainable)
        batches = [(tokens, weights) for _, tokens, weights in pool.batching.batches(data, rows)]
        curvature = kfac.fit(point.gradients, point.params, point.lora, batches, key=jax.random.key(pool.seed))
        totals = [point.total(targets, pool.batching) for targets in sets]
        mean = jax.tree.map(lambda *each: jnp.mean(jnp.stack(each), axis=0)[None], *totals)
        query = kfac.precondition(curvature, mean, kfac.Damping(selector.damping))
        program, report = point.gradients.inner_products(), pool.progress(f"{name}, scores")
        for path, part in zip(paths, parts, strict=True):
            if not lead(path.exists):
                lead(save_array, path, point.each(program, data, part, pool.batching, targets=query)[:, 0])
            report(int(part[-1]) + 1, len(data))
    return np.concatenate([np.load(path, allow_pickle=False) for path in paths])
