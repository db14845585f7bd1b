"""What the benchmarks of the search share: what we recommend, other tools as processes, results with their machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax.search import Search

HERE = Path(__file__).parent
# One thread for everybody: at these sizes more threads cost more than they compute.
SINGLE = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
MISSING = "BoTorch is left out: --peer-python names no Python that has torch and botorch."


def make_search(size: int, **settings: Any) -> Search:
    """Our search as all benchmarks use it."""
    return Search(num_domains=size, **settings)


def recommend(search: Search, state: Any) -> np.ndarray:
    """The mixture that we would train at the end."""
    return search.recommend(state).mixture


def ask_botorch(python: str, request: dict) -> Iterator[dict]:
    """The lines that `peers/botorch_search.py` answers, as they come."""
    return ask("botorch_search", python, request)


def ask(script: str, python: str, request: dict) -> Iterator[dict]:
    """The lines that a script of `peers/` answers, as they come."""
    command = [python, str(HERE / "peers" / f"{script}.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | SINGLE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise RuntimeError(f"{script}.py ended with status {process.returncode}; its message stands above.")


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The options, with those that every benchmark has."""
    default = HERE / "results" / f"{name}.json"
    parser.add_argument("--output", type=Path, nargs="?", const=default, help=f"write JSON (results/{name}.json)")
    return parser.parse_args()


def write(path: Path | None, options: argparse.Namespace, results: dict, versions: dict | None = None) -> None:
    """Results with the machine, versions, commit and settings."""
    if path is None:
        return
    settings = {name: _setting(value) for name, value in vars(options).items() if name != "output"}
    for name in settings.keys() & {"peer_python", "vizier_python"}:
        settings[name] = settings[name] is not None
    whole = about()
    whole["versions"] |= versions or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, **results, **whole}, indent=1) + "\n")


def _setting(value: Any) -> Any:
    """A setting, files by their place in the repository; others are of this machine and nobody else's."""
    if isinstance(value, list):
        return [told for one in value if (told := _setting(one)) is not None]
    if isinstance(value, Path):
        root, place = HERE.parent, value.resolve()
        return str(place.relative_to(root)) if place.is_relative_to(root) else None
    return value


def about() -> dict[str, Any]:
    """The machine, versions and the commit."""
    ours = {name: importlib.metadata.version(name) for name in ("duet_jax", "jax", "jaxlib", "numpy", "scipy")}
    return {
        "machine": {"cpu": _processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **ours},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a plus where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=HERE, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
