"""What a reference model makes of the training examples, beside the base model: what DavIR and RHO-loss compare.

The reference is given, or the base model is trained to it here. Two of one training share a folder:

    reference-HASH/training/       the training's own checkpoint
    reference-HASH/losses-*.npz    losses of samples at each epoch's end: whether it learns or memorises
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded
from duet_jax.selection.losses import Losses, base_losses, kept, losses
from duet_jax.selection.pool import Pool
from duet_jax.training.steps import TrainState

# Examples of each set whose loss is looked at after every epoch.
WATCHED = 256


def given_losses(pool: Pool, source: str, field: str, data: Encoded, folder: Path) -> Losses:
    """Losses of `data` under a model that is trained already.

    Args:
      pool: as for `losses`.
      source: of the model.
      field: of the configuration that names it, for messages.
      data: the examples.
      folder: of all losses.

    Raises:
      ModelError: see `Pool.reference`.
    """
    given = pool.reference(source, field)
    other = dataclasses.replace(pool, trainer=dataclasses.replace(pool.trainer, model=given.config))
    return losses(other, data, given.params, None, given.fingerprint, folder, "reference")


def trained_losses(
    pool: Pool, selector: SelectorConfig, data: Encoded, teachers: Encoded, watched: Mapping[str, Encoded], folder: Path
) -> Losses:
    """Losses of `data` under the base model after a training; how it went is said, an epoch a line.

    Args:
      pool: as for `losses`; its training is what the rounds have.
      selector: at most `warmup_examples` of the teachers are trained on, `warmup_epochs` times.
      data: the examples.
      teachers: what may be trained on.
      watched: named sets; the mean loss of a random sample of each is said for the base model and after every epoch.
      folder: of all losses and trainings. A run that was killed goes on from what is there, to the same bits.
    """
    trainer = pool.warm_up_trainer(selector.warmup_epochs)
    samples = {
        name: examples.take(pool.sample(len(examples), WATCHED, number + 1))
        for number, (name, examples) in enumerate(watched.items())
    }
    whole = pool.training_identity(trainer) | {
        "examples": teachers.digest,
        "warmup_examples": selector.warmup_examples,
        "watched": [sample.digest for sample in samples.values()],
    }
    identity = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    place, epochs = folder / f"reference-{identity[:16]}", trainer.settings.epochs
    rows = pool.sample(len(teachers), selector.warmup_examples, 0)
    each = len(trainer.plan(teachers, rows, pool.seed)) // epochs

    def at(epoch: int) -> str:
        return f"{identity} after epoch {epoch}"

    def watch(step: int, state: TrainState) -> None:
        params, lora = trainer.deployable(state.trainable)
        for sample in samples.values():
            losses(pool, sample, params, lora, at(step // each), place, f"reference after epoch {step // each}")

    found = kept(pool, data, identity, folder)
    if found is None:
        trained = pool.warm_up(trainer, teachers, rows, place / "training", "reference", watch)
        params, lora = trainer.deployable(trained.trainable)
        found = losses(pool, data, params, lora, identity, folder, "reference")
    for epoch in range(epochs + 1):
        means = []
        for name, sample in samples.items():
            then = kept(pool, sample, at(epoch), place) if epoch else base_losses(pool, sample, place)
            assert then is not None, f"{place} has no losses of epoch {epoch}"
            means.append(f"{then.sums.sum() / then.tokens.sum():.3f} on {name}")
        model = f"reference after epoch {epoch} of {epochs}" if epoch else "base model"
        pool.say(f"{model}: mean loss a token {', '.join(means)}")
    return found
