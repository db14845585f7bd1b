"""Meshes of slices of TPUs, whose devices are made up: no slice is needed to arrange them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from duet_jax.config import AXES, MeshConfig
from duet_jax.distributed.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks of a device to arrange it."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0
    slice_index: int = 0
    core_on_chip: int = 0


def chips(kind: str, *sides: int) -> list[Any]:
    places = itertools.product(*(range(side) for side in reversed(sides)))
    return [Chip(number, place[::-1], kind) for number, place in enumerate(places)]


# Of configs/pod_*.yaml: their slices, and what state and memory choose there.
@pytest.mark.parametrize(
    ("kind", "sides", "sizes"),
    [
        ("TPU v5 lite", (4, 4, 1), (4, 4, 1)),
        ("TPU v5 lite", (4, 4, 1), (8, 2, 1)),
        ("TPU v5 lite", (4, 4, 1), (4, 1, 4)),
        ("TPU v5", (2, 4, 4), (8, 4, 1)),
        ("TPU v5", (2, 4, 4), (2, 16, 1)),
        ("TPU v6 lite", (8, 8, 1), (4, 16, 1)),
        ("TPU v6 lite", (8, 8, 1), (32, 2, 1)),
    ],
)
def test_axes_of_the_mesh_may_be_parts_of_those_of_the_torus(
    kind: str, sides: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    data, fsdp, tensor = sizes
    devices = chips(kind, *sides)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices, 0)
    assert mesh.devices.shape == sizes and mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(devices)
    # Devices that share a copy of the state are a box of the torus, and no farther apart than they must be.
    for copy in mesh.devices.reshape(data, -1):
        corners = np.array([chip.coords for chip in copy])
        assert np.prod(np.ptp(corners, axis=0) + 1) == fsdp * tensor
