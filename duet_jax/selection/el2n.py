"""EL2N (Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021): how wrong a model is early on.

The score of a classified example is the Euclidean norm of the predicted distribution less the one-hot of its label,
by a model after a few epochs: large for hard examples and for wrong labels. A response has a distribution at every
token; the mean of the norms over its tokens is our convention. The paper averages over several trainings: here is
one, which starts from a model that is trained already.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.config import SelectorConfig
from duet_jax.data import join
from duet_jax.distributed.place import map_rows
from duet_jax.kernels.linear_cross_entropy import token_error_norms
from duet_jax.models import llama
from duet_jax.models.lora import Lora
from duet_jax.selection.passes import each
from duet_jax.selection.pool import Pool


def el2n(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Mean norm of the error over response tokens, end of text included, float32 `[examples]` of each domain.

    One model is trained on a sample of all domains for the selector's `warmup_epochs`.

    Args:
      pool: what is scored.
      selector: of kind "el2n".
      folder: keeps the training's checkpoint and finished parts; a run that was killed goes on from what is there.
    """
    data, trainer = join(pool.train), pool.warm_up_trainer(selector.warmup_epochs)
    rows = pool.sample(len(data), selector.warmup_examples, 0)
    trained = pool.warm_up(trainer, data, rows, folder / "training", "warm-up")
    params, lora = trainer.deployable(trained.trainable)
    params = llama.frozen(params, trainer.compute_dtype)

    @jax.jit
    def mean_norms(params: llama.Params, lora: Lora | None, tokens: Array, mask: Array) -> Array:
        dtype, mesh = trainer.compute_dtype, trainer.mesh
        hidden = llama.hidden_states(trainer.model, params, tokens, lora=lora, compute_dtype=dtype, mesh=mesh)

        def of_rows(hidden: Array, labels: Array, mask: Array, head: Array) -> Array:
            flat = hidden.reshape(-1, hidden.shape[-1])
            norms = token_error_norms(flat, head, labels.reshape(-1), mask.reshape(-1), compute_dtype=dtype)
            return jnp.sum(norms.reshape(mask.shape), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

        return map_rows(mesh, of_rows, (hidden[:, :-1], tokens[:, 1:], mask[:, 1:]), (llama.output_head(params),))

    found = each(
        pool,
        lambda batch, lengths: mean_norms(params, lora, batch.tokens, batch.loss_mask),
        data,
        folder / "norms",
        "norms",
    )
    return np.split(found, np.cumsum([len(part) for part in pool.train])[:-1])
