"""A trace of a few training steps, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

# Steps that this process takes before the trace begins, which compile and warm up, and in it.
SKIPPED, TRACED = 3, 5


@contextmanager
def profiling(folder: Path | None, say: Callable[[str], None]) -> Iterator[Callable[[bool], None]]:
    """Traces `TRACED` of the steps that are taken inside, once; without a folder nothing.

    Gives what is to be called after each step, with whether it was the last of its training: that ends the trace, in
    which there is nothing else than steps.
    """
    taken = 0
    left: int | None = None

    def stop() -> None:
        nonlocal left
        jax.profiler.stop_trace()
        left = 0
        say(f"the profiler's trace is in {folder}")

    def on_step(last: bool) -> None:
        nonlocal taken, left
        taken += 1
        if left is None:
            if folder is not None and taken >= SKIPPED and not last:
                jax.profiler.start_trace(folder)
                left = TRACED
        elif left:
            left -= 1
            if last or not left:
                stop()

    try:
        yield on_step
    finally:
        if left:
            stop()
