"""What the compiler says of one program: memory, work, traffic, and how long it would take at published rates."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from duet_jax.distributed import flops, hlo
from duet_jax.distributed.hlo import Collective
from duet_jax.distributed.topology import Chip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"(?:Used |\()(\d+(?:\.\d+)?)([KMGT]?)(?: of|\) exceeds)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that compiled; all numbers are of one chip and one run.

    Attributes:
      arguments, outputs, temporaries, aliased, code: bytes, by the compiler's own analysis; aliased are outputs that
        take the place of arguments.
      flops: operations of matrix products.
      traffic: bytes read from and written to main memory.
      collectives: by kind.
      open_loops: loops whose length the data decides, of which one pass is counted in `flops`, `traffic` and
        `collectives`: that of the output head over blocks of scored tokens, that of decoding.
      seconds: that compiling took.
    """

    arguments: float
    outputs: float
    temporaries: float
    aliased: float
    code: float
    flops: float
    traffic: float
    collectives: Mapping[str, Collective]
    open_loops: int
    seconds: float

    @property
    def memory(self) -> float:
        """Bytes that the program and what it is given need at the same time."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refused for want of memory.

    Attributes:
      memory: bytes that it would need on a chip, as far as the compiler says it.
      reason: the compiler's sentence.
      seconds: that compiling took.
    """

    memory: float | None
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Times:
    """Least seconds of one run: of computing, of main memory, and of the links between chips."""

    computing: float
    memory: float
    links: float

    @property
    def longest(self) -> float:
        """What the run takes if the three overlap wholly."""
        return max(self.computing, self.memory, self.links)

    @property
    def bound(self) -> str:
        return max(("computing", "memory", "links"), key=lambda name: getattr(self, name))


def measure(traced: Any, shares: int) -> Compiled | TooLarge:
    """Compiles a traced program and reads what came out.

    Args:
      traced: of `jax.jit(f).trace(...)`, with shapes that say on which devices they lie.
      shares: parts of equal size that its work is split into.
    """
    began = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return TooLarge(needed_bytes(str(error)), str(error).splitlines()[0], time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory, module = compiled.memory_analysis(), hlo.read(compiled.as_text())
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops.count(traced.jaxpr) / shares,
        traffic=module.traffic(),
        collectives=module.collectives(),
        open_loops=module.open_loops,
        seconds=seconds,
    )


def needed_bytes(refusal: str) -> float | None:
    """Bytes that a program needs on a chip by the compiler's refusal of it; None where it does not say."""
    found = _NEEDED.search(refusal)
    return None if found is None else float(found.group(1)) * _UNITS[found.group(2)]


def times(found: Compiled, chip: Chip, mfu: float) -> Times:
    """Seconds of one run at a chip's published rates.

    Args:
      found: the program.
      chip: its rates.
      mfu: share of the peak that matrix products reach.

    A collective is taken to have both directions of one axis of the torus to itself, and nothing is taken off for its
    latency.
    """
    sent = sum(collective.sent for collective in found.collectives.values())
    return Times(found.flops / (chip.peak * mfu), found.traffic / chip.memory_rate, sent / (2 * chip.link_rate))
