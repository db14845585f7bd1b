"""One run as several processes: each holds some of the devices, and all run the same programs over all of them.

They must take the same path through the program. What depends on files, clocks or chance outside of it is therefore
done by the first process alone and its outcome, a value or an error, is told to the others (`lead`): so the first one
alone writes, too. Nothing here does anything before `start`; where there is one process, `lead` is a plain call.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from duet_jax.errors import ConfigError, DuetError, StudyError

# Seconds until all processes must have met, after which one that is silent counts as dead, and that one that ends
# waits for the others.
MEET, SILENCE, LEAVE = 180, 60, 30
# Exit status of a process that lost another one.
LOST = 3
# Bytes that are told at once; longer news takes a second message.
BLOCK = 4096

Given = ParamSpec("Given")
Value = TypeVar("Value")

_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|Connection (?:reset|closed)", re.IGNORECASE)
_steps = itertools.count()
_alone = _deferring = _told = False


class Stopped(KeyboardInterrupt):
    """The run was told to end (SIGTERM), and everything that it has earned is kept."""


def start(cluster: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to those of its run, and from now on lets SIGTERM end it in good order.

    Args:
      cluster: "auto" where the environment says who they are (TPU pods, SLURM, Open MPI, Kubernetes), or the
        HOST:PORT at which the first one is met; None: this process is the only one.
      processes: how many there are, with HOST:PORT.
      process: which one this is, from 0, with HOST:PORT.

    Raises:
      ConfigError: what is given does not go together, or the first process cannot listen there.
    """
    if cluster in (None, "auto"):
        for flag, value in (("--processes", processes), ("--process", process)):
            if value is not None:
                raise ConfigError(f"{flag} goes with --cluster HOST:PORT; give that, or leave {flag} out.")
    global _told
    _told = False
    if cluster is None:
        _listen()
        return
    if cluster != "auto":
        _check(cluster, processes, process)
    where = "as the cluster's environment says" if cluster == "auto" else f"at {cluster}"
    # JAX aborts with a trace of its own, a little later.
    late = f"the processes of this run did not all meet {where} in {MEET} s; start all of them, with the same address"
    timer = threading.Timer(MEET, _end, [late])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            None if cluster == "auto" else cluster,
            processes,
            process,
            initialization_timeout=MEET + LEAVE,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=LEAVE,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"--cluster {cluster}: the processes cannot be joined ({error}); on a TPU pod, under SLURM, Open MPI or "
            f"Kubernetes --cluster auto finds them, elsewhere give --cluster HOST:PORT --processes N --process I."
        ) from error
    finally:
        timer.cancel()
    if not several():
        # JAX has taken SIGTERM, but has nobody to tell.
        _listen()


@contextlib.contextmanager
def joined(cluster: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """`start`, and what is done inside is done `together`; at the end SIGTERM is whose it was before."""
    global _told
    before = signal.getsignal(signal.SIGTERM)
    start(cluster, processes, process)
    try:
        with together():
            yield
    finally:
        _told = False
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _listen() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def _check(address: str, processes: int | None, process: int | None) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--cluster is {address!r}; it must be auto, or HOST:PORT of the first process.")
    for flag, value in (("--processes", processes), ("--process", process)):
        if value is None:
            raise ConfigError(f"--cluster {address} needs {flag}; give --processes N, and --process I from 0 to N - 1.")
    assert processes is not None and process is not None
    if not 0 <= process < processes:
        raise ConfigError(f"--process is {process}; it must be from 0 to {processes - 1}, one below --processes.")
    if process == 0:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("", int(port)))
            except OSError as error:
                raise ConfigError(
                    f"--cluster {address}: this process cannot listen at port {port} ({error.strerror}); give another."
                ) from None


def _end(reason: str) -> NoReturn:
    print(f"duet: error: {reason}.", file=sys.stderr, flush=True)
    os._exit(LOST)


def first() -> bool:
    """Whether this process is the one that writes, decides and prints."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether other processes take part."""
    # To ask JAX for their number takes hold of the devices, which not every command needs.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lead(run: Callable[Given, Value], *args: Given.args, **kwargs: Given.kwargs) -> Value:
    """`run(*args, **kwargs)` by the first process alone; all get its value, or raise its error.

    Inside there must be nothing that several processes compute together, and nothing that waits for long: meanwhile no
    process hears SIGTERM. The value must be one that pickles.
    """
    if not several() or _alone:
        return run(*args, **kwargs)
    value: Any = None
    error: Exception | None = None
    if first():
        try:
            with _by_itself():
                value = run(*args, **kwargs)
        except Exception as raised:  # Told to all, and raised below.
            error = raised
    heard, failed = _hear(value, error)
    if error is not None:
        raise error
    if failed is not None:
        raise failed
    return value if first() else heard


