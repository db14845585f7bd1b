"""How well the device is used: model FLOPs against its peak, its memory, and what is compiled."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from duet_jax.distributed.topology import CHIPS
from duet_jax.training.reports import StepReport

COMPILED = "/jax/core/compile/backend_compile_duration"
# Dense bfloat16 FLOP/s by what the name of a device holds, the first that fits; those of GPUs from NVIDIA's data sheets
# (SXM boards but for the H200 NVL, half of what they say with sparsity), that of TPU v4 from
# docs.cloud.google.com/tpu/docs/v4. TPUs call v5e and v6e "lite".
PEAKS = (
    ("TPU v6", CHIPS["v6e"].peak),
    ("TPU v5 lite", CHIPS["v5e"].peak),
    ("TPU v5e", CHIPS["v5e"].peak),
    ("TPU v5", CHIPS["v5p"].peak),
    ("TPU v4", 275e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 80GB HBM3", 989e12),
    ("A100", 312e12),
)
# Of a device that is not known, products of square matrices of this size are timed: on an accelerator large ones, next
# to which the time to launch one is nothing.
SIZE, SIZE_CPU, REPEATS = 8192, 1024, 3


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and where the number is from: published, or measured here."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s a device, {self.source}"


def find_peak(dtype: Any) -> Peak:
    """The peak that MFU is of: the published one for bfloat16, whatever is computed in, or else measured in `dtype`.

    A measured one is what products of matrices reach now; on a machine with other work it is too low.
    """
    kind = jax.devices()[0].device_kind
    for name, flops in PEAKS:
        if name in kind:
            return Peak(flops, f"published for {kind}")
    return Peak(_measured(jnp.dtype(dtype).name), f"measured on {kind}")


@lru_cache
def _measured(dtype: str) -> float:
    size = SIZE_CPU if jax.default_backend() == "cpu" else SIZE
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


@dataclasses.dataclass
class Compilations:
    """Programs that were compiled, or read from JAX's cache of them, since this was last asked, and their seconds."""

    count: int = 0
    seconds: float = 0.0

    def take(self) -> tuple[int, float]:
        """Both numbers, and begins anew."""
        found = self.count, self.seconds
        self.count, self.seconds = 0, 0.0
        return found


@contextmanager
def watching_compilations() -> Iterator[Compilations]:
    """Counts what this process compiles inside."""
    seen = Compilations()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            seen.count += 1
            seen.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def highest_memory() -> int:
    """Most bytes that were in use at once: of the first device, or, where it keeps no books, of this process."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if used is not None:
        return used
    # The unit is kibibytes but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclasses.dataclass(frozen=True)
class Meter:
    """What is noted of each step beside its report."""

    peak: Peak
    compilations: Compilations

    def read(self, report: StepReport) -> dict[str, float | str]:
        """Rates of a step, and what changed since the one before.

        Returns:
          tokens_per_second: prompt and response tokens that were trained on, without padding.
          mfu: the step's model FLOPs by its time and the peak of all its devices; peak_flops, peak: of one, and its
            source.
          memory: most bytes in use so far, see `highest_memory`.
          compilations, compile_seconds: since the step before was read, of this trial or another. A step is read when
            the next one is under way, so what that needs is among them.
        """
        compilations, seconds = self.compilations.take()
        return {
            "tokens_per_second": report.tokens / report.step_seconds,
            "mfu": report.flops / report.step_seconds / (self.peak.flops * report.devices),
            "peak_flops": self.peak.flops,
            "peak": self.peak.source,
            "memory": highest_memory(),
            "compilations": compilations,
            "compile_seconds": seconds,
        }
