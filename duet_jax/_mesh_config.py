"""The part of a configuration that says how a job is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass

from duet_jax._checks import FieldError, require

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices. One may be -1: the rest of them.

    Attributes:
      data: copies of the model; each takes a part of every batch.
      fsdp: devices that share one copy of parameters and optimiser state, and take a part of every batch each.
      tensor: devices that share the features of one layer, and the work on the same part of a batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            require(size >= 1 or size == -1, name, size, "at least 1, or -1 for the devices that are left")
        rest = [name for name in AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            raise FieldError(rest[1], f"is -1, as is {rest[0]}; only one axis can have the devices that are left.")
