"""Which figures the page of results makes of some benchmarks' JSON, by the result's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from page_cells import Row, at, named
from page_draw import Bars, Figure, Intervals, Lines


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


def _regrets(data: Row) -> dict[str, Figure]:
    panels = {
        kind: {name: found["by_round"] for name, found in methods.items()} for kind, methods in data["kinds"].items()
    }
    return {"": Lines("mean regret over tasks, in standard deviations over mixtures", "rounds", panels)}


def _ablations(data: Row) -> dict[str, Figure]:
    """One figure for each thing that is asked, and one of the number of rounds."""
    as_it_is = data["groups"][""][0]
    found: dict[str, Figure] = {}
    for group, names in data["groups"].items():
        series = {
            kind: [methods[name]["more_than_ours"] if name in methods else None for name in names]
            for kind, methods in data["kinds"].items()
        }
        if group:
            found[group] = Intervals(f"{group}: regret, more than {as_it_is}", names, series)
    curves = {kind: methods[as_it_is]["by_round"] for kind, methods in data["kinds"].items()}
    return found | {"rounds": Lines("number of rounds: mean regret over tasks", "rounds", {"": curves})}


def _one(figure: Callable[[Row], Figure]) -> Callable[[Row], dict[str, Figure]]:
    return lambda data: {"": figure(data)}


# Each figure has a name of its own where a result has several.
FIGURES: dict[str, Callable[[Row], Mapping[str, Figure]]] = {
    "search_regret": _one(_verdicts),
    "search_speed": _one(_step_times),
    "sketching_peers": _one(_errors),
    "attribution_quality": _one(_lds),
    "training": _one(_rates),
    "replay": _regrets,
    "replay_ablations": _ablations,
}


def figures(name: str, data: Row) -> dict[str, Figure]:
    """The figures of a result by the names of their files."""
    found = FIGURES[name](data) if name in FIGURES else {}
    return {"_".join([name, *part.split()]): figure for part, figure in found.items()}
