"""The figures of rounds, of what the search believes of them, and of how far answers can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from duet_jax.report.drawing import ACCENT, COLOURS, INK, SHARES, colours, new, panels, short, styled, svg
from duet_jax.report.surrogate import Along, Slice
from duet_jax.search.diagnostics import Effects, LeftOut
from duet_jax.trial import Trial


@styled
def feedback(trials: Sequence[Trial]) -> str:
    """Scores with their standard errors, what the search had expected of them, and the highest so far."""
    told = [(trial, trial.feedback) for trial in trials if trial.feedback is not None]
    rounds = [trial.trial + 1 for trial, _ in told]
    values = [given["value"] for _, given in told]
    figure, ax = new(height=2.8)
    ax.step(rounds, np.maximum.accumulate(values), where="post", color=INK, alpha=0.45, label="highest so far")
    first = min(trial.times["told"] for trial, _ in told)
    # Before the first score there was nothing to expect.
    expected = [(t.trial + 1, t.proposal) for t, _ in told if _expectation(t) and t.times["proposed"] >= first]
    if expected:
        ax.errorbar(
            [number + 0.15 for number, _ in expected],
            [proposal["mean"] for _, proposal in expected if proposal],
            yerr=[proposal["stderr"] for _, proposal in expected if proposal],
            fmt="none",
            ecolor=COLOURS[0],
            alpha=0.5,
            elinewidth=3,
            label="expected before",
        )
    errors = [given["stderr"] or 0.0 for _, given in told]
    ax.errorbar(rounds, values, yerr=errors, fmt="o", color=ACCENT, capsize=2, label="score")
    _rounds_axis(ax, trials)
    ax.set_ylabel("score")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1)
    return svg(figure, "feedback", "score by round")


@styled
def mixtures(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """The mixture of every round: as a stacked bar, whose legend the page has, or of many domains as a row each."""
    shares = np.array([[trial.mixture[name] for name in names] for trial in trials])
    rounds = [trial.trial + 1 for trial in trials]
    if len(names) > len(COLOURS):
        figure, ax = new(height=0.8 + 0.19 * len(names))
        across, down = np.arange(len(trials) + 1) + 0.5, np.arange(len(names) + 1) - 0.5
        # Shares of nothing are not drawn.
        shown = np.ma.masked_less_equal(shares.T, 0.0)
        ax.pcolormesh(across, down, shown, cmap=SHARES, vmin=0.0, vmax=shares.max(), linewidth=0)
        ax.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
    else:
        figure, ax = new(height=2.6)
        base = np.zeros(len(trials))
        for part, colour in zip(shares.T, colours(len(names)), strict=True):
            ax.bar(rounds, part, bottom=base, color=colour, width=0.8)
            base = base + part
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylabel("share")
    _rounds_axis(ax, trials)
    return svg(figure, "mixtures", "mixture by round")


@styled
def slices(
    parts: Sequence[Slice], names: Sequence[str], observed: tuple[np.ndarray, np.ndarray], domains: Sequence[int]
) -> str:
    """The surrogate's mean ± two standard deviations along some of the domains, through the best mixture.

    Args:
      parts, names: of all domains.
      observed: mixtures `[n, d]` and their scores `[n]`.
      domains: numbers of those that are drawn.
    """
    shares, values = observed

    def draw(domain: int, ax: Axes) -> None:
        part = parts[domain]
        _band(ax, part.shares, part.mean, part.stderr, colours(len(names))[domain])
        ax.plot(shares[:, domain], values, ".", color=INK, alpha=0.4, markersize=4)
        ax.axvline(part.at, color=ACCENT, linewidth=1, linestyle=":")
        _share_axis(ax)

    lowest, highest = _limits([parts[domain] for domain in domains])
    limits = (min(lowest, values.min()), max(highest, values.max()))
    shown = [(names[domain], partial(draw, domain)) for domain in domains]
    return panels("slices", "predicted score through the best mixture", shown, limits)


@styled
def along(parts: Sequence[Along]) -> str:
    """The surrogate's mean ± two standard deviations along each training setting."""

    def draw(part: Along, ax: Axes) -> None:
        if isinstance(part.at, str):
            ax.errorbar(range(len(part.mean)), part.mean, yerr=2 * part.stderr, fmt="o", color=COLOURS[0], capsize=2)
            ax.set_xticks(range(len(part.mean)), [short(str(value)) for value in part.values], rotation=20, ha="right")
            ax.set_xlim(-0.5, len(part.mean) - 0.5)
            ax.axvline(part.values.index(part.at), color=ACCENT, linewidth=1, linestyle=":")
            return
        numbers = np.array(part.values, np.float64)
        _band(ax, numbers, part.mean, part.stderr, COLOURS[0])
        ax.set_xscale("log" if part.log else "linear")
        middle = (numbers[0] * numbers[-1]) ** 0.5 if part.log else (numbers[0] + numbers[-1]) / 2
        ticks = [numbers[0], middle, numbers[-1]]
        ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.axvline(part.at, color=ACCENT, linewidth=1, linestyle=":")

    shown = [(part.name, partial(draw, part)) for part in parts]
    return panels("along", "predicted score along a setting", shown, _limits(parts))


