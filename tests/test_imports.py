"""The shape of the code: folders import what stands above them in the data flow, never below."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"types", "errors", "_checks", "config"}
COMPUTE = {"search", "kernels", "models", "data", "training", "feedback", "selection", "influence", "curation"}
# What each folder may import of ours, besides itself and SHARED.
ALLOWED = {
    "search": set(),
    "kernels": set(),
    "models": {"distributed"},
    "data": {"_files"},
    # Where arrays lie and what devices are: it knows nothing of what is computed there.
    "distributed": set(),
    # Texts and checkpoints by name: it knows nothing of studies.
    "storage": {"_files"},
    "training": {"kernels", "models", "data", "distributed", "storage"},
    "feedback": {"kernels", "models", "data", "distributed"},
    "influence": {"kernels", "models", "data", "distributed", "_files"},
    "selection": {
        *("kernels", "models", "data", "distributed", "training", "feedback", "influence", "curation"),
        *("_files", "_decode"),
    },
    "curation": {"kernels", "models", "data", "distributed", "training", "feedback", "report", "_files"},
    "report": {"recall", "study", "storage", "trial", "search", "_files"},
    "serve": {"data", "models", "feedback", "search", "report", "study", "trial", "job", "duet", "_files"},
}
MODULES = sorted([*ROOT.glob("duet_jax/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path, **options: bool) -> set[str]:
    """Folders and modules directly below duet_jax that a file imports."""
    return {name.split(".")[1] for name in imported(path, **options) if name.startswith("duet_jax.")}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_stands_above_it(folder: str) -> None:
    root = ROOT / "kernels" if folder == "kernels" else ROOT / "duet_jax" / folder
    for path in root.rglob("*.py"):
        names = ours(path) - {"__version__"}
        assert names <= ALLOWED[folder] | SHARED | {folder}, f"{path} imports {sorted(names)}"


@pytest.mark.parametrize(
    "module",
    ["config", "_decode", "_checks", "_files", "study", "trial", "types", "errors", "workers", "leases", "kept"],
)
def test_boundary_modules_import_nothing_that_computes(module: str) -> None:
    names = imported(ROOT / "duet_jax" / f"{module}.py")
    assert not ours(ROOT / "duet_jax" / f"{module}.py") & COMPUTE
    assert not {name.split(".")[0] for name in names} & {"jax", "flax", "optax", "tinygp", "datasets"}


def test_cli_binds_what_computes_late() -> None:
    assert ours(ROOT / "duet_jax" / "cli.py", top_level_only=True) <= {
        *("__version__", "config", "errors", "storage", "study", "trial", "_checks")
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_pytorch_is_for_tests_and_benchmarks() -> None:
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "peft"}, path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def test_importing_changes_no_jax_flag() -> None:
    code = """
import importlib.util, pkgutil
import jax
before = dict(jax.config.values)
import duet_jax.kernels
names = [m.name for m in pkgutil.walk_packages(duet_jax.__path__, "duet_jax.")]
names += [f"duet_jax.kernels.{m.name}" for m in pkgutil.iter_modules(duet_jax.kernels.__path__)]
if importlib.util.find_spec("lm_eval") is None:
    names.remove("duet_jax.feedback.harness.model")
if importlib.util.find_spec("obstore") is None:
    names.remove("duet_jax.storage.objects")
if importlib.util.find_spec("starlette") is None:
    names = [name for name in names if not name.startswith("duet_jax.serve.")]
for name in names:
    importlib.import_module(name)
after = dict(jax.config.values)
print({name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]})
"""
    assert run(code).strip() == "{}"


def test_importing_the_package_imports_no_jax() -> None:
    assert run("import sys, duet_jax; print('jax' in sys.modules)").strip() == "False"
