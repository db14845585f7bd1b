"""The reference that online batch selection compares with: its losses of all training examples, computed once.

RHO-loss (Mindermann et al., ICML 2022, arXiv 2206.07137) trains it on held-out examples, DavIR (arXiv 2310.13008) on
the pool itself. It is that of the selectors of these names: one that is trained for both is trained once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import OnlineConfig, SelectorConfig
from duet_jax.data import join
from duet_jax.errors import DataError
from duet_jax.selection.pool import Pool
from duet_jax.selection.reference import given_losses, trained_losses


def reference_losses(pool: Pool, online: OnlineConfig, folder: Path) -> np.ndarray:
    """Summed loss of each response under the reference, float32 `[examples of all domains]`, nats.

    Args:
      pool: its training examples are scored. Without a given reference, one is trained by the trainer's settings on its
        held-out examples (rule "rho") or on its training examples ("davir").
      online: the rule, and the reference if there is one.
      folder: of all selections; a run that was killed goes on from what is there.

    Raises:
      DataError: there are no held-out examples to train a reference on.
      ModelError: the given reference cannot be loaded, or has other tokens or a shorter context than the base.
    """
    data, held_out = join(pool.train), join(pool.validation)
    if online.reference is not None:
        found = given_losses(pool, online.reference, "training.online.reference", data, folder)
    elif online.rule == "rho" and not len(held_out):
        raise DataError(
            "training.online: no example is held out to train a reference on; raise data.validation_fraction, or give "
            "training.online.reference"
        )
    else:
        teachers, other = (held_out, "what it is trained on") if online.rule == "rho" else (data, "held-out examples")
        watched = {"the pool": data} | ({other: held_out} if len(held_out) else {})
        as_selector = SelectorConfig(kind=online.rule, warmup_epochs=pool.trainer.settings.epochs)
        found = trained_losses(pool, as_selector, data, teachers, watched, folder)
    finite = np.isfinite(found.sums)
    mean = found.sums[finite].sum() / max(found.tokens[finite].sum(), 1)
    line = f"reference of online selection: mean loss {mean:.3f} nats a token over {len(data)} training examples"
    pool.say(line if finite.all() else f"{line}, without {np.sum(~finite)} of no finite loss, which are chosen last")
    return found.sums.astype(np.float32)
