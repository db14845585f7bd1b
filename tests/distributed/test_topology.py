"""Names of TPU slices."""

from __future__ import annotations

import importlib.util

import pytest

from duet_jax.distributed import topology
from duet_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "chips"), [("v5e:4x4", 16), ("v5p:2x4x4", 32), ("v5p:8x8x12", 768), ("v6e:8x8", 64), ("v5e:16x16", 256)]
)
def test_slices(text: str, chips: int) -> None:
    found = topology.parse(text)
    assert found.chips == chips and str(found) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:2x2x1", "must begin with one of v5e, v5p, v6e"),
        ("v5e", "slices of v5e are 1x1, 2x2"),
        ("v5e:3x5", "slices of v5e are 1x1, 2x2"),
        ("v5e:4x4x4", "slices of v5e are"),
        ("v5p:4x4", "multiples of 4"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v5p:0x4x4", "multiples of 4"),
        ("v5p:04x4x4", "multiples of 4"),
        ("v6e:4xx4", "slices of v6e are"),
    ],
)
def test_what_is_no_slice(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topology.parse(text)


def test_rates_are_of_links_in_one_direction() -> None:
    for chip, published in ((topology.CHIPS["v5e"], 400e9), (topology.CHIPS["v5p"], 1200e9)):
        assert chip.link_rate * 2 * 2 * chip.axes == published


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'duet_jax\[tpu\]'"):
        topology.prepare()
