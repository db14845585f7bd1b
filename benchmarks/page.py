"""One page of tables and figures from the JSON that benchmarks write; see `all.py`.

No number is typed here: a result is shown by the tables of `page_tables.py` and the figures of `page_figures.py`, or,
if these do not know it, by every record that it holds. Under each stand the command that makes it, as its own settings
say, and the machine, versions and commit that made it.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_cells import Table, records
from page_draw import draw
from page_figures import figures
from page_tables import TABLES

HERE = Path(__file__).parent
HEAD = """# Measured results

Written by `python benchmarks/all.py` from what benchmarks measured (`benchmarks/results/`, or `--folder`); not to be
edited. Every section is one file: what its script measures, the command, the tables, and the machine, versions and
commit that made it. A plus after a commit says that the working tree differed from it. Options that a command does not
name had no value.

Machines were shared with other work: compare numbers of one table, not of two.
"""
# What every result may have besides its tables.
ABOUT = {"settings", "machine", "versions", "commit"}
COMPILED = "Programs of a configuration, compiled for a slice of TPUs by the TPU's own compiler, without having one."


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def write_page(results: Path, page: Path) -> None:
    """Writes the page, and its figures into `figures/` beside it."""
    found = read(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        for file, figure in figures(name, data).items():
            draw(figure, page.parent / "figures" / f"{file}.svg")
    page.write_text(text(found), encoding="utf-8")


def text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as Markdown."""
    return "\n".join([HEAD, *(section(name, data) for name, data in results.items())])


def section(name: str, data: Mapping[str, Any]) -> str:
    """One result as Markdown."""
    script = script_of(name, data)
    parts = [f"## {name}", COMPILED if script is None else summary(script)]
    parts.append(f"```text\n{command(script, data)}\n```")
    shown = TABLES[kind_of(name, data)](data) if kind_of(name, data) in TABLES else records(data, ABOUT)
    parts += [markdown(table) for table in shown]
    parts += [f"![{figure.title}](figures/{file}.svg)" for file, figure in figures(name, data).items()]
    return "\n\n".join([*parts, made_on(data)]) + "\n"


def kind_of(name: str, data: Mapping[str, Any]) -> str:
    """Under which name the tables of a result are: those of configurations share theirs."""
    if "topology" in data:
        return "aot"
    if name.startswith("replay"):
        return "replay"
    return "domains" if "study_seconds" in data else name


def script_of(name: str, data: Mapping[str, Any]) -> Path | None:
    """The script that writes a result; None for those of `duet compile`."""
    kind = kind_of(name, data)
    return None if kind == "aot" else HERE / f"{kind}.py"


def summary(script: Path) -> str:
    """The first paragraph of a script's docstring."""
    found = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.exists() else None
    return (found or "").split("\n\n")[0].replace("\n", " ")


def command(script: Path | None, data: Mapping[str, Any]) -> str:
    """The command that measures it again."""
    if script is None:
        rank = [] if data["rank"] is None else [f"training.lora.rank={data['rank']}"]
        words = ["duet", "compile", f"configs/{data['config']}.yaml", *rank, "--topology", data["topology"]]
        return shlex.join([*words, "--mfu", str(data["mfu"])])
    words, settings = ["python", f"benchmarks/{script.name}"], data.get("settings") or settings_of(data)
    # A path, such as that of a configuration, is never written; its name is.
    settings = {name: data[name] for name in ("config",) if name in data} | settings
    for name, value in settings.items():
        if value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in ("config", "overrides"):
            words += [f"configs/{value}.yaml"] if name == "config" else value
        elif name in ("peer_python", "vizier_python"):
            words += [flag, "PYTHON"]
        elif value is True:
            words += [flag]
        elif value != []:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    needs_data = script.exists() and "DUET_DATA=" in script.read_text(encoding="utf-8")
    return ("DUET_DATA=../shared/data " if needs_data else "") + shlex.join(words)


def settings_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of results that were written before all scripts kept them, as far as the results tell."""
    if "study_seconds" in data:
        names = [row["mixture"] for row in data["rows"]]
        seeds = max(len(row["values"]) for row in data["rows"])
        return {"config": data["config"], "seeds": seeds, "vertices": any(name.startswith("only ") for name in names)}
    if "labels" in data:
        peer = any(row["who"].startswith("transformers") for row in data["rows"])
        return {name: data[name] for name in ("steps", "rounds", "labels")} | {"peer_python": peer}
    seeds = {row["seed"] for row in data.get("rows", ()) if "seed" in row}
    return {"seeds": len(seeds)} if seeds else {}


def made_on(data: Mapping[str, Any]) -> str:
    """The machine, versions and commit of a result."""
    machine = data.get("machine", {})
    if not isinstance(machine, Mapping):
        machine = {"cpu": machine, "cores": data["cores"]}
    versions = data.get("versions", {"python": data.get("python", "not recorded")})
    where = f"{machine['cpu']}, {machine['cores']} cores" if machine else "machine not recorded"
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"*{where}; {known}; commit {data.get('commit', 'not recorded')}.*"


def markdown(table: Table) -> str:
    """A table of Markdown: words to the left, numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    numeric = [all(not row[i] or row[i][0] in "-+0123456789" for row in rows) for i in range(len(table.header))]
    lines = [table.header, ["---:" if right else "---" for right in numeric], *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.caption}\n\n{body}" if table.caption else body
