"""Property tests give the same examples on every run, and take the time they need on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

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
