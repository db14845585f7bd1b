"""The mesh of a job's devices: axes `data`, `fsdp` and `tensor`, see `MeshConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from duet_jax.config import AXES, MeshConfig
from duet_jax.distributed.processes import lead, several
from duet_jax.errors import ConfigError

# Of a device's memory, what parameters and optimiser state may take before they are shared.
STATE_SHARE = 0.5


def make_mesh(
    config: MeshConfig | None,
    devices: Sequence[jax.Device],
    parameter_bytes: int,
    *,
    device_bytes: int | None = None,
) -> Mesh:
    """The mesh of a configuration, or one that fits the model.

    Chosen by itself, state is shared by the fewest devices that leave each of them half its memory, and all others
    hold copies: gathering parameters costs time, and sharing the features of a layer costs more, which nobody pays
    unless told to.

    Args:
      config: sizes of the axes; None: they are chosen.
      devices: all that the mesh is made of.
      parameter_bytes: bytes of parameters, gradients and optimiser state together; decides only what is chosen.
      device_bytes: memory of a device; None: what the device says. One that says nothing is taken to have enough.

    Returns:
      A mesh whose axes are left to the compiler (`AxisType.Auto`), neighbours along `tensor` nearest to each other.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or some are of processes that were not joined.
    """
    if jax.process_count() > 1 and not several():
        raise ConfigError(
            f"There are devices of {jax.process_count()} processes, which were not joined; start each with --cluster."
        )
    if config is None:
        config = MeshConfig(fsdp=_sharers(len(devices), parameter_bytes, device_bytes or _memory(devices)))
    sizes = _sizes(config, len(devices))
    # An axis of the mesh may be part of one of the torus, as 4 x 16 devices on 8x8 are; `jax.make_mesh` refuses that.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    given = [getattr(config, name) for name in AXES]
    product = math.prod(size for size in given if size != -1)
    if count % product or (-1 not in given and product != count):
        text = " x ".join(f"{name} {size}" for name, size in zip(AXES, given, strict=True) if size != -1)
        rule = "divide" if -1 in given else "be"
        raise ConfigError(f"mesh: {text} is {product}; it must {rule} the number of devices, {count}.")
    return tuple(count // product if size == -1 else size for size in given)


def _sharers(count: int, parameter_bytes: int, device_bytes: int | None) -> int:
    """Devices that share a copy: the fewest that leave room, or all of them."""
    if device_bytes is None:
        return 1
    divisors = (size for size in range(1, count + 1) if count % size == 0)
    return next((size for size in divisors if parameter_bytes / size <= STATE_SHARE * device_bytes), count)


def _memory(devices: Sequence[jax.Device]) -> int | None:
    # Only a device of this process can be asked; all have about the same, and all processes must go by one number.
    own = next((device for device in devices if device.process_index == jax.process_index()), None)
    return lead(lambda: None if own is None else (own.memory_stats() or {}).get("bytes_limit"))
