"""The figures of a selection: utilities of what was chosen and of all, and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from duet_jax.report.drawing import ACCENT, INK, new, panels, styled, svg

BINS = 24
# Of the utilities, outside of which they are counted in the outermost bins.
OUTER = (0.5, 99.5)


@styled
def utilities(parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Utilities of all examples of a domain and, before them, of the chosen ones; by name, each `[n]` and finite."""

    def draw(everything: np.ndarray, chosen: np.ndarray, ax: Axes) -> None:
        low, high = np.percentile(everything, OUTER)
        edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
        for values, colour, alpha in ((everything, INK, 0.25), (chosen, ACCENT, 0.9)):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            ax.stairs(counts, edges, fill=True, color=colour, alpha=alpha, linewidth=0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return panels("utilities", "utilities", [(name, partial(draw, *pair)) for name, pair in parts.items()])


@styled
def lengths(found: np.ndarray) -> str:
    """Lengths of the chosen examples in characters, `[n]`."""
    figure, ax = new(height=2.2)
    found = np.maximum(found, 1)
    edges = np.geomspace(found.min(), max(found.max(), found.min() + 1), BINS + 1)
    counts, _ = np.histogram(np.clip(found, edges[0], edges[-1]), edges)
    ax.stairs(counts, edges, fill=True, color=ACCENT, alpha=0.9, linewidth=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("characters of prompt and response")
    ax.set_ylabel("chosen examples")
    return svg(figure, "lengths", "lengths of the chosen examples")