@contextlib.contextmanager
def led(make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value | None]:
    """A context that the first process alone enters, as a lock; the others go on when it has, and get None."""
    with contextlib.ExitStack() as stack:
        entered: list[Value] = []
        lead(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None


def agree(error: BaseException | None, what: str) -> None:
    """Raises this process's error, or a StudyError if it has none and another one has; for all processes to call.

    Args:
      error: that kept this process from doing its part.
      what: all had to do, after the word "not".
    """
    failed = multihost_utils.process_allgather(np.array(error is not None)) if several() else np.zeros(1)
    if error is not None:
        raise error
    if failed.any():
        raise StudyError(f"Process {failed.argmax()} of {len(failed)} of this run could not {what}; it says why.")


def anywhere(holds: bool) -> bool:
    """Whether something holds on one process at least; for all processes to call."""
    return bool(multihost_utils.process_allgather(np.array(holds)).any()) if several() else holds


def shared(folder: Path) -> bool:
    """Whether all processes see one folder under this name, which is made where it is missing."""
    if not several():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    seen = lead(lambda: tempfile.mkdtemp(prefix=".seen-", dir=folder))
    try:
        return bool(multihost_utils.process_allgather(np.array((folder / Path(seen).name).exists())).all())
    finally:
        lead(os.rmdir, seen)


def require_shared(path: Path, advice: str = "give a folder of a file system they share") -> None:
    """Raises a StudyError on all processes if one does not see what the first one has made."""
    if several() and not multihost_utils.process_allgather(np.array(path.exists())).all():
        raise StudyError(f"{path} is not seen by all processes of this run; {advice}.")


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _hear(value: Any, error: Exception | None) -> tuple[Any, Exception | None]:
    """What the first process says."""
    content = pickle.dumps((value, _portable(error))) if first() else b""
    size = len(content).to_bytes(8, "little")
    head = np.frombuffer((size + content[: BLOCK - 8]).ljust(BLOCK, b"\0"), np.uint8)
    told = multihost_utils.broadcast_one_to_all(head).tobytes()
    length, told = int.from_bytes(told[:8], "little"), told[8:]
    rest = length - len(told)
    if rest > 0:
        # Few lengths, so few programs.
        padded = 1 << (rest - 1).bit_length()
        tail = np.frombuffer(content[BLOCK - 8 :].ljust(padded, b"\0"), np.uint8)
        told += multihost_utils.broadcast_one_to_all(tail).tobytes()
    return pickle.loads(told[:length])


def _portable(error: Exception | None) -> Exception | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # Whatever an exception of a library's has in it.
        return (ConfigError if isinstance(error, DuetError) else RuntimeError)(str(error))


def _on_signal(number: int, frame: Any) -> None:
    del number, frame
    global _told
    again, _told = _told, True
    # Launchers may tell it several times, and the end must not be cut off.
    if not (_deferring or again):
        raise Stopped


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Inside, SIGTERM is only noted: `stopping` says so, and the end of this block obeys."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before
    if _told and not _deferring:
        raise Stopped


def stopping() -> bool:
    """Whether a SIGTERM to any process ends the run here.

    All processes must ask equally often: JAX has them agree on the call at which they all hear yes.
    """
    if _alone or not several():
        return _told
    return multihost_utils.reached_preemption_sync_point(next(_steps))


def stop_if_told() -> None:
    """Raises `Stopped` where `stopping`; for loops whose finished parts are kept or soon made again."""
    if several() and stopping():
        raise Stopped


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What a whole run does inside ends on all processes, however it ends on one.

    An error that is not a mistake of input may be this process's alone; it ends at once, and so do those that wait for
    it, with status `LOST`.
    """
    try:
        yield
    except DuetError:
        raise
    except Exception as error:
        if not several():
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        reason = f"another process of this run has ended ({line})"
        if not _LOST.search(line):
            traceback.print_exc()
            reason = f"process {jax.process_index()} of {jax.process_count()} failed ({type(error).__name__}: {line})"
        _end(f"{reason}; what was trained until the last checkpoint is kept: start the same command again, on all")
