"""What is printed where there is no terminal."""

from __future__ import annotations

import pytest

from duet_jax import display as module
from duet_jax.display import Display


def test_long_work_says_how_far_it_is_in_a_log_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Display(1) as display:
        for done in range(5):
            display.work("examples scored", done, 4)
            now += 20.0
    assert capsys.readouterr().out.splitlines() == ["examples scored: 2 of 4", "examples scored: 4 of 4"]


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with Display(1, quiet=True) as display:
        display.work("examples scored", 1, 4)
    assert capsys.readouterr().out == ""
