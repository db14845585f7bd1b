"""Which of two programs for one function runs: plain JAX, left to XLA, or a Pallas kernel.

A kernel becomes the default of its file where it was measured to be faster than XLA on the hardware it is for, and
the file then gives the numbers. None is so far: all of them compile for TPUs, and no TPU has run them yet.
"""

from __future__ import annotations

from typing import Literal, get_args

Implementation = Literal["xla", "pallas"]


def runs_kernel(implementation: Implementation | None, default: Implementation = "xla") -> bool:
    """Whether the Pallas kernel was asked for, or is the default where nothing was.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"The implementation is {implementation!r}; it must be 'xla', 'pallas' or None.")
    return (implementation or default) == "pallas"
