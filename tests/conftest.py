"""Property tests give the same examples on every run, and take the time they need on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("duet", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("duet")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program holds some of the mappings that a process may have; those of all tests are too many."""
    yield
    jax.clear_caches()
