"""What is printed where there is no terminal."""

from __future__ import annotations

import pytest

from duet_jax import display as module
from duet_jax.display import Display
from duet_jax.training.reports import StepReport


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


def test_the_time_left_counts_the_steps_that_this_process_takes() -> None:
    report = StepReport(
        step=75,
        steps=100,
        loss=1.5,
        gradient_norm=0.5,
        learning_rate=0.01,
        tokens=300,
        seconds=4.0,
        step_seconds=2.0,
        flops=4e9,
        devices=1,
    )

    def note(shared: bool) -> str:
        with Display(3, quiet=True, shared=shared) as display:
            display.stage(1, "training")
            display.step(1, report)
            (task,) = display._progress.tasks
            return str(task.fields["note"])

    # A training that was resumed two steps ago: 25 steps are left of this round, and 100 of the last.
    assert note(shared=False) == "loss 1.500  150 tokens/s  0:04:10 left"
    assert note(shared=True) == "loss 1.500  150 tokens/s"
