"""The kind of device that programs are traced for: the one at hand, or one that they are only compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def platform() -> str:
    """As JAX calls it: cpu, gpu or tpu."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(kind: str) -> Iterator[None]:
    """Inside, `platform` answers this kind.

    JAX keeps what it has traced, whatever this says: of one function with the same shapes, a process can have only the
    program for one kind of device.
    """
    before = _TARGET.set(kind)
    try:
        yield
    finally:
        _TARGET.reset(before)
