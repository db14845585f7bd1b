"""Examples that together stand for all others of their domain, in the order in which a greedy search chooses them.

Each domain is searched by itself, over its embeddings (see `embeddings`), by one of the programs of `greedy`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.selection import greedy
from duet_jax.selection.embeddings import embeddings
from duet_jax.selection.pool import Pool


def log_det(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Utilities float64 `[examples]` of each domain by the greedy search for the greatest log-determinant.

    Args:
      pool: what is scored.
      selector: of kind "log_det"; `depth` limits the search.
      folder: beside it stand embeddings, which other selectors read, too.

    Returns:
      In (1, 2] for the examples that are chosen, falling in the order of the choice: the rule "top_k" takes the greedy
      choice of any size up to the depth. In [0, 1] for the rest, by what each would add as the next one.
    """
    return _search(greedy.log_det, pool, selector, folder)


def facility_location(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """The same by the greedy search for examples of which one is near to each."""
    return _search(greedy.facility_location, pool, selector, folder)


def k_center(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """The same by the farthest from all that are chosen."""
    return _search(greedy.k_center, pool, selector, folder)


def _search(program: greedy.Program, pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    found = []
    for number, vectors in enumerate(embeddings(pool, selector, folder.parent), start=1):
        depth = min(selector.depth, len(vectors))
        order, gains = greedy.run(program, vectors, depth)
        # Gains are not negative but for rounding, and every chosen example stands above all others.
        rest = np.maximum(gains.astype(np.float64), 0)
        utilities = rest / max(rest.max(), np.finfo(np.float32).tiny)
        utilities[order] = 2 - np.arange(depth) / depth
        found.append(utilities)
        pool.on_progress(f"{selector.kind}, domains", number, len(pool.train))
    return found
