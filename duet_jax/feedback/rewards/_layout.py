"""What a sandbox must show for Python's standard library to work; a script, as it loads every extension module.

Prints JSON: `folders` and `files` that are shown at their own places, `links` (path to target) that the dynamic loader
follows to them, and `hidden`, folders inside of them that are not the standard library.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from typing import Any


def layout() -> dict[str, Any]:
    """The mapping above, for the interpreter that runs this."""
    library = [Path(entry).resolve() for entry in sys.path if os.path.exists(entry)]
    for folder in library:
        _load_extensions(folder)
    files = sorted(path for path in _mapped_libraries() if not any(path.is_relative_to(entry) for entry in library))
    links = {}
    # The loader finds a library by the name of a link to it, in folders that may be links too (/lib to /usr/lib).
    for folder in {Path("/"), Path("/usr"), *(path.parent for path in files)}:
        for entry in folder.iterdir():
            if entry.is_symlink() and (entry.resolve() in files or entry.name in ("lib", "lib64")):
                links[str(entry)] = os.readlink(entry)
    cache = Path("/etc/ld.so.cache")
    found = [*files, cache] if cache.exists() else files
    hidden = [entry / name for entry in library for name in ("site-packages", "dist-packages")]
    # Outer folders first, so that what lies inside of another is mounted on it and not below it.
    folders = [path for path in sorted(library) if not any(path != o and path.is_relative_to(o) for o in library)]
    return {
        "folders": [str(path) for path in folders if path.is_dir()],
        "files": [str(path) for path in [*found, *(path for path in folders if path.is_file())]],
        "links": links,
        "hidden": [str(path) for path in hidden if path.is_dir()],
    }


def _load_extensions(folder: Path) -> None:
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.partition(".")[0]
        if path.name.endswith(suffixes) and not name.startswith(("_test", "xx", "_tkinter")):
            try:
                importlib.import_module(name)
            except ImportError:
                # A module whose library the system lacks works no better outside of the sandbox.
                continue


def _mapped_libraries() -> set[Path]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {Path(path) for path in paths if ".so" in path and path.startswith("/") and os.path.exists(path)}


if __name__ == "__main__":
    json.dump(layout(), sys.stdout)
