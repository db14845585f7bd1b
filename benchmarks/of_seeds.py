"""What several seeds of a benchmark have in common: means and standard deviations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def mean_and_deviation(values: Sequence[float | None]) -> list[float | None]:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return [None, None]
    return [float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None]


def over(records: Sequence[Record], measures: Iterable[str] | None = None) -> dict[str, list[float | None]]:
    """Of one record a seed, of all that it has or of some measures."""
    return {name: mean_and_deviation([record[name] for record in records]) for name in measures or records[0]}


def over_each(
    records: Sequence[Mapping[str, Record]], measures: Iterable[str] | None = None
) -> dict[str, dict[str, list[float | None]]]:
    """Of several records a seed, by their names."""
    return {name: over([record[name] for record in records], measures) for name in records[0]}
