"""What the sandbox is made of: a filter of system calls, a layout, limits; and what becomes of programs without it."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from duet_jax._checks import FieldError
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import _seccomp, sandbox
from duet_jax.feedback.rewards.sandbox import Isolation, Limits, Outcome


class TestWithoutIsolation:
    def test_it_refuses_and_names_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, "unshare: Operation not permitted"))
        with pytest.raises(FeedbackError, match=r"unshare: Operation not permitted.*set 'unsafe'"):
            sandbox.run("print('ran')")

    def test_another_system_is_refused_in_any_case(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        for unsafe in (False, True):
            with pytest.raises(FeedbackError, match="run on Linux alone, and this is darwin"):
                sandbox.run("print('ran')", unsafe=unsafe)

    def test_told_so_it_runs_with_limits_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, "unshare: Operation not permitted"))
        outcome = sandbox.run("import os; print(os.getcwd(), dict(os.environ))", unsafe=True)
        folder, environment = outcome.stdout.split()
        assert environment == "{}" and not os.path.exists(folder)
        assert sandbox.run("x = bytearray(2**30)", Limits(memory_bytes=2**28), unsafe=True).status == "memory"
        assert sandbox.run("import time; time.sleep(60)", Limits(wall_seconds=2.0), unsafe=True).status == "timeout"
        assert sandbox.run("print('x' * 99)", Limits(output_bytes=9), unsafe=True).status == "output"
        # A child that holds on to the output does not hold the caller.
        program = "import os, time\nif os.fork() == 0: time.sleep(60)\nprint('done')"
        assert sandbox.run(program, unsafe=True) == Outcome("ok", "done\n", "", 0)

    def test_a_probe_that_gets_out_is_believed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "_run", lambda *_, **__: Outcome("ok", "it read a file\n", "", 0))
        found = sandbox.isolation.__wrapped__()
        assert found == Isolation(False, "a probe got out: it read a file")

    def test_the_probe_finds_what_is_open(self, tmp_path: Path) -> None:
        """The same probe, without isolation: it must report each thing that it was able to do."""
        secret = tmp_path / "secret"
        secret.write_text("secret", encoding="utf-8")
        facts = {"secret": str(secret), "port": 9}
        outcome = sandbox.run(f"FACTS = {facts!r}\n{sandbox._PROBE}", unsafe=True)
        assert {"it read a file", "it saw /proc"} <= set(outcome.stdout.strip().split(", "))

    def test_a_failure_to_set_up_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not sandbox.isolation().available:
            pytest.skip("no isolation on this machine")
        layout = {**sandbox._layout(), "folders": ["/there/is/none"]}
        monkeypatch.setattr(sandbox, "_layout", lambda: layout)
        with pytest.raises(FeedbackError, match="could not be set up: mount /there/is/none: No such file"):
            sandbox.run("print('ran')")


def test_limits_are_checked() -> None:
    with pytest.raises(FieldError, match="wall_seconds is nan; it must be a positive number"):
        Limits(wall_seconds=float("nan"))
    for name in ("cpu_seconds", "processes", "output_bytes", "memory_bytes", "file_bytes"):
        with pytest.raises(FieldError, match=f"{name} is 0; it must be at least"):
            Limits(**{name: 0})


def test_the_filter_is_sound_on_every_architecture() -> None:
    """Interprets the filter as the kernel would, for every call it may meet."""
    x86, arm = 0xC000003E, 0xC00000B7
    for machine, arch, other, fork, openat, refused_calls in (
        ("x86_64", x86, arm, 56, 257, {41, 101, 165, 272, 319}),
        ("aarch64", arm, x86, 220, 56, {40, 97, 117, 198, 279}),
    ):
        code = _seccomp.bpf(machine)
        assert code is not None
        for number in refused_calls:
            assert verdict(code, number, arch) == 0x00050001
        assert verdict(code, 435, arch) == 0x00050026
        assert verdict(code, openat, arch) == verdict(code, fork, arch, 0x11) == 0x7FFF0000
        for bit in (17, *range(25, 31)):
            assert verdict(code, fork, arch, 1 << bit | 0x11) == 0x00050001
        assert verdict(code, openat, other) == verdict(code, 0x40000000 + openat, arch) == 0x00050001
    assert _seccomp.bpf("riscv64") is None


def verdict(code: bytes, number: int, arch: int, first_argument: int = 0) -> int:
    """The value that a filter of LD, JEQ, JGE, JSET and RET gives for one system call."""
    data = struct.pack("<iIQ6Q", number, arch, 0, first_argument, *[0] * 5)
    instructions = list(struct.iter_unpack("<HBBI", code))
    at = accumulator = 0
    while True:
        operation, yes, no, value = instructions[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += yes if holds else no


def test_the_order_of_the_layout_is_plain_data() -> None:
    layout = sandbox._layout()
    assert json.loads(json.dumps(layout)) == layout
    assert all(os.path.isabs(path) for path in (*layout["folders"], *layout["files"], *layout["links"]))
    assert not [path for path in (*layout["folders"], *layout["files"]) if path.startswith(("/home", "/tmp"))] or (
        sys.prefix.startswith(("/home", "/tmp"))
    )
