"""Tables of benchmarks that run whole studies, searches and curations on real domains."""

from __future__ import annotations

from typing import Any

from page_cells import Column, Row, Table, named, table


def regrets(data: Row, rounds: int | None = None) -> list[dict[str, Any]]:
    """Of each method of a replay the mean regret over tasks by kind of feedback, at the end or after some rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in data["cells"]:
        for name, method in one["methods"].items():
            value = method["regret"] if rounds is None else method["by_round"][rounds - 1]
            found.setdefault(name, {}).setdefault(one["feedback"], []).append(value)
    return [
        {"name": name, **{kind: sum(some) / len(some) for kind, some in kinds.items()}} for name, kinds in found.items()
    ]


def replay(data: Row) -> list[Table]:
    kinds = list(dict.fromkeys(one["feedback"] for one in data["cells"]))
    last = len(next(iter(data["cells"][0]["methods"].values()))["by_round"])
    columns: dict[str, Column] = {"": ("name", "")} | {kind: (kind, ".3f") for kind in kinds}
    verdicts: dict[str, Column] = {
        name: (name.replace(" ", "_"), "") for name in ("worse than ours", "better than ours")
    }
    tables = [
        table(f"Mean regret over tasks after {n} rounds:", regrets(data, n), columns)
        for n in (5, 10, 20, 30)
        if n < last
    ]
    ended = [row | data["mean"][row["name"]] for row in regrets(data)]
    tables.append(table(f"After all {last} rounds, and in how many cells:", ended, columns | verdicts))
    each: dict[str, Column] = {"task": ("task", ""), "feedback": ("feedback", ""), "uniform": ("uniform", ".2f")}
    names = [name for name in data["mean"] if name != "uniform"]
    tables.append(
        table("Regret of each:", data["cells"], each | {name: (f"methods.{name}.regret", ".2f") for name in names})
    )
    return tables


def selector_study(data: Row) -> list[Table]:
    columns: dict[str, Column] = {name: (name, "") for name in ("task", "selector", "seeds")}
    columns |= {"uniform mixture": ("uniform", ".4f"), "DUET's mixture": ("duet", ".4f")}
    columns |= {"gain of the selector": ("uniform_gain", ".4f"), "and of DUET": ("duet_gain", ".4f")}
    columns |= {"seconds of the selection": ("seconds.selection", ".0f"), "of the study": ("seconds.study", ".0f")}
    return [table("Scores, and gains over the uniform mixture of random examples:", data["means"], columns)]


def curation(data: Row) -> list[Table]:
    def lines(row: Row) -> str:
        return ", ".join(f"{name} {count}" for name, count in row["lines"].items())

    columns: dict[str, Column] = {"kind": ("name", ""), "seconds": ("seconds", ".0f"), "what came out": ("found", "")}
    return [table("", named(data["kinds"]), columns | {"lines of its files": (lines, "")})]
