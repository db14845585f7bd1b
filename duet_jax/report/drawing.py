"""What all drawings of the report share: matplotlib as inline SVG, the same bytes for the same numbers.

Lines and letters take the page's colour, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

# Inches. Two drawings stand beside each other on a desk, and one fills a phone, where its letters can still be read.
WIDTH, PANEL = 4.5, 2.1
# Replaced by the page's text colour; no figure draws in it.
INK = "#010203"
ACCENT = "#d1603d"
COLOURS = (
    "#3f7fbf",
    "#e08e3c",
    "#4c9f70",
    "#c0504d",
    "#8f6fb0",
    "#8c6d4f",
    "#d57bb3",
    "#7f8c8d",
    "#a9a83f",
    "#3aa6b9",
)
STYLE: Any = {
    "svg.hashsalt": "duet",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    # A domain may have dollar signs in its name.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}

# From low scores to high ones; both ends can be told from white and from black, and by the colour-blind.
SCALE = (COLOURS[0], "#a98a9c", ACCENT)
SCORES = LinearSegmentedColormap.from_list("scores", SCALE)
# From the paper, whatever its colour, to a full share.
SHARES = LinearSegmentedColormap.from_list("shares", [(*to_rgb(COLOURS[0]), 0.08), (*to_rgb(COLOURS[0]), 1.0)])

styled = matplotlib.rc_context(STYLE)


def colours(count: int) -> list[str]:
    """One colour a domain, all readable on white and on black."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    spread = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, count))
    return [matplotlib.colors.to_hex(colour) for colour in spread]


def scaled(values: np.ndarray) -> np.ndarray:
    """Where each score `[n]` lies between the lowest, 0, and the highest, 1; all of them are at 1 where none differ."""
    span = np.ptp(values)
    return (values - values.min()) / span if span > 0 else np.ones(len(values))


def new(*, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def panels(
    name: str,
    title: str,
    parts: Sequence[tuple[str, Callable[[Axes], None]]],
    limits: tuple[float, float] | None = None,
) -> str:
    """Small drawings, which the page puts beside each other as far as it is wide.

    Args:
      name: of the figure.
      title: what all of them show.
      parts: the title of each, and what draws it.
      limits: lowest and highest value of the vertical axis of all; None: each has its own.
    """
    drawn = []
    for number, (label, draw) in enumerate(parts):
        # A layout is not computed: it takes longer than the drawing, and all have the same margins.
        figure = Figure(figsize=(PANEL, 1.6))
        ax = figure.add_axes((0.2, 0.15, 0.7, 0.7))
        draw(ax)
        if limits is not None:
            margin = 0.05 * (limits[1] - limits[0]) or 0.5
            ax.set_ylim(limits[0] - margin, limits[1] + margin)
        ax.set_title(short(label), fontsize=9)
        ax.tick_params(labelsize=8)
        drawn.append(svg(figure, f"{name}-{number}", f"{title}: {label}"))
    return f'<div class="panels">{"".join(drawn)}</div>'


def short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def svg(figure: Figure, name: str, title: str) -> str:
    """The drawing as an element of a page: no prologue, no namespaces, ids that occur once in the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Indentation is a tenth of the page.
    body = re.sub(r"\n\s+", "\n", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    return f'<svg {box[0]} role="img" aria-label="{escape(title)}">{body}'.replace(INK, "currentColor")
