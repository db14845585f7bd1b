"""The figures of the report: matplotlib drawings as inline SVG, the same bytes for the same numbers.

Lines and letters take the page's colour, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from duet_jax.report.surrogate import Along, Slice
from duet_jax.search.diagnostics import Effects, LeftOut, Report
from duet_jax.trial import Trial

WIDTH = 7.5
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

styled = matplotlib.rc_context(STYLE)


def colours(count: int) -> list[str]:
    """One colour a domain, all readable on white and on black."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    spread = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, count))
    return [matplotlib.colors.to_hex(colour) for colour in spread]


@styled
def feedback(trials: Sequence[Trial]) -> str:
    """Feedback with its standard error, what the search had expected of it, and the highest so far."""
    told = [(trial, trial.feedback) for trial in trials if trial.feedback is not None]
    rounds = [trial.trial + 1 for trial, _ in told]
    values = [given["value"] for _, given in told]
    figure, axes = _new(1, 1, height=3.0)
    ax = axes[0]
    ax.step(rounds, np.maximum.accumulate(values), where="post", color=INK, alpha=0.45, label="highest so far")
    expected = [(trial.trial + 1, trial.proposal) for trial, _ in told if _expectation(trial)]
    if expected:
        ax.errorbar(
            [number + 0.15 for number, _ in expected],
            [proposal["mean"] for _, proposal in expected if proposal],
            yerr=[proposal["stderr"] for _, proposal in expected if proposal],
            fmt="none",
            ecolor=COLOURS[0],
            alpha=0.5,
            elinewidth=3,
            label="expected beforehand, ± its uncertainty",
        )
    errors = [given["stderr"] or 0.0 for _, given in told]
    ax.errorbar(rounds, values, yerr=errors, fmt="o", color=ACCENT, capsize=2, label="feedback ± standard error")
    _rounds_axis(ax, trials)
    ax.set_ylabel("feedback")
    figure.legend(loc="outside upper left", ncols=3)
    return _svg(figure, "feedback", "feedback by round")


@styled
def mixtures(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """The mixture of every round as a stacked bar. The page has the legend."""
    figure, axes = _new(1, 1, height=2.6)
    rounds = [trial.trial + 1 for trial in trials]
    base = np.zeros(len(trials))
    for name, colour in zip(names, colours(len(names)), strict=True):
        shares = np.array([trial.mixture[name] for trial in trials])
        axes[0].bar(rounds, shares, bottom=base, color=colour, width=0.8)
        base = base + shares
    _rounds_axis(axes[0], trials)
    axes[0].set_ylim(0, 1)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylabel("share of the budget")
    return _svg(figure, "mixtures", "mixture by round")


@styled
def slices(parts: Sequence[Slice], names: Sequence[str], observed: tuple[np.ndarray, np.ndarray]) -> str:
    """The surrogate's mean ± two standard deviations along each domain, through the best mixture."""
    figure, axes = _domains(names)
    shares, values = observed
    for i, (ax, part, colour) in enumerate(zip(axes, parts, colours(len(names)), strict=True)):
        _band(ax, part.shares, part.mean, part.stderr, colour)
        ax.plot(shares[:, i], values, ".", color=INK, alpha=0.4, markersize=4)
        ax.axvline(part.at, color=ACCENT, linewidth=1, linestyle=":")
    return _svg(figure, "slices", "predicted feedback along each domain")


@styled
def along(parts: Sequence[Along]) -> str:
    """The surrogate's mean ± two standard deviations along each training setting."""
    figure, axes = _panels([part.name for part in parts])
    for ax, part in zip(axes, parts, strict=True):
        if isinstance(part.at, str):
            ax.errorbar(range(len(part.mean)), part.mean, yerr=2 * part.stderr, fmt="o", color=COLOURS[0], capsize=2)
            ax.set_xticks(range(len(part.mean)), [_short(str(value)) for value in part.values], rotation=20, ha="right")
            ax.set_xlim(-0.5, len(part.mean) - 0.5)
            ax.axvline(part.values.index(part.at), color=ACCENT, linewidth=1, linestyle=":")
        else:
            numbers = np.array(part.values, np.float64)
            _band(ax, numbers, part.mean, part.stderr, COLOURS[0])
            ax.set_xscale("log" if part.log else "linear")
            middle = (numbers[0] * numbers[-1]) ** 0.5 if part.log else (numbers[0] + numbers[-1]) / 2
            ticks = [numbers[0], middle, numbers[-1]]
            ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.axvline(part.at, color=ACCENT, linewidth=1, linestyle=":")
    return _svg(figure, "along", "predicted feedback along each setting")


@styled
def effects(found: Effects, names: Sequence[str]) -> str:
    """Main effect of each domain ± two standard deviations."""
    figure, axes = _domains(names)
    for i, (ax, colour) in enumerate(zip(axes, colours(len(names)), strict=True)):
        _band(ax, found.shares[i], found.mean[i], found.stderr[i], colour)
    return _svg(figure, "effects", "average predicted feedback by share of each domain")


@styled
def importance(report: Report, names: Sequence[str]) -> str:
    """Importance of each domain, and beside it the share of its lengthscale, as bars."""
    figure, axes = _new(1, 2, height=0.7 + 0.26 * len(names), sharey=True)
    shown = (
        ("explained by its share alone", report.effects.importance),
        ("share of inverse squared lengthscales", report.relevance),
    )
    for ax, (title, parts) in zip(axes, shown, strict=True):
        bars = ax.barh(range(len(names)), parts, color=colours(len(names)), height=0.7)
        ax.bar_label(bars, [f"{100 * part:.0f} %" for part in parts], padding=3, fontsize=8)
        ax.set_xlim(0, 1.15)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(names)), [_short(name) for name in names])
    axes[0].invert_yaxis()
    return _svg(figure, "importance", "importance of each domain")


