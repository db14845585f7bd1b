"""Runs Python that a model wrote, locked in: no network, no file of ours, bounded time, memory, processes and output.

A program runs in an interpreter of its own (`_launcher`, which says how), in new mount, process, network, IPC, host
name and control group namespaces of Linux. It needs root with the capability SYS_ADMIN, or else the right of ordinary
users to create user namespaces. The program sees Python's standard library and the shared libraries of that, both
read-only, /dev/null, /dev/zero, /dev/urandom, and an empty folder of its own in memory, where it starts. There is no
/proc, no home, no executable, no environment, and nobody but its own processes. It runs as an ordinary user without
capabilities (root's sandboxes as users that nobody else has), and on x86-64 and arm64 behind a filter of system calls
(`_seccomp`). When it ends, or at the deadline, the kernel ends all that it started.

What remains open: a fault of the kernel; the time of the processor, which all sandboxes share with us; and the memory
limit holds for each process, so that a sandbox as a whole may take `processes` times as much, and its folder besides.
Before Linux 5.14 it works for root alone: a user's processes outside of a sandbox counted in it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from duet_jax import _checks
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import _launcher, _seccomp

Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]

# The environment is ours alone; a fixed hash seed makes what a program gives for sets the same in every run.
_PYTHON = (sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
      cpu_seconds: processor time of each of its processes.
      wall_seconds: from the start of the interpreter to the end.
      memory_bytes: address space of each process; Python takes about 30 MB of it.
      processes: processes and threads at one time, itself included.
      file_bytes: of its folder as a whole.
      output_bytes: of standard output and standard error together.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2**29
    processes: int = 4
    file_bytes: int = 2**24
    output_bytes: int = 2**16

    def __post_init__(self) -> None:
        _checks.at_least(1, self, "cpu_seconds", "processes", "output_bytes")
        _checks.require(0 < self.wall_seconds < float("inf"), "wall_seconds", self.wall_seconds, "a positive number")
        _checks.at_least(2**26, self, "memory_bytes")
        _checks.at_least(2**12, self, "file_bytes")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      status: "ok", it ended with exit status 0; "error", with another, as by an exception; "timeout", it reached a
        limit of time; "memory", a MemoryError ended it; "output", it wrote too much; "killed", a signal ended it. It is
        what the program makes of itself: one that ends with status 0 need not have run to its end.
      stdout, stderr: what it wrote until then, at most `Limits.output_bytes` together; not UTF-8 becomes U+FFFD.
      exit_code: its exit status, minus the signal that ended it, or None where we ended it.
    """

    status: Status
    stdout: str
    stderr: str
    exit_code: int | None


@dataclasses.dataclass(frozen=True)
class Isolation:
    """Whether this machine can lock a program in, and how; or else what is missing, as one clause."""

    available: bool
    detail: str


def run(program: str, limits: Limits | None = None, *, stdin: bytes = b"", unsafe: bool = False) -> Outcome:
    """Runs a Python program to its end or to its limits.

    Args:
      program: source text; it runs as `__main__`, with the standard library alone.
      limits: default `Limits()`.
      stdin: its standard input.
      unsafe: run it even where nothing can be isolated, and then never isolate: a separate process with the same
        limits (but of processes 256 more than we have, and for root none at all), the filter of system calls, an
        empty environment and a temporary folder. It can read and write what we can, and what it leaves running may
        stay.

    Raises:
      FeedbackError: this machine cannot isolate a program and `unsafe` is not set, or the sandbox could not be set up.
    """
    require(unsafe=unsafe)
    return _run(program, limits or Limits(), stdin, isolate=not unsafe)


def require(*, unsafe: bool) -> None:
    """Raises a FeedbackError that names what is missing where `run` would refuse."""
    if sys.platform != "linux":
        raise FeedbackError(f"Code written by a model is run on Linux alone, and this is {sys.platform}.")
    if not (unsafe or isolation().available):
        missing = isolation().detail
        raise FeedbackError(
            f"Code written by a model is run only in isolation, which this machine does not give ({missing}); "
            f"use a Linux machine where user namespaces are allowed, or root with the capability SYS_ADMIN, or set "
            f"'unsafe' to run it with nothing but limits on its resources."
        )


@functools.cache
def isolation() -> Isolation:
    """What this machine can give, as a probe finds that tries to break out; asked once per process."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder, "secret")
        secret.write_text("secret", encoding="utf-8")
        os.chmod(folder, 0o755)
        facts = {"secret": str(secret), "port": listener.getsockname()[1]}
        try:
            program = f"FACTS = {facts!r}\n{_PROBE}"
            outcome = _run(program, Limits(processes=2), b"", isolate=True)
        except FeedbackError as error:
            return Isolation(False, str(error))
    if outcome.status != "ok":
        return Isolation(False, f"a probe did not run: {outcome.stderr.strip()[-200:] or outcome.status}")
    if outcome.stdout != "\n":
        return Isolation(False, f"a probe got out: {outcome.stdout.strip()}")
    user = "of root" if os.geteuid() == 0 else "of a user"
    calls = "with" if _filter() else "without"
    return Isolation(True, f"namespaces {user}, {calls} a filter of system calls")


# Prints the names of the things that it could do and should not have been able to.
_PROBE = """
import os, socket, time

def fork():
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)

