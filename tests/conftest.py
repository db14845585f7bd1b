"""Property tests give the same examples on every run, and take the time they need on a busy machine.

Programs of tests run for milliseconds and compile for seconds, most of which goes into making them fast. XLA is told
not to, unless XLA_FLAGS is set (empty is enough): LLVM optimises nothing, which takes a third of the time, and where
jaxlib still has the older emitters, they write the loops of programs in a quarter of what remains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    # Later ones do not know the flag, and end the process that has it.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("duet", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("duet")


def pytest_configure(config: pytest.Config) -> None:
    """What one module, worker, process or run of the tests has compiled, the others need not compile again."""
    assert config.cache is not None
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        # Seconds: reading a program takes about a quarter of compiling it, which pays for all but the smallest.
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program holds some of the mappings that a process may have; those of all tests are too many."""
    yield
    jax.clear_caches()


def _arrays(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _arrays(inner)


@pytest.fixture
def arrays() -> Callable[[Any], Iterator[Any]]:
    """Gives shape and type of every array that a program makes, in its inner programs too."""
    return _arrays
