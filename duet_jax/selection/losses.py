"""Losses of examples under a model: forward passes, made once for all selectors that read them.

    losses-HASH.npz                 finished: sums and tokens
    losses-HASH-SHAPES/part-0.npy   sums of the first `PART` batches; deleted when all are there

The hash is of the model, of the examples and of the dtype of products: DavIR, RHO-loss, loss bands and preference
training find the same file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from duet_jax._files import save_array, save_arrays
from duet_jax.data import Encoded, plan_forward
from duet_jax.distributed.place import place, row_parts
from duet_jax.distributed.processes import lead
from duet_jax.feedback.likelihood import response_log_probs, response_tokens, scorer
from duet_jax.models import llama
from duet_jax.models.lora import Lora
from duet_jax.selection.pool import Pool

# Batches whose losses are written together.
PART = 64
# Where a selector that scores by losses leaves these, an array of all domains' examples each, beside its scores.
DETAILS = "details.npz"


class Losses(NamedTuple):
    """Losses of some examples, in their order.

    Attributes:
      sums: negative log-likelihood of each response with its end of text, float64 `[n]`, nats; not finite where the
        model computes no number.
      tokens: scored tokens of each, int64 `[n]`, at least 1.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Loss per scored token, float64 `[n]`, nats."""
        return self.sums / self.tokens


def losses(
    pool: Pool, data: Encoded, params: llama.Params, lora: Lora | None, identity: str, folder: Path, name: str
) -> Losses:
    """Losses of `data` under a model, from `folder` where they are there already.

    Args:
      pool: whose network, dtype, buckets and progress are used.
      data: the examples.
      params, lora: of the model.
      identity: whatever tells this model from all others: a fingerprint, or what it was trained from and how.
      folder: of all losses; a run that was killed goes on from what is there.
      name: of the model, for progress.
    """
    found = kept(pool, data, identity, folder)
    if found is not None:
        return found
    path = _path(pool, data, identity, folder)
    trainer, report = pool.trainer, pool.progress(f"{name}, losses")
    # Rounded where they lie: what many devices hold together may be more than one of them can.
    params, lora = place(trainer.mesh, (params, lora))
    params = place(trainer.mesh, llama.frozen(params, trainer.compute_dtype))
    plan = plan_forward(data.lengths, trainer.buckets, pool.batching.size, row_parts(trainer.mesh))
    rows = np.concatenate([np.zeros(0, np.int32), *(chosen for _, _, chosen in plan)])
    # Finished parts count only where the rest is batched as before: in other shapes, sums differ in their last bits.
    shapes = hashlib.sha256(repr([batch[:2] for batch in plan]).encode() + rows.tobytes()).hexdigest()
    parts = path.with_name(f"{path.stem}-{shapes[:8]}")
    parts.mkdir(parents=True, exist_ok=True)
    sums, done = np.zeros(len(data)), 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report(done, len(data))

    for number, first in enumerate(range(0, len(plan), PART)):
        batches, part = plan[first : first + PART], parts / f"part-{number}.npy"
        chosen = np.concatenate([batch[2] for batch in batches])
        if lead(part.exists):
            on_batch(len(chosen))
        else:
            score = scorer(trainer.model, trainer.compute_dtype, trainer.mesh)
            values = response_log_probs(score, params, lora, data, batches, trainer.pad_id, trainer.mesh, on_batch)
            lead(save_array, part, -values)
        sums[chosen] = np.load(part, allow_pickle=False)
    result = Losses(sums, response_tokens(data))
    lead(save_arrays, path, result._asdict())
    lead(shutil.rmtree, parts)
    return result


def base_losses(pool: Pool, data: Encoded, folder: Path) -> Losses:
    """Losses of `data` under the base model."""
    found = kept(pool, data, pool.fingerprint, folder)
    if found is not None:
        return found
    return losses(pool, data, pool.trainer.load_base(), None, pool.fingerprint, folder, "base model")


def kept(pool: Pool, data: Encoded, identity: str, folder: Path) -> Losses | None:
    """Finished losses under the model of that identity, or None: whoever would have to train it first asks here."""
    path = _path(pool, data, identity, folder)
    if not lead(path.is_file):
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Losses(arrays["sums"], arrays["tokens"])


def _path(pool: Pool, data: Encoded, identity: str, folder: Path) -> Path:
    whole = json.dumps([identity, data.digest, str(jnp.dtype(pool.trainer.compute_dtype))])
    return folder / f"losses-{hashlib.sha256(whole.encode()).hexdigest()[:16]}.npz"