attempts = {
    "it read a file": lambda: open(FACTS["secret"]),
    "it saw /proc": lambda: os.listdir("/proc"),
    "it wrote outside its folder": lambda: open("/written", "w"),
    "it reached a listener": lambda: socket.create_connection(("127.0.0.1", FACTS["port"]), timeout=5),
    "it started too many processes": fork,
    "it became root": lambda: os.setuid(0),
}
# What it may do: write a file, and start one process besides itself.
open("mine", "w").close()
fork()
out = []
for name, attempt in attempts.items():
    try:
        attempt()
        out.append(name)
    except OSError:
        pass
print(", ".join(out))
"""


def _run(program: str, limits: Limits, stdin: bytes, *, isolate: bool) -> Outcome:
    code = _filter()
    order = {
        "program": program,
        "limits": dataclasses.asdict(limits),
        "tasks": _tasks(limits.processes, isolate),
        "isolate": isolate,
        "layout": _layout() if isolate else None,
        "filter": None if code is None else code.hex(),
    }
    text = json.dumps(order).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _supervise(len(text).to_bytes(8, "big") + text + stdin, limits, folder)


def _tasks(processes: int, isolate: bool) -> int:
    """How many tasks the kernel shall grant to the user that a program runs as."""
    if isolate:
        # A sandbox has its own count, in which the launcher's process 1 is, and its first too if it is not root's.
        return processes + (1 if os.geteuid() == 0 else 2)
    # All tasks of ours count. Others of us may start more at the same time, so this only stops a flood.
    return _tasks_of_ours() + 256


def _tasks_of_ours() -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.geteuid():
                count += len(os.listdir(process / "task"))
        except OSError:
            # It has ended in the meantime.
            continue
    return count


def _supervise(given: bytes, limits: Limits, folder: str) -> Outcome:
    """Feeds the launcher, collects what is written up to the limit, and ends everything in the end."""
    deadline = time.monotonic() + limits.wall_seconds
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as report:
        try:
            process = subprocess.Popen(
                [*_PYTHON, _launcher.__file__, str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder,
                env=_ENVIRONMENT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        with process:
            assert process.stdin and process.stdout and process.stderr
            try:
                texts, cut = _exchange(process.stdin, given, [process.stdout, process.stderr, report], limits, deadline)
            finally:
                # It is not yet waited for, so the group's number is still its own.
                os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr, told = texts
    message = json.loads(told.splitlines()[0]) if told else {}
    if "failure" in message:
        raise FeedbackError(f"the sandbox could not be set up: {message['failure']}")
    status, exit_code = (cut, None) if cut else _status(message, limits)
    return Outcome(status, stdout.decode(errors="replace"), stderr.decode(errors="replace"), exit_code)


def _exchange(
    stdin: IO[bytes], given: bytes, sources: list[IO[bytes]], limits: Limits, deadline: float
) -> tuple[list[bytes], Status | None]:
    """Writes `given` and reads all sources to their ends, or until a limit: its status is the second result.

    The last source is the report, which is ours and does not count as output.
    """
    texts = {source: bytearray() for source in sources}
    with selectors.DefaultSelector() as selector:
        os.set_blocking(stdin.fileno(), False)
        selector.register(stdin, selectors.EVENT_WRITE)
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        cut: Status | None = None
        while selector.get_map() and cut is None:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready or time.monotonic() > deadline:
                cut = "timeout"
            for key, _ in ready:
                pipe: Any = key.fileobj
                if pipe is stdin:
                    given = _write(pipe, given)
                    finished = not given
                else:
                    part = os.read(pipe.fileno(), 2**16)
                    texts[pipe] += part
                    finished = not part
                if finished:
                    selector.unregister(pipe)
                    if pipe is stdin:
                        pipe.close()
            if sum(len(texts[source]) for source in sources[:-1]) > limits.output_bytes:
                cut = "output"
    excess = sum(len(texts[source]) for source in sources[:-1]) - limits.output_bytes
    for source in reversed(sources[:-1]):
        dropped = min(max(excess, 0), len(texts[source]))
        del texts[source][len(texts[source]) - dropped :]
        excess -= dropped
    return [bytes(texts[source]) for source in sources], cut


def _write(pipe: IO[bytes], given: bytes) -> bytes:
    """What is left to write; nothing where the program does not read it."""
    try:
        return given[os.write(pipe.fileno(), given[: 2**16]) :]
    except BrokenPipeError:
        return b""


def _status(message: Mapping[str, Any], limits: Limits) -> tuple[Status, int | None]:
    code = message.get("code")
    if code is None:
        return "killed", None
    if code == 0:
        return "ok", code
    if code == _launcher.OUT_OF_MEMORY:
        return "memory", code
    if code > 0:
        return "error", code
    late = -code == signal.SIGXCPU or message["cpu_seconds"] >= limits.cpu_seconds
    return ("timeout" if late else "killed"), code


@functools.cache
def _layout() -> dict[str, Any]:
    """What the sandbox shows of this machine, see `_layout.py`."""
    script = Path(_launcher.__file__).with_name("_layout.py")
    done = subprocess.run([*_PYTHON, str(script)], env=_ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        raise FeedbackError(f"Python's standard library could not be found: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout)


def _filter() -> bytes | None:
    return _seccomp.bpf(platform.machine())
