"""CLEAR's confidence as a utility: examples in whose responses the base model is confident (arXiv 2403.12776)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.curation.asking import confidence, require_asked, summary
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.feedback import Deployed
from duet_jax.selection.pool import Pool


def clear(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Confidence float64 `[examples]` in each domain's responses, in [0, 1]; see `curation.asking`.

    It is -inf where no part of it can be had, as where the questions do not fit the model's context, or all sampled
    answers are empty and nothing else has a weight.

    Args:
      pool: with `examples` and an `engine`; its model is asked as it is, not trained.
      selector: of kind "clear".
      folder: beside it, what was sampled and asked is kept for all selections of this kind.

    Raises:
      DataError: no question about any example fits the model's context; before anything is computed.
      DuetError: as `curation.asking.confidence`.
    """
    assert pool.engine is not None and selector.confidence is not None
    model = Deployed(pool.engine, pool.trainer.load_base())
    respondent = ModelRespondent(model, pool.fingerprint, selector.confidence, pool.seed)
    every = [example for part in pool.examples for example in part]
    found = confidence(respondent, every, selector.confidence, folder.parent / "confidence", pool.on_progress)
    require_asked(every, found, respondent.longest)
    pool.say(f"clear: {summary(every, found)}")
    return np.split(np.nan_to_num(found.value, nan=-np.inf), np.cumsum([len(part) for part in pool.examples])[:-1])
