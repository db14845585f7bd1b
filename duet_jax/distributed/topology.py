"""TPU slices that programs are compiled for without having them, and the published rates of their chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

from duet_jax.errors import ConfigError

# What libtpu needs to know where there is no TPU: that it must not ask the cloud's metadata server what it runs on, and
# that other processes may compile at the same time, as none opens a TPU.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    Attributes:
      peak: bfloat16 operations a second.
      memory: bytes of high-bandwidth memory that programs may use, as libtpu 0.0.42 says when one needs more; published
        are 16 GB, 95 GiB and 32 GB.
      memory_rate: bytes a second between it and the cores.
      link_rate: bytes a second over one link to a neighbour, in one direction.
      axes: of the torus; a chip has two links on each.
      source: page of the numbers.
    """

    peak: float
    memory: float
    memory_rate: float
    link_rate: float
    axes: int
    source: str


# The pages give the rate of all links of a chip, both directions together: 400, 1200 and 800 GB/s.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 400e9 / 8, 2, "docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 1200e9 / 12, 3, "docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 31.25 * 2**30, 1600e9, 800e9 / 8, 2, "docs.cloud.google.com/tpu/docs/v6e"),
}
# Slices that can be had, by the same pages; libtpu takes any numbers. Larger ones of v5p are made of cubes of 4x4x4.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: so many chips of a kind along each axis, written `v5e:16x16`."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """The slice's devices as JAX sees them, one a chip; programs can be compiled for them, but not run."""
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(platform="tpu", topology_name=str(self)).devices)


def prepare() -> None:
    """Makes this process one that compiles for TPUs; before anything asks JAX for its devices.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Compiling for a TPU needs libtpu, which is not installed; install it with: pip install 'duet_jax[tpu]'"
        )
    os.environ |= ENVIRONMENT


def parse(text: str) -> Topology:
    """Reads `v5e:4x4`, `v5p:2x4x4` and the like. Raises ConfigError."""
    kind, _, shape = text.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ConfigError(f"The topology is {text!r}; it must begin with one of {', '.join(CHIPS)}, as v5e:16x16.")
    sides = tuple(int(side) for side in shape.split("x") if side.isdecimal())
    cubes = len(sides) == 3 == chip.axes and all(side % 4 == 0 < side for side in sides)
    if shape not in SLICES[chip.axes] and not (cubes and shape == "x".join(map(str, sides))):
        larger = ", and larger ones with sides that are multiples of 4" if chip.axes == 3 else ""
        raise ConfigError(f"The topology is {text!r}; slices of {kind} are {', '.join(SLICES[chip.axes])}{larger}.")
    return Topology(kind, sides)
