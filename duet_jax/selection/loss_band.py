"""Examples of middling loss: neither those that the base model knows nor those that it cannot make sense of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax._files import save_arrays
from duet_jax.config import SelectorConfig
from duet_jax.data import join
from duet_jax.distributed.processes import lead
from duet_jax.selection.losses import DETAILS, base_losses
from duet_jax.selection.pool import Pool


def loss_band(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """1 where the base model's mean loss a token lies between two quantiles of its domain, else 0; both ends included.

    Perplexity is the exponential of that loss, so a band of one is a band of the other. Quantiles are interpolated
    linearly: `low` 0 is the lowest loss and `high` 1 the highest, and both together keep everything.

    Args:
      pool: what is scored.
      selector: of kind "loss_band".
      folder: gets `details.npz`: `base_loss`, sums in nats, and `response_tokens` of all domains' examples in order.
        Beside it stand losses, which other selectors read, too.

    Returns:
      float64 `[examples]` of each domain; -inf where the loss is not finite.
    """
    losses = base_losses(pool, join(pool.train), folder.parent)
    lead(save_arrays, folder / DETAILS, {"base_loss": losses.sums, "response_tokens": losses.tokens})
    found = []
    for name, part in zip(
        pool.names, np.split(losses.means, np.cumsum([len(x) for x in pool.train])[:-1]), strict=True
    ):
        known = np.isfinite(part)
        low, high = np.quantile(part[known], [selector.low, selector.high]) if known.any() else (np.nan, np.nan)
        inside = (low <= part) & (part <= high)
        found.append(np.where(known, inside.astype(np.float64), -np.inf))
        unknown = "" if known.all() else f"; {np.sum(~known)} have no finite loss and are left out"
        pool.say(
            f"loss_band, {name}: {np.sum(inside)} of {len(part)} examples have a mean loss between {low:.3f} and "
            f"{high:.3f} nats a token{unknown}"
        )
    return found
