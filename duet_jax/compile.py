"""`duet compile`: the programs of a study, compiled for a TPU slice that nobody has rented yet.

Each program is the function that `duet run` calls, traced with shapes in place of arrays, and compiled by the TPU's own
compiler. What it needs of memory is that compiler's analysis, and so is the verdict; seconds are an estimate.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from duet_jax import __version__
from duet_jax._files import write
from duet_jax.config import StudyConfig
from duet_jax.distributed.measure import Compiled, Times, TooLarge, measure, times
from duet_jax.distributed.target import tracing_for
from duet_jax.distributed.topology import Topology
from duet_jax.errors import ConfigError
from duet_jax.models.published import read_shape
from duet_jax.programs import Program, Shapes, host_programs

# Compilations that look for the largest batch, besides that of the batch in the configuration.
MOST_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One program on one slice.

    Attributes:
      program: which.
      found: what the compiler says of it.
      times: of one run; None if it did not compile.
      fits: whether it runs in a chip's memory, beside what else is there.
      largest: the most rows, of the configured ones times powers of two, that were compiled and fit; None: none did, or
        nobody looked.
    """

    program: Program
    found: Compiled | TooLarge
    times: Times | None
    fits: bool
    largest: int | None

    def as_dict(self) -> dict[str, Any]:
        """Values of JSON; bytes, operations and seconds of one run on one chip."""
        program, found = self.program, self.found
        whole: dict[str, Any] = {"program": program.name, "rows": program.rows, "length": program.length}
        whole |= {"fits": self.fits, "largest_rows": self.largest} | dataclasses.asdict(found)
        memory = None if found.memory is None else found.memory + program.beside
        whole |= {"memory": memory, "beside": program.beside}
        if self.times is not None:
            whole["estimate"] = dataclasses.asdict(self.times) | {
                "seconds": self.times.longest,
                "bound": self.times.bound,
            }
        return whole


