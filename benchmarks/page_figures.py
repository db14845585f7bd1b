"""What of some benchmarks' JSON the page of results shows as bars, by the result's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from page_cells import Row, at, named
from page_studies import regrets


class Bars(NamedTuple):
    """Bars of some series `{name: a value each label}`, beside each other or stacked."""

    title: str
    labels: list[str]
    series: dict[str, list[float]]
    stacked: bool = False
    log: bool = False


def _bars(title: str, rows: Sequence[Row], label: Callable[[Row], str], **series: str) -> Bars:
    values = {name: [at(row, key) for row in rows] for name, key in series.items()}
    return Bars(title, [label(row) for row in rows], values)


def _verdicts(data: Row) -> Bars:
    # Cells with too few studies have no verdict.
    rows = [row for row in named(data["rivals"]) if row["won"] + row["tied"] + row["lost"]]
    verdicts = {"less regret": "won", "no different": "tied", "more": "lost"}
    return _bars("cells, ours beside", rows, lambda row: row["name"], **verdicts)._replace(stacked=True)


def _step_times(data: Row) -> Bars:
    rows = [row for row in data["steps"] if row.get("duet")]
    series = {"ours": "ours.wall_ms", "BoTorch, tuned": "tuned.wall_ms", "BoTorch, DUET's settings": "duet.wall_ms"}
    return _bars(
        "milliseconds a step",
        rows,
        lambda row: f"{row['domains']} domains, {row['observations']} scores",
        **{name: key for name, key in series.items() if all(at(row, key) for row in rows)},
    )._replace(log=True)


def _errors(data: Row) -> Bars:
    label = "{tool}, {feature}: {rows}, {bytes} bytes"
    return _bars("error of a cosine", data["errors"], lambda row: label.format(**row), error="rmse")


def _lds(data: Row) -> Bars:
    rows = [row for row in named(data["results"]["language"]) if row.get("lds") is not None]
    return _bars("linear datamodeling score, language", rows, lambda row: row["name"], score="lds")


def _rates(data: Row) -> Bars:
    return _bars("tokens a second", data["rows"], lambda row: f"{row['method']}, {row['who']}", rate="tokens_per_s")


def _regrets(data: Row) -> Bars:
    rows = regrets(data)
    kinds = dict.fromkeys(one["feedback"] for one in data["cells"])
    # What an ablation varies may have no meaning for a kind of feedback.
    values = {kind: [row.get(kind, float("nan")) for row in rows] for kind in kinds}
    return Bars("mean regret over tasks, in standard deviations over mixtures", [row["name"] for row in rows], values)


FIGURES: dict[str, Callable[[Row], Bars]] = {
    "search_regret": _verdicts,
    "search_speed": _step_times,
    "sketching_peers": _errors,
    "attribution_quality": _lds,
    "training": _rates,
    "replay": _regrets,
    "replay_ablations": _regrets,
}


def draw(bars: Bars, path: Path) -> None:
    """Horizontal bars as an SVG that reads on light and dark pages, with the same bytes every time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    grey = "#808080"
    style = {"svg.hashsalt": "duet_jax", "svg.fonttype": "none", "axes.edgecolor": grey, "axes.labelcolor": grey}
    style |= {"text.color": grey, "xtick.color": grey, "ytick.color": grey, "font.size": 9}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7, 1.0 + 0.26 * len(bars.labels)), layout="constrained")
        left = [0.0] * len(bars.labels)
        for name, values in bars.series.items():
            height = 0.7 if bars.stacked else 0.7 / len(bars.series)
            shift = 0.0 if bars.stacked else (list(bars.series).index(name) - (len(bars.series) - 1) / 2) * height
            places = [i + shift for i in range(len(values))]
            axes.barh(places, values, height, left=left if bars.stacked else None, label=name, alpha=0.85)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(bars.labels)), bars.labels)
        axes.invert_yaxis()
        axes.set_xlabel(bars.title)
        if bars.log:
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        if len(bars.series) > 1:
            axes.legend(frameon=False, ncols=len(bars.series), loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