@styled
def left_out(found: LeftOut) -> str:
    """Each feedback as predicted from all others, with its 95 % interval, against what was told."""
    figure, axes = _new(1, 1, height=3.2)
    ax = axes[0]
    ends = [found.values.min(), found.values.max()]
    ax.plot(ends, ends, color=INK, alpha=0.4, linewidth=0.8, label="as told")
    ax.errorbar(
        found.values,
        found.mean,
        yerr=1.96 * found.stderr,
        fmt="o",
        color=ACCENT,
        ecolor=COLOURS[0],
        capsize=2,
        label="predicted without it, 95 % interval",
    )
    ax.set_xlabel("feedback told")
    ax.set_ylabel("feedback predicted")
    figure.legend(loc="outside upper left", ncols=2)
    return _svg(figure, "left_out", "each feedback predicted from all others")


@styled
def gaps(trials: Sequence[Trial]) -> str:
    """How far each proposal may be from the best one there was, by its Frank-Wolfe gap."""
    figure, axes = _new(1, 1, height=2.0)
    found = {trial.trial + 1: gap for trial in trials if (gap := gap_of(trial)) is not None}
    # On a logarithmic axis 0 has no place; that far down all is rounding.
    axes[0].semilogy(list(found), np.maximum(list(found.values()), 1e-12), "o", color=ACCENT)
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    _rounds_axis(axes[0], trials)
    axes[0].set_ylabel("gap")
    return _svg(figure, "gaps", "Frank-Wolfe gap of each proposal")


@styled
def noise(told: Sequence[Trial], mean: np.ndarray, learned: float) -> str:
    """How far each feedback lies from the surrogate's mean, beside the stated and the learned noise."""
    heard = [(trial.trial + 1, trial.feedback) for trial in told if trial.feedback is not None]
    residuals = [given["value"] - expected for (_, given), expected in zip(heard, mean, strict=True)]
    errors = [given["stderr"] or 0.0 for _, given in heard]
    figure, axes = _new(1, 1, height=2.4)
    ax = axes[0]
    ax.axhspan(-learned, learned, color=COLOURS[0], alpha=0.2, linewidth=0, label="± learned noise")
    ax.axhline(0.0, color=INK, alpha=0.4, linewidth=0.8)
    label = "feedback - surrogate, ± stated standard error"
    rounds = [number for number, _ in heard]
    ax.errorbar(rounds, residuals, yerr=errors, fmt="o", color=ACCENT, capsize=2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("round")
    figure.legend(loc="outside upper left", ncols=2)
    return _svg(figure, "noise", "feedback noise")


@styled
def losses(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Training loss by step, one line a round, later rounds stronger."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for row in metrics:
        if row.get("loss") is not None:
            curves.setdefault(row["trial"], []).append((row["step"], row["loss"]))
    figure, axes = _new(1, 1, height=2.6)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.85, max(len(curves), 1)))
    ends = (min(curves), max(curves)) if curves else ()
    for shade, (trial, points) in zip(shades, sorted(curves.items()), strict=False):
        label = f"round {trial + 1}" if trial in ends else None
        axes[0].plot(*zip(*points, strict=True), color=shade, linewidth=1, label=label)
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("loss, nats per token")
    figure.legend(loc="outside upper left", ncols=2)
    return _svg(figure, "losses", "training loss by step")


