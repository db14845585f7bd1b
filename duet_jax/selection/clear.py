"""CLEAR's confidence as a utility: examples in whose responses the base model is confident (arXiv 2403.12776)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.curation.asking import confidence
from duet_jax.curation.confidence import known_mean
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.feedback import Deployed
from duet_jax.selection.pool import Pool


def clear(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Confidence float64 `[examples]` in each domain's responses, in [0, 1]; see `curation.asking`.

    It is -inf where no part of it can be had, as where all sampled answers are empty and nothing else has a weight.

    Args:
      pool: with `examples` and an `engine`; its model is asked as it is, not trained.
      selector: of kind "clear".
      folder: beside it, what was sampled and asked is kept for all selections of this kind.

    Raises:
      DuetError: as `curation.asking.confidence`.
    """
    assert pool.engine is not None and selector.confidence is not None
    model = Deployed(pool.engine, pool.trainer.load_base())
    respondent = ModelRespondent(model, pool.fingerprint, selector.confidence, pool.seed)
    every = [example for part in pool.examples for example in part]
    found = confidence(respondent, every, selector.confidence, folder.parent / "confidence", pool.on_progress)
    names = ("value", "similarity", "match", "reflection", "likelihood")
    means = {name: float(known_mean(getattr(found, name))) for name in names}
    parts = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items() if not np.isnan(mean))
    unknown = int(np.isnan(found.value).sum())
    end = f"; {unknown} of {len(every)} examples have none and are not chosen" if unknown else ""
    pool.say(f"clear: means of the confidence and its parts: {parts}{end}")
    return np.split(np.nan_to_num(found.value, nan=-np.inf), np.cumsum([len(part) for part in pool.examples])[:-1])
