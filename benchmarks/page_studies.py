"""Tables of benchmarks that run whole studies, searches and curations on real domains."""

from __future__ import annotations

from page_cells import Column, Row, Table, named, table


def replay(data: Row) -> list[Table]:
    kinds = data["kinds"]
    rows = [
        {"name": name, **{kind: found.get(name) for kind, found in kinds.items()}}
        for name in dict.fromkeys(name for found in kinds.values() for name in found)
    ]
    last = len(next(iter(next(iter(kinds.values())).values()))["by_round"])
    name: dict[str, Column] = {"": ("name", "")}

    def after(kind: str, rounds: int) -> Column:
        return lambda row: row[kind] and row[kind]["by_round"][rounds - 1], ".3f"

    def verdicts(kind: str) -> Column:
        return lambda row: row[kind] and f"{row[kind]['worse_than_ours']} / {row[kind]['better_than_ours']}", ""

    cost: dict[str, Column] = {"mixtures": ("rows", ""), "examples of a training": ("budget", "")}
    cost |= {"seconds of a round": ("seconds_a_round", ".1f")}
    tables = [table("The table of trainings:", [data["table_of"]], cost)]
    tables += [
        table(f"Mean regret over tasks after {n} rounds:", rows, name | {kind: after(kind, n) for kind in kinds})
        for n in (5, 10, 20, 30)
        if n <= last
    ]
    shown = name | {kind: verdicts(kind) for kind in kinds}
    tables.append(table("In how many tasks it is worse / better than ours, by a 95% interval of seeds:", rows, shown))
    each: dict[str, Column] = {"task": ("task", ""), "feedback": ("feedback", "")}
    each |= {"deviation of seeds": ("seed_deviation", ".2f"), "uniform": ("uniform", ".2f")}
    each |= {row["name"]: (f"methods.{row['name']}.regret", ".2f") for row in rows if row["name"] != "uniform"}
    if "" in data["groups"] and len(data["groups"]) == 1:
        tables.append(table("Regret of each:", data["cells"], each))
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