@styled
def effects(found: Effects, names: Sequence[str], domains: Sequence[int]) -> str:
    """Main effect of some of the domains ± two standard deviations."""

    def draw(domain: int, ax: Axes) -> None:
        colour = colours(len(names))[domain]
        _band(ax, found.shares[domain], found.mean[domain], found.stderr[domain], colour)
        _share_axis(ax)

    rows = list(domains)
    low, high = (found.mean[rows] + sign * 2 * found.stderr[rows] for sign in (-1, 1))
    shown = [(names[domain], partial(draw, domain)) for domain in rows]
    return panels("effects", "average predicted score by share", shown, (low.min(), high.max()))


@styled
def left_out(found: LeftOut) -> str:
    """Each feedback as predicted from all others, with its 95 % interval, against what was told."""
    figure, ax = new(height=3.2)
    ends = [found.values.min(), found.values.max()]
    ax.plot(ends, ends, color=INK, alpha=0.4, linewidth=0.8, label="as scored")
    ax.errorbar(
        found.values,
        found.mean,
        yerr=1.96 * found.stderr,
        fmt="o",
        color=ACCENT,
        ecolor=COLOURS[0],
        capsize=2,
        label="predicted, 95 % interval",
    )
    ax.set_xlabel("score")
    ax.set_ylabel("predicted without it")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "left_out", "each score predicted from all others")


@styled
def gaps(trials: Sequence[Trial]) -> str:
    """How far each proposal may be from the best one there was, by its Frank-Wolfe gap."""
    figure, ax = new(height=2.0)
    found = {trial.trial + 1: gap for trial in trials if (gap := gap_of(trial)) is not None}
    # On a logarithmic axis 0 has no place; that far down all is rounding.
    ax.semilogy(list(found), np.maximum(list(found.values()), 1e-12), "o", color=ACCENT)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    _rounds_axis(ax, trials)
    ax.set_ylabel("gap")
    return svg(figure, "gaps", "Frank-Wolfe gap of each proposal")


@styled
def noise(told: Sequence[Trial], mean: np.ndarray, learned: float) -> str:
    """How far each feedback lies from the surrogate's mean, beside the stated and the learned noise."""
    heard = [(trial.trial + 1, trial.feedback) for trial in told if trial.feedback is not None]
    residuals = [given["value"] - expected for (_, given), expected in zip(heard, mean, strict=True)]
    errors = [given["stderr"] or 0.0 for _, given in heard]
    figure, ax = new(height=2.4)
    ax.axhspan(-learned, learned, color=COLOURS[0], alpha=0.2, linewidth=0, label="± learned noise")
    ax.axhline(0.0, color=INK, alpha=0.4, linewidth=0.8)
    label = "score - prediction"
    rounds = [number for number, _ in heard]
    ax.errorbar(rounds, residuals, yerr=errors, fmt="o", color=ACCENT, capsize=2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("round")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "noise", "noise of scores")


