"""What was tried: mixtures of three domains in a triangle, of more on one axis a domain (parallel coordinates)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from duet_jax.report.drawing import INK, SCORES, new, scaled, short, styled, svg

# Where mixtures of one domain alone are: the first at the top, the second on the left, the third on the right.
CORNERS = np.array([[0.5, 3**0.5 / 2], [0.0, 0.0], [1.0, 0.0]])
LEVELS = 9


def ternary_points(mixtures: np.ndarray) -> np.ndarray:
    """Places `[n, 2]` of mixtures `[n, 3]` in an equilateral triangle of side 1.

    A share is the distance from the side that faces its domain's corner, in heights of the triangle.
    """
    return mixtures @ CORNERS


@styled
def ternary(
    mixtures: np.ndarray,
    values: np.ndarray,
    best: int,
    names: Sequence[str],
    waiting: np.ndarray,
    field: tuple[np.ndarray, np.ndarray],
) -> str:
    """Mixtures of three domains, coloured by score, before what the search predicts of all mixtures.

    Args:
      mixtures, values: that have scores, `[n, 3]` and `[n]`.
      best: row of the best one.
      names: of the domains.
      waiting: mixtures without a score, `[m, 3]`.
      field: mixtures `[g, 3]` all over the triangle, and their predicted scores `[g]`.
    """
    figure, ax = new(height=4.1)
    everywhere, predicted = field
    if np.ptp(predicted) > 0:
        # On the scale of the scores, beyond which colours stay the same.
        at = np.interp(predicted, np.sort(values)[[0, -1]], [0.0, 1.0]) if np.ptp(values) > 0 else scaled(predicted)
        levels = np.linspace(0.0, 1.0, LEVELS + 1)
        across, up = ternary_points(everywhere).T
        ax.tricontourf(across, up, at, levels, cmap=SCORES, alpha=0.35, extend="both")
    for share in (0.2, 0.4, 0.6, 0.8):
        for corner in range(3):
            ends = np.full((2, 3), 1.0 - share)
            ends[:, corner] = share
            ends[[0, 1], [(corner + 1) % 3, (corner + 2) % 3]] = 0.0
            ax.plot(*ternary_points(ends).T, color=INK, alpha=0.2, linewidth=0.6)
    ax.plot(*CORNERS[[0, 1, 2, 0]].T, color=INK, linewidth=0.9)
    across, up = ternary_points(waiting).T
    ax.scatter(across, up, s=34, facecolors="none", edgecolors=INK, linewidths=0.9)
    _scored(ax, ternary_points(mixtures), values, best)
    # The lower corners' names grow inwards, or long ones would leave the drawing.
    ax.text(0.5, CORNERS[0, 1] + 0.03, short(names[0]), ha="center", va="bottom")
    ax.text(-0.08, -0.03, short(names[1]), ha="left", va="top")
    ax.text(1.08, -0.03, short(names[2]), ha="right", va="top")
    ax.set_xlim(-0.1, 1.1)
    ax.set_ylim(-0.1, 0.95)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return svg(figure, "ternary", "mixtures that were tried, in a triangle")


def _scored(ax: Axes, places: np.ndarray, values: np.ndarray, best: int) -> None:
    # The highest last, so that it lies on top.
    order = np.argsort(values, kind="stable")
    shades, (across, up) = SCORES(scaled(values)), places.T
    ax.scatter(across[order], up[order], s=42, c=shades[order], edgecolors=INK, linewidths=0.6, zorder=3)
    ax.scatter(across[best], up[best], s=210, marker="*", c=shades[[best]], edgecolors=INK, linewidths=0.9, zorder=4)


@styled
def parallel(mixtures: np.ndarray, values: np.ndarray, best: int, names: Sequence[str], waiting: np.ndarray) -> str:
    """Mixtures as lines across one axis a domain, coloured by score. Axes lie, so that names of domains can be read.

    Args:
      mixtures, values: that have scores, `[n, d]` and `[n]`.
      best: row of the best one.
      names: of the domains.
      waiting: mixtures without a score, `[m, d]`.
    """
    figure, ax = new(height=0.9 + 0.28 * max(len(names), 7))
    rows = np.arange(len(names))
    for row in range(len(names)):
        ax.axhline(row, color=INK, alpha=0.15, linewidth=0.8)
    for mixture in waiting:
        ax.plot(mixture, rows, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
    strength = scaled(values)
    for number in np.argsort(values, kind="stable"):
        at = strength[number]
        ax.plot(mixtures[number], rows, color=SCORES(at), alpha=0.35 + 0.45 * at, linewidth=1.0 + 0.6 * at)
    ax.plot(mixtures[best], rows, "o-", color=SCORES(strength[best]), linewidth=2.6, markersize=5, zorder=4)
    ax.set_yticks(rows, [short(name) for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.04 * max(float(part.max()) for part in (mixtures, waiting) if part.size))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of the examples")
    ax.spines["left"].set_visible(False)
    return svg(figure, "parallel", "mixtures that were tried, one line each")
