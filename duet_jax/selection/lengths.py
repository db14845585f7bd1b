"""Baselines of length: the longest responses, and random ones as long as those that another selection chose.

Many scores of examples follow the length of their responses. What is left of a selection's advantage over random
examples of the same lengths is not owed to length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded
from duet_jax.data.sources import read_rows
from duet_jax.errors import DataError
from duet_jax.selection.pool import Pool

# Lengths are told apart by so many quantiles of the pool's.
BINS = 10


def length(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Tokens of each response, end of text included, float64 `[examples]` of each domain."""
    return [_tokens(part).astype(np.float64) for part in pool.train]


def length_matched(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Weights by which random examples are as long as those that another selection chose of the same domain.

    Responses are sorted into at most ten bins by quantiles of the domain's lengths. Where the other selection chose a
    share r of a bin's examples, each of them gets the weight -log(1 - r): if as many examples of the domain are then
    drawn by the rule "weighted", the expected number of each bin is what the other selection chose of it (for large
    bins; Rosen, Annals of Mathematical Statistics 1972). For small r this is r itself, the bin's share of the chosen
    over its share of the pool, up to a factor. A bin that was chosen whole counts as short of half an example.

    Args:
      pool: what is scored.
      selector: of kind "length_matched"; `path` names scores.parquet or selected.jsonl of the other selection, whose
        examples must all be among those of the pool.
      folder: not used.

    Returns:
      float64 `[examples]` of each domain, finite and at least 0; all 0 where nothing of the domain was chosen.

    Raises:
      DataError: the file is of no selection, or of one of other examples.
    """
    assert selector.path is not None
    chosen = _chosen(selector.path, pool)
    found = []
    for part, selected in zip(pool.train, chosen, strict=True):
        tokens = _tokens(part)
        edges = np.unique(np.quantile(tokens, np.arange(1, BINS) / BINS))
        place = np.searchsorted(edges, tokens, side="left")
        there = np.bincount(place, minlength=len(edges) + 1)
        taken = np.bincount(place[selected], minlength=len(edges) + 1)
        left = np.maximum(there - taken, 0.5) / np.maximum(there, 1)
        found.append(np.where(taken == 0, 0.0, -np.log(left))[place])
    return found


def _tokens(data: Encoded) -> np.ndarray:
    return data.lengths - data.prompt_lengths


def _chosen(path: str, pool: Pool) -> list[np.ndarray]:
    """Which examples of each domain a file of a selection says were chosen, bool `[examples]`."""
    number = {name: i for i, name in enumerate(pool.names)}
    row_of = [{identifier: row for row, identifier in enumerate(part.ids)} for part in pool.train]
    chosen = [np.zeros(len(part), np.bool_) for part in pool.train]
    for where, columns in read_rows(path, split="train", name="selector.path"):
        if "id" not in columns or "domain" not in columns:
            raise DataError(
                f"selector.path: {where} has no column 'id' or no column 'domain'; give scores.parquet or "
                f"selected.jsonl of a selection"
            )
        if not columns.get("selected", True):
            continue
        domain = number.get(columns["domain"])
        row = None if domain is None else row_of[domain].get(str(columns["id"]))
        if domain is None or row is None:
            raise DataError(
                f"selector.path: {where} chooses the example '{columns['id']}' of the domain '{columns['domain']}', "
                f"which is not among the training examples; give a selection of the same data"
            )
        chosen[domain][row] = True
    if not any(part.any() for part in chosen):
        raise DataError(f"selector.path: '{path}' chooses no example; give a selection that chose some")
    return chosen