@styled
def losses(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Training loss by step, one line a round, later rounds stronger."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for row in metrics:
        if row.get("loss") is not None:
            curves.setdefault(row["trial"], []).append((row["step"], row["loss"]))
    figure, ax = new(height=2.6)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.85, max(len(curves), 1)))
    ends = (min(curves), max(curves)) if curves else ()
    for shade, (trial, points) in zip(shades, sorted(curves.items()), strict=False):
        label = f"round {trial + 1}" if trial in ends else None
        ax.plot(*zip(*points, strict=True), color=shade, linewidth=1, label=label)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats per token")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "losses", "training loss by step")


@styled
def timings(trials: Sequence[Trial], stages: Mapping[str, Sequence[float]]) -> str:
    """Seconds of each stage, by round, stacked."""
    figure, ax = new(height=2.4)
    base = np.zeros(len(trials))
    for (name, seconds), colour in zip(stages.items(), COLOURS, strict=False):
        ax.bar([t.trial + 1 for t in trials], seconds, bottom=base, color=colour, label=name, width=0.8)
        base = base + np.asarray(seconds)
    _rounds_axis(ax, trials)
    ax.set_ylabel("seconds")
    figure.legend(loc="outside upper left", ncols=3)
    return svg(figure, "timings", "time by stage")


@styled
def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """Mean score of the answers in each bin of confidence, on the diagonal if it is as stated."""
    figure, ax = new(height=3.2)
    ax.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=0.8, label="as stated")
    counts = np.array([part["answers"] for part in bins], np.float64)
    sure, score = ([part[name] for part in bins] for name in ("confidence", "score"))
    area = 20 + 180 * counts / counts.max()
    ax.scatter(sure, score, s=area, color=ACCENT, alpha=0.8, label="answers, by their number")
    _unit_axes(ax, "confidence", "score")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "reliability", "score by confidence")


@styled
def selective(curve: Sequence[Mapping[str, float]], threshold: float) -> str:
    """Mean score of the answers that are given, from the surest ones to all, and where the threshold is."""
    figure, ax = new(height=3.2)
    coverage, score = ([point[name] for point in curve] for name in ("coverage", "score"))
    ax.plot(coverage, score, ".-", markersize=3, color=COLOURS[0], label="the surest answers")
    ax.axhline(score[-1], color=INK, alpha=0.4, linewidth=0.8, label="all answers")
    given = [point["coverage"] for point in curve if point["threshold"] >= threshold]
    ax.axvline(given[-1] if given else 0.0, color=ACCENT, linewidth=1, linestyle=":", label="given at the threshold")
    _unit_axes(ax, "share of answers given", "their score")
    figure.legend(loc="outside upper left", ncols=3)
    return svg(figure, "selective", "score of the surest answers by their share")


def gap_of(trial: Trial) -> float | None:
    """The Frank-Wolfe gap of a trial's proposal; None where its file has none."""
    gap = (trial.proposal or {}).get("gap")
    return gap if isinstance(gap, float) and math.isfinite(gap) else None


def _expectation(trial: Trial) -> bool:
    proposal = trial.proposal or {}
    return all(isinstance(proposal.get(name), float) and math.isfinite(proposal[name]) for name in ("mean", "stderr"))


def _share_axis(ax: Axes) -> None:
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks([0.0, 0.5, 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))


def _limits(parts: Sequence[Slice] | Sequence[Along]) -> tuple[float, float]:
    """The lowest and the highest end of all bands."""
    low = min(float(np.min(part.mean - 2 * part.stderr)) for part in parts)
    return low, max(float(np.max(part.mean + 2 * part.stderr)) for part in parts)


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
