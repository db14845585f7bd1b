"""The kinds of figure that the page of results has, drawn as SVG that reads on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GREY = "#808080"
STYLE = {"svg.hashsalt": "duet_jax", "svg.fonttype": "none", "axes.edgecolor": GREY, "axes.labelcolor": GREY}
STYLE |= {"text.color": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.titlecolor": GREY}


class Bars(NamedTuple):
    """Bars of some series `{name: a value each label}`, beside each other or stacked."""

    title: str
    labels: list[str]
    series: dict[str, list[float]]
    stacked: bool = False
    log: bool = False


class Intervals(NamedTuple):
    """Differences with their intervals `{name: (mean, low, high) or None each label}`; 0 is no difference."""

    title: str
    labels: list[str]
    series: dict[str, list[Sequence[float | None] | None]]


class Lines(NamedTuple):
    """Lines `{panel: {name: values from 1 on}}`, of panels beside each other."""

    title: str
    along: str
    panels: dict[str, dict[str, list[float]]]


Figure = Bars | Intervals | Lines


def draw(what: Figure, path: Path) -> None:
    """Writes a figure, with the same bytes every time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"font.size": 9}):
        if isinstance(what, Lines):
            figure, panels = plt.subplots(
                1, len(what.panels), figsize=(7, 3), layout="constrained", sharey=True, squeeze=False
            )
            _lines(what, panels[0])
            handles, names = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, names, frameon=False, ncols=len(names), loc="outside upper right")
        else:
            figure, axes = plt.subplots(figsize=(7, 1.0 + 0.26 * len(what.labels)), layout="constrained")
            _bars(what, axes) if isinstance(what, Bars) else _intervals(what, axes)
            axes.set_yticks(range(len(what.labels)), what.labels)
            axes.invert_yaxis()
            axes.set_xlabel(what.title)
            if len(what.series) > 1:
                axes.legend(
                    frameon=False, ncols=len(what.series), loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
                )
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _bars(bars: Bars, axes: Any) -> None:
    left = [0.0] * len(bars.labels)
    for number, (name, values) in enumerate(bars.series.items()):
        height = 0.7 if bars.stacked else 0.7 / len(bars.series)
        shift = 0.0 if bars.stacked else (number - (len(bars.series) - 1) / 2) * height
        places = [i + shift for i in range(len(values))]
        axes.barh(places, values, height, left=left if bars.stacked else None, label=name, alpha=0.85)
        left = [a + b for a, b in zip(left, values, strict=True)]
    if bars.log:
        axes.set_xscale("log")


def _intervals(intervals: Intervals, axes: Any) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_ylim(-0.5, len(intervals.labels) - 0.5)
    shown = [name for name, rows in intervals.series.items() if any(rows)]
    for number, (name, rows) in enumerate(intervals.series.items()):
        if name not in shown:
            continue
        shift = (shown.index(name) - (len(shown) - 1) / 2) * 0.2
        told = [(i + shift, *row) for i, row in enumerate(rows) if row is not None]
        places, means, lows, highs = zip(*told, strict=True)
        # One seed has no interval.
        spans = [(m if a is None else a, m if b is None else b) for m, a, b in zip(means, lows, highs, strict=True)]
        # A series has its colour, whether or not the others are shown.
        axes.plot(means, places, "o", markersize=4, label=name, color=f"C{number}")
        axes.hlines(places, *zip(*spans, strict=True), color=f"C{number}", linewidth=1.5)


def _lines(lines: Lines, panels: Sequence[Any]) -> None:
    for axes, (panel, curves) in zip(panels, lines.panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.5)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel(lines.along)
    # Panels share their axis.
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("\n".join(lines.title.split(", ", 1)), fontsize=8)
