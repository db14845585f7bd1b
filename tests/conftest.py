"""Property tests give the same examples on every run, and take the time they need on a busy machine.

Programs of tests run for milliseconds and compile for seconds, a third of which LLVM spends on making them fast: it is
told not to, unless XLA_FLAGS is set (empty is enough).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("duet", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("duet")


def pytest_configure(config: pytest.Config) -> None:
    """What one module, worker, process or run of the tests has compiled, the others need not compile again."""
    assert config.cache is not None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program holds some of the mappings that a process may have; those of all tests are too many."""
    yield
    jax.clear_caches()
