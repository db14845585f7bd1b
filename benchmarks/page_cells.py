"""Tables of records as the page of results has them, and those of results that nothing is known of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple


class Table(NamedTuple):
    caption: str
    header: list[str]
    rows: list[list[str]]


Row = Mapping[str, Any]
Column = tuple[str | Callable[[Row], Any], str]


def at(row: Row, path: str) -> Any:
    """The value at a dotted path, or of that name; None where there is none."""
    if path in row:
        return row[path]
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def cell(value: Any, spec: str = "") -> str:
    """A value as text: numbers by a format, with four digits, or "short"; mean and deviation of seeds as a pair."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        mean, deviation = value
        return cell(mean, spec) + ("" if deviation is None else f" ± {cell(deviation, spec)}")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and not spec:
        return str(value)
    if isinstance(value, float | int):
        if spec == "short":
            return format(value, ".3f" if abs(value) < 10 else ".0f")
        # No exponents of what has more than four digits.
        return format(value, ".0f" if abs(value) >= 1000 and not spec.endswith("%") else spec or ".4g")
    return str(value)


def table(caption: str, rows: Iterable[Row], columns: Mapping[str, Column]) -> Table:
    """A table whose columns are values of rows at a path, or functions of them, in a format."""
    found = []
    for row in rows:
        found.append([cell(at(row, key) if isinstance(key, str) else key(row), spec) for key, spec in columns.values()])
    used = [i for i in range(len(columns)) if any(row[i] for row in found)]
    return Table(caption, [list(columns)[i] for i in used], [[row[i] for i in used] for row in found])


def named(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records by name as a list of records with it."""
    return [{"name": name, **row} for name, row in rows.items()]


def records(data: Mapping[str, Any], besides: Collection[str]) -> list[Table]:
    """All numbers and words of a result of unknown kind: every record and list of records a table."""
    shown = {key: value for key, value in data.items() if key not in besides}
    alone = {key: value for key, value in shown.items() if not isinstance(value, list | dict)}
    found = [Table("", list(alone), [[cell(value) for value in alone.values()]])] if alone else []
    for key, value in shown.items():
        rows = value
        if isinstance(value, Mapping):
            rows = named(value) if all_mappings(value) else [value]
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            whole = [flat(row) for row in rows]
            columns: dict[str, Column] = {name: (name, "") for row in whole for name in row}
            found.append(table(key.replace("_", " ").capitalize(), whole, columns))
    return found


def flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """A record with those inside it laid out, `{"a.b": ...}`; of lists, only pairs of a mean and its error."""
    found: dict[str, Any] = {}
    for name, entry in row.items():
        if isinstance(entry, Mapping):
            found |= flat(entry, f"{prefix}{name}.")
        elif not isinstance(entry, list) or (len(entry) == 2 and all(x is None or isinstance(x, float) for x in entry)):
            found[prefix + name] = entry
    return found


def all_mappings(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(isinstance(row, Mapping) for row in value.values())
