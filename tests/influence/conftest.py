"""The decoder whose replies can all be written down."""

from __future__ import annotations

import pytest

from duet_jax.influence.build import Point
from tests.influence.every_reply import tiny


@pytest.fixture(scope="session")
def point() -> Point:
    return tiny()
