"""`duet compile`: its search for the largest batch, its mistakes, and a tiny model compiled for a real slice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from duet_jax import cli
from duet_jax.compile import MOST_TRIES, largest_that_fits
from duet_jax.config import load
from duet_jax.distributed import measure, topology
from duet_jax.models.published import read_shape
from duet_jax.programs import Shapes

NEEDS_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def search(rows: int, memory: Callable[[int], float], limit: float, fewest: int = 1) -> tuple[int | None, list[int]]:
    """What is found, and all that was compiled for it."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        if size not in tried:
            tried.append(size)
        return memory(size) <= limit

    return largest_that_fits(rows, fewest, fits, memory, limit), tried


@pytest.mark.parametrize(
    ("rows", "limit", "found"), [(8, 100, 64), (8, 19, 8), (64, 100, 64), (64, 15, 4), (64, 11, 1)]
)
def test_the_largest_batch_of_memory_that_grows_by_rows(rows: int, limit: float, found: int) -> None:
    largest, tried = search(rows, lambda size: 10.0 + size, limit)
    assert largest == found and len(tried) <= MOST_TRIES + 2


def test_memory_that_grows_faster_than_two_sizes_say() -> None:
    assert search(8, lambda size: 10.0 + size + size**2 / 64, 100) == (32, [8, 16, 64, 32])


def test_no_batch_fits_and_devices_without_rows_are_not_tried() -> None:
    assert search(8, lambda size: 10.0 + size, 5, fewest=4) == (None, [8, 4])
    assert search(4, lambda size: 10.0 + size, 5, fewest=4) == (None, [4])
    assert search(4, lambda size: 10.0 + size, 15, fewest=4)[0] == 4
    # 16 devices cannot share half of 48 rows.
    assert search(48, lambda size: 10.0 + size, 15, fewest=16) == (None, [48])


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("the total memory required for HLO temporaries (1.50T) exceeds available HBM (15.75G).", 1.5 * 2**40),
        ("Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded by 768.00M.", 16.5 * 2**30),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_that_it_lacks(text: str, needed: float | None) -> None:
    assert measure.needed_bytes(text) == needed


def study(folder: Path, **training: object) -> Path:
    """A study of a tiny model whose weights and data are nowhere."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    domains = [{"name": name, "source": f"{name}.jsonl"} for name in ("one", "two")]
    settings = {"method": "lora", "learning_rate": 1e-3, "batch_size": 16, "micro_batch_size": 8, **training}
    whole = {
        "name": "tiny",
        "budget": 64,
        "rounds": 2,
        "model": {"source": str(folder), "dtype": "bfloat16", "chat": False},
        "data": {"max_length": 128, "domains": domains},
        "training": settings,
        "selector": {"kind": "less", "k": 1024},
        "task": {"kind": "exact_match", "source": "task.jsonl", "max_new_tokens": 16},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v7x:2x2"], "must begin with one of v5e, v5p, v6e"),
        (["--topology", "v5e:2x2", "--mfu", "2"], "--mfu is 2; it must be greater than 0"),
        (["--topology", "v5e:2x2", "--json", "nowhere/table.json"], "there is no folder nowhere"),
        (["--topology", "v5e:2x2", "training.rank=3"], "training.rank"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compile", str(study(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err


def shapes(path: Path) -> Shapes:
    """Those of a study on the device at hand."""
    config = load(path)
    return Shapes(config, read_shape(str(config.model.source)), jax.devices()[:1], 1 << 34)


@pytest.mark.parametrize(("micro", "rows", "drawn"), [(8, 4, 16), (None, 16, 32)])
def test_a_step_that_chooses_is_traced_with_all_its_candidates(
    micro: int | None, rows: int, drawn: int, tmp_path: Path
) -> None:
    online = {"candidates": 32, "rule": "rho"}
    step = shapes(study(tmp_path, micro_batch_size=micro, online=online)).train_step()
    inputs = step.trace(rows).jaxpr.in_avals
    assert [(x.shape, x.dtype) for x in inputs if x.shape[:1] == (drawn,)] == [
        ((drawn, 128), np.int32),
        ((drawn, 128), bool),
        ((drawn,), np.float32),
    ]


def test_replies_of_a_selector_are_compiled_and_the_rest_is_named(tmp_path: Path) -> None:
    path = study(tmp_path)
    whole = yaml.safe_load(path.read_text())
    reward = {"kind": "exact_match"}
    nice = {"kind": "nice", "k": 1024, "policy": {"batch_size": 12, "samples": 4}, "reward": reward}
    path.write_text(yaml.safe_dump(whole | {"selector": nice}))
    found = {program.name: program.rows for program in shapes(path).programs()}
    assert (found["prefill of nice"], found["decoding of nice"], found["decoding"]) == (3, 12, 8)
    assert shapes(path).left_out == []
    path.write_text(yaml.safe_dump(whole | {"selector": {"kind": "el2n"}}))
    assert shapes(path).left_out == ["selector.kind el2n"]


@pytest.mark.slow
@NEEDS_LIBTPU
def test_a_study_compiles_for_four_chips(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    command = [sys.executable, "-m", "duet_jax.cli", "compile", str(study(tmp_path)), "--topology", "v5e:2x2"]
    done = subprocess.run(
        [*command, "--no-largest", "--json", str(table), "mesh.data=2", "mesh.fsdp=2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(table.read_text())
    names = [program["program"] for program in found["programs"]]
    assert names == ["train step", "sketch step", "scoring", "prefill", "decoding"]
    assert all(name in done.stdout for name in names) and "a round: 4 steps" in done.stdout
    chip = topology.CHIPS["v5e"]
    for program in found["programs"]:
        assert program["fits"] and 0 < program["memory"] < 0.1 * chip.memory
        assert program["estimate"]["seconds"] > 0
    train = found["programs"][0]
    # Each chip works on a quarter of the 16 rows: at least forwards, and back through what is given.
    products = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512
    least = 2 * 2 * 16 * 128 * 3 * products / 4
    assert least < train["flops"] < 3 * least
    # Parameters of two chips are gathered, and gradients summed, in each of two micro-batches.
    assert train["collectives"]["all-gather"]["count"] >= 2 * 3
    assert train["estimate"]["computing"] == pytest.approx(train["flops"] / chip.peak / 0.5)