def compile_study(
    config: StudyConfig,
    topology: Topology,
    *,
    mfu: float,
    find_largest: bool,
    output: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compiles a study's programs, prints a table and returns what it says, as values of JSON.

    Args:
      config: of the study; its data is not read, and of its model only the shape.
      topology: the slice.
      mfu: share of the peak that matrix products are taken to reach.
      find_largest: whether to look for the largest batch that fits, at a few compilations a program.
      output: file for the JSON; it is replaced after each program.
      say: is given one line of news at a time.

    Raises:
      ConfigError: libtpu is not installed, the mesh does not fit the slice, or the model starts from scratch.
      ModelError: the model's shape cannot be read.
    """
    if config.model.source is None:
        raise ConfigError(
            "model.scratch has the vocabulary of its data, which duet compile does not read; give model.source."
        )
    model, devices = read_shape(config.model.source), topology.devices()
    if config.data.max_length > model.max_length:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the model takes at most {model.max_length} tokens."
        )
    shapes = Shapes(config, model, devices, int(topology.chip.memory))
    verdicts: list[Verdict] = []
    with tracing_for("tpu"):
        whole = _about(config, topology, shapes, mfu)
        for program in shapes.programs():
            verdict = _judge(program, topology, shapes, mfu, find_largest)
            verdicts.append(verdict)
            whole["programs"].append(verdict.as_dict())
            verb = "fits" if verdict.fits else "does not fit"
            say(f"{program.name}: {verb}, compiled in {verdict.found.seconds:.0f} s")
            if output is not None:
                write(output, json.dumps(whole, indent=1) + "\n")
    whole |= {"host": host_programs(config), "round": _round(config, verdicts)}
    if output is not None:
        write(output, json.dumps(whole, indent=1) + "\n")
    _print_table(whole, verdicts)
    return whole


def _about(config: StudyConfig, topology: Topology, shapes: Shapes, mfu: float) -> dict[str, Any]:
    lora = config.training.method == "lora"
    return {
        "config": config.name,
        "model": config.model.source,
        "method": config.training.method,
        "rank": config.training.lora.rank if lora else None,
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": dict(shapes.mesh.shape),
        "chip": dataclasses.asdict(topology.chip),
        "mfu": mfu,
        "versions": {"duet_jax": __version__, "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
        "programs": [],
        "not_compiled": shapes.left_out,
    }


def _judge(program: Program, topology: Topology, shapes: Shapes, mfu: float, find_largest: bool) -> Verdict:
    limit = topology.chip.memory - program.beside
    tried: dict[int, Compiled | TooLarge] = {}

    def fits(rows: int) -> bool:
        if rows not in tried:
            tried[rows] = measure(program.trace(rows), shapes.shares(rows))
        found = tried[rows]
        return isinstance(found, Compiled) and found.memory <= limit

    first = fits(program.rows)
    largest = None
    if find_largest:
        largest = largest_that_fits(program.rows, shapes.fewest_rows, fits, lambda rows: tried[rows].memory, limit)
    found = tried[program.rows]
    estimate = times(found, topology.chip, mfu) if isinstance(found, Compiled) else None
    return Verdict(program, found, estimate, first, largest)


def largest_that_fits(
    rows: int, fewest: int, fits: Callable[[int], bool], memory: Callable[[int], float | None], limit: float
) -> int | None:
    """The most rows, `rows` times a power of two, that fit.

    Memory grows by about the same for each row. So two sizes say how many rows should fill the limit; that many are
    compiled, and half as many where they do not fit, `MOST_TRIES` times at most.

    Args:
      rows: the first to be tried.
      fewest: rows that give every device one; only multiples of it are tried besides `rows`.
      fits: whether so many rows fit, by compiling them.
      memory: bytes that so many rows, which were tried, need; None where that is not known.
      limit: bytes that there are.

    Returns:
      Rows that were tried and fit; None if none did.
    """
    first = fits(rows)
    second = rows * 2 if first else rows // 2
    if second < fewest or second % fewest:
        return rows if first else None
    if fits(second) != first:
        return min(rows, second)
    one, other = memory(rows), memory(second)
    guess = second * 2 if first else second // 2
    if one is not None and other is not None and (slope := (other - one) / (second - rows)) > 0:
        room = max(rows + (limit - one) / slope, 1.0)
        guess = int(rows * 2.0 ** math.floor(math.log2(room / rows)))
    best = second if first else None
    for _ in range(MOST_TRIES):
        if guess < fewest or guess % fewest or guess <= (best or 0):
            break
        if fits(guess):
            return guess
        guess //= 2
    return best


def _round(config: StudyConfig, verdicts: list[Verdict]) -> dict[str, Any] | None:
    """Steps of one round's training and their seconds, if every batch were of the longest bucket."""
    step = next((one for one in verdicts if one.program.name == "train step"), None)
    if step is None or step.times is None:
        return None
    steps = config.training.epochs * math.ceil(config.budget / config.training.drawn)
    return {"steps": steps, "seconds": steps * step.times.longest}


def _print_table(whole: dict[str, Any], verdicts: list[Verdict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    chip, mesh = whole["chip"], " x ".join(f"{name} {size}" for name, size in whole["mesh"].items())
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("program", "rows", "GiB", "verdict", "largest", "TFLOP", "GB moved", "collectives", "ms", "bound"):
        table.add_column(title, justify="left" if title in ("program", "verdict", "collectives", "bound") else "right")
    for verdict in verdicts:
        table.add_row(*_cells(verdict))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{whole['config']}: {whole['model']} on {whole['topology']}, {whole['chips']} chips, {mesh}")
    # A table that is wider than the terminal is better than one with numbers cut off.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=9999)).maximum)
    console.print(table)
    for one in whole["host"]:
        console.print(f"{one['program']}: on the host, {one['memory'] / 2**20:.1f} MiB")
    if whole["not_compiled"]:
        console.print(f"not compiled: what {' and '.join(whole['not_compiled'])} needs besides")
    if whole["round"] is not None:
        steps, hours = whole["round"]["steps"], whole["round"]["seconds"] / 3600
        console.print(
            f"a round: {steps} steps, at most {hours:.2f} h of training, {hours * whole['chips']:.1f} chip-hours"
        )
    console.print(
        f"Per chip and run. Limit {chip['memory'] / 2**30:.2f} GiB. Times are the longest of matrix products at "
        f"{whole['mfu']:.0%} of {chip['peak'] / 1e12:.0f} TFLOP/s, memory at {chip['memory_rate'] / 1e9:.0f} GB/s, and "
        f"collectives as rings over one axis of the torus at 2 x {chip['link_rate'] / 1e9:.0f} GB/s, each overlapping "
        f"the others; nothing for latency ({chip['source']}). Of loops whose length the data decides, the output head "
        f"over blocks of scored tokens and decoding until replies end, one pass counts."
    )


def _cells(verdict: Verdict) -> list[str]:
    program, found = verdict.program, verdict.found
    memory = "?" if found.memory is None else f"{(found.memory + program.beside) / 2**30:.2f}"
    largest = "" if verdict.largest is None else f"{verdict.largest}"
    start = [program.name, f"{program.rows} x {program.length}", memory, "fits" if verdict.fits else "does not fit"]
    if isinstance(found, TooLarge) or verdict.times is None:
        return [*start, largest, "", "", "", "", ""]
    collectives = ", ".join(
        f"{one.count} {kind} {one.bytes / 1e9:.2f} GB" for kind, one in found.collectives.items() if one.count
    )
    numbers = [f"{found.flops / 1e12:.2f}", f"{found.traffic / 1e9:.1f}", collectives]
    return [*start, largest, *numbers, f"{verdict.times.longest * 1e3:.1f}", verdict.times.bound]
