"""A selection as one HTML page: what was picked, by what, from where, what it is worth, and what it has cost."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from markupsafe import Markup

from duet_jax.errors import StudyError
from duet_jax.report import picked, words
from duet_jax.report.document import document, save
from duet_jax.report.drawing import colours

# Domains that have drawings of their own, examples of a domain that are shown, and characters of each of their texts.
MOST, SHOWN, LONGEST = 12, 10, 1500
_MODELS = {
    "selected": "the chosen examples",
    "none": "nothing: the base model as it is",
    "random": "as many random examples",
    "all": "all examples",
}


def write_selection(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a selection; the same selection gives the same bytes.

    Args:
      folder: of the selection.
      output: the page's file; None: report.html in that folder.

    Returns:
      The file written.

    Raises:
      StudyError: there is no selection, it is damaged, or the file cannot be written.
    """
    target = folder / "report.html" if output is None else output
    return save(target, render_selection(folder))


def render_selection(folder: Path) -> str:
    """The page's text.

    Raises:
      StudyError: there is no selection, or it is damaged.
    """
    try:
        about = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
        table = pyarrow.parquet.read_table(
            io.BytesIO((folder / "scores.parquet").read_bytes()), columns=["domain", "utility", "selected"]
        )
        rows = [json.loads(line) for line in (folder / "selected.jsonl").read_bytes().splitlines()]
        return _page(about, table, rows)
    except FileNotFoundError as error:
        raise StudyError(f"There is no selection in {folder}, or a part of one: {error.filename} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise StudyError(f"The selection in {folder} is damaged ({error}); run duet select again.") from None


def _page(about: Mapping[str, Any], table: pyarrow.Table, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        raise ValueError("selected.jsonl is empty")
    config, names = about["config"], list(about["domains"])
    domain = np.array(table["domain"].to_pylist(), object)
    utility, selected = table["utility"].to_numpy(), table["selected"].to_numpy(zero_copy_only=False)
    able = utility > -np.inf
    specs = {spec["name"]: spec for spec in config["data"]["domains"]}
    domains = [
        {"name": name, "colour": colour, "source": specs[name]["source"], "share_of_all": np.mean(domain == name)}
        | _picked([row for row in rows if row["domain"] == name], utility[domain == name], selected[domain == name])
        for name, colour in zip(names, colours(len(names)), strict=True)
    ]
    domains.sort(key=lambda part: -part["chosen"])
    chosen = [part["name"] for part in domains if part["chosen"]]
    drawings = {"lengths": picked.lengths(np.array([_length(row) for row in rows]))}
    told_apart = bool(np.ptp(utility[able])) if able.any() else False
    if told_apart:
        parts = {name: (utility[(domain == name) & able], utility[(domain == name) & selected]) for name in chosen}
        drawings["utilities"] = picked.utilities(dict(list(parts.items())[:MOST]))
    return document(
        "selection.html",
        about=about,
        config=config,
        text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        how=_how(config),
        total=len(rows),
        pool=len(domain),
        never=int(np.count_nonzero(~able)),
        told_apart=told_apart,
        domains=domains,
        most="" if len(chosen) <= MOST else f" Of {len(chosen)} domains the {MOST} of which most was chosen.",
        # Our own drawings, in which every name is escaped.
        drawings={name: Markup(text) for name, text in drawings.items()},
        evaluation=[row | {"words": _MODELS[row["name"]]} for row in about.get("evaluation", [])],
        cost=about.get("cost") or {},
    )


def _picked(rows: Sequence[Mapping[str, Any]], utility: np.ndarray, selected: np.ndarray) -> dict[str, Any]:
    """What was picked of one domain.

    Args:
      rows: the chosen examples, highest utility first.
      utility, selected: of all its examples, `[n]`.
    """
    lengths = np.array([_length(row) for row in rows])
    return {
        "chosen": len(rows),
        "pool": len(utility),
        "lowest": float(utility[selected].min()) if rows else None,
        "median": _median(utility[selected]),
        "all_median": _median(utility),
        "length": _median(lengths),
        "longest": int(lengths.max(initial=0)),
        "examples": [_shown(rows[row], row) for row in _sample(len(rows))],
    }


def _how(config: Mapping[str, Any]) -> str:
    """How the examples were chosen, in sentences."""
    selector = config["selector"]
    if selector["kind"] == "random":
        chosen = "Examples were drawn at random"
    else:
        chosen = f"Examples were chosen by their utility: {words.RULES[selector['rule']]}"
    if config["pooled"]:
        among = "from all domains as one"
    elif config["mixture"]:
        total = sum(config["mixture"].values())
        shares = ", ".join(f"{name} {100 * share / total:.3g} %" for name, share in config["mixture"].items())
        among = f"from each domain by itself, in the mixture that was asked for ({shares})"
    else:
        among = "from each domain by itself, in proportion to its size"
    lines = [f"{chosen}, {among}."]
    if selector["kind"] != "random":
        lines.append(f"An example's utility is {words.UTILITIES[selector['kind']]}.")
    if selector["targets"]:
        lines.append(f"What it should be good for: {', '.join(target['name'] for target in selector['targets'])}.")
    return " ".join(lines)


def _turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who says what in an example."""
    if "prompt" in row and "response" in row:
        return [(part, row[part]) for part in ("prompt", "response") if row[part]]
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def _length(row: Mapping[str, Any]) -> int:
    return sum(len(text) for _, text in _turns(row))


def _sample(count: int) -> list[int]:
    """Half of the rows that are shown are the first ones, the others evenly spaced over the rest, to the last."""
    first = min(count, SHOWN // 2)
    rest = np.linspace(first, count - 1, min(count - first, SHOWN - first)).round().astype(int)
    return [*range(first), *rest.tolist()]


def _shown(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    turns = [
        {"who": who, "text": text[:LONGEST], "left": max(len(text) - LONGEST, 0), "length": len(text)}
        for who, text in _turns(row)
    ]
    return {"id": row["id"], "utility": row["utility"], "place": place + 1, "turns": turns}


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None