@styled
def timings(trials: Sequence[Trial], stages: Mapping[str, Sequence[float]]) -> str:
    """Seconds of each stage, by round, stacked."""
    figure, axes = _new(1, 1, height=2.4)
    base = np.zeros(len(trials))
    for (name, seconds), colour in zip(stages.items(), COLOURS, strict=False):
        axes[0].bar([t.trial + 1 for t in trials], seconds, bottom=base, color=colour, label=name, width=0.8)
        base = base + np.asarray(seconds)
    _rounds_axis(axes[0], trials)
    axes[0].set_ylabel("seconds")
    figure.legend(loc="outside upper left", ncols=3)
    return _svg(figure, "timings", "time by stage")


@styled
def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """Mean score of the answers in each bin of confidence, on the diagonal if it is as stated."""
    figure, axes = _new(1, 1, height=3.2)
    ax = axes[0]
    ax.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=0.8, label="as stated")
    counts = np.array([part["answers"] for part in bins], np.float64)
    sure, score = ([part[name] for part in bins] for name in ("confidence", "score"))
    area = 20 + 180 * counts / counts.max()
    ax.scatter(sure, score, s=area, color=ACCENT, alpha=0.8, label="answers, by their number")
    _unit_axes(ax, "confidence", "score")
    figure.legend(loc="outside upper left", ncols=2)
    return _svg(figure, "reliability", "score by confidence")


@styled
def selective(curve: Sequence[Mapping[str, float]], threshold: float) -> str:
    """Mean score of the answers that are given, from the surest ones to all, and where the threshold is."""
    figure, axes = _new(1, 1, height=3.2)
    ax = axes[0]
    coverage, score = ([point[name] for point in curve] for name in ("coverage", "score"))
    ax.plot(coverage, score, ".-", markersize=3, color=COLOURS[0], label="the surest answers")
    ax.axhline(score[-1], color=INK, alpha=0.4, linewidth=0.8, label="all answers")
    given = [point["coverage"] for point in curve if point["threshold"] >= threshold]
    ax.axvline(given[-1] if given else 0.0, color=ACCENT, linewidth=1, linestyle=":", label="given at the threshold")
    _unit_axes(ax, "share of answers given", "their score")
    figure.legend(loc="outside upper left", ncols=3)
    return _svg(figure, "selective", "score of the surest answers by their share")


def gap_of(trial: Trial) -> float | None:
    """The Frank-Wolfe gap of a trial's proposal; None where its file has none."""
    gap = (trial.proposal or {}).get("gap")
    return gap if isinstance(gap, float) and math.isfinite(gap) else None


def _expectation(trial: Trial) -> bool:
    proposal = trial.proposal or {}
    return all(isinstance(proposal.get(name), float) and math.isfinite(proposal[name]) for name in ("mean", "stderr"))


def _new(rows: int, columns: int, *, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    return figure, list(axes.flat)


def _domains(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A panel a domain, whose horizontal axis is its share."""
    figure, axes = _panels(names)
    for ax in axes:
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0.0, 0.5, 1.0])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure, axes


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels of these titles, three in a row, whose vertical axis is feedback."""
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure, axes = _new(rows, columns, height=2.0 * rows, sharey=True)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(_short(title), fontsize=9)
    for ax in axes[len(titles) :]:
        ax.set_visible(False)
    figure.supylabel("feedback", fontsize=9)
    return figure, axes[: len(titles)]


def _band(ax: Axes, shares: np.ndarray, mean: np.ndarray, stderr: np.ndarray, colour: str) -> None:
    ax.fill_between(shares, mean - 2 * stderr, mean + 2 * stderr, color=colour, alpha=0.25, linewidth=0)
    ax.plot(shares, mean, color=colour)


def _unit_axes(ax: Axes, across: str, up: str) -> None:
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.04, 1.04)


def _rounds_axis(ax: Axes, trials: Sequence[Trial]) -> None:
    ax.set_xlim(0.4, max(len(trials), 1) + 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("round")


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _svg(figure: Figure, name: str, title: str) -> str:
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
    return f'<svg {box[0]} role="img" aria-label="{title}">{body}'.replace(INK, "currentColor")
