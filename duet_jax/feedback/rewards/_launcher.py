"""Locks itself in and runs one program: the inside of `sandbox`, a script that imports the standard library alone.

Three processes: the first enters new namespaces; the second, process 1 in there, builds the file system, gives up
every privilege and waits; the third sets its limits and runs the program. When process 1 ends, for whatever reason,
the kernel ends all that the program started. Nothing is executed after the start, so the sandbox needs no binaries.

The command line is `_launcher.py REPORT`, a file descriptor that gets one line of JSON: `{"failure": text}` if the
sandbox could not be set up, or `{"code": int, "cpu_seconds": float}` once the program has ended, with minus the signal
as the code of one that was killed. Standard input is the order (see `read_order`), then the program's own input.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

# Not of typing: every import is paid once per program.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

OUT_OF_MEMORY = 86
WORK = "/sandbox"
_HOST = "/.host"
# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_REC, _PRIVATE = 16384, 1 << 18
_DETACH = 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS, _SECCOMP_FILTER = 1, 4, 22, 38, 2
# Far above the users of any machine. Processes are counted by user, so every sandbox of root's gets one to itself.
_FIRST_USER = 0x50000000

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step of setting up did not work."""


def read_order() -> dict[str, Any]:
    """The order: its length in 8 bytes, then JSON. Read without a buffer, as what follows is the program's."""
    return json.loads(_read(int.from_bytes(_read(8), "big")))


def main(report: int) -> None:
    order = read_order()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Nothing outlives the caller.
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    identity = _FIRST_USER + os.getpid()
    try:
        if order["isolate"]:
            _enter_namespaces()
        init = os.fork()
    except (OSError, SetupError) as error:
        _fail(report, error)
    if init == 0:
        _init(order, identity, report)
    # It is not there to wait for before all that the program started is gone.
    os.waitpid(init, 0)


def _init(order: dict[str, Any], identity: int, report: int) -> NoReturn:
    """Process 1: builds what the program sees, starts it, reports how it ended and so ends the rest."""
    try:
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if order["isolate"]:
            _build_root(order["layout"], order["limits"]["file_bytes"], identity)
            _drop_privileges(identity)
            # A change of user forgets it.
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        program = os.fork()
    except (OSError, SetupError) as error:
        _fail(report, error)
    if program == 0:
        _program(order, report)
    ended = 0
    while ended != program:
        ended, status, usage = os.wait4(-1, 0)
    code = os.waitstatus_to_exitcode(status)
    _tell(report, {"code": code, "cpu_seconds": usage.ru_utime + usage.ru_stime})
    if not order["isolate"]:
        # No kernel does it for us; what has left the process group stays.
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _program(order: dict[str, Any], report: int) -> NoReturn:
    """Becomes the program: a fresh interpreter, whose `__main__` it is, that ends with a status of its own for the lack
    of memory."""
    try:
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if order["isolate"]:
            # Out of the process group of the host, or kill(0, ...) would reach the launcher there.
            os.setsid()
        _prctl(_SET_NO_NEW_PRIVS, 1)
        # No process of the same user may look into its memory, nor those that it starts into each other's.
        _prctl(_SET_DUMPABLE, 0)
        _set_limits(order["limits"], order["tasks"])
        if order["filter"] is not None:
            _filter(bytes.fromhex(order["filter"]))
    except (OSError, SetupError, ValueError) as error:
        _fail(report, error)
    os.close(report)
    os.environ.clear()
    sys.argv = ["program.py"]
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(order["program"], "program.py", "exec"), module.__dict__)
    except MemoryError:
        sys.__excepthook__(*sys.exc_info())
        sys.exit(OUT_OF_MEMORY)
    sys.exit(0)


def _enter_namespaces() -> None:
    """Needs the capability SYS_ADMIN, or else the right to create a user namespace, in which one has it."""
    flags = _NEW_NS | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", flags)
        return
    _call("unshare", flags | _NEW_USER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _build_root(layout: dict[str, Any], file_bytes: int, identity: int) -> None:
    """A new root in memory that has Python's library, read-only, and a folder of the program's own."""
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m,nr_inodes=8192")
    os.umask(0o022)
    os.mkdir(f"/tmp{_HOST}")
    _call("pivot_root", b"/tmp", f"/tmp{_HOST}".encode())
    os.chdir("/")
    for path in layout["folders"]:
        os.makedirs(path, exist_ok=True)
        _bind(path)
    for path in layout["files"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        _bind(path)
    for path, target in layout["links"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(path):
            os.symlink(target, path)
    for path in layout["hidden"]:
        _mount("tmpfs", path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "mode=755,size=4k")
    os.mkdir("/dev")
    for name in ("null", "zero", "urandom"):
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"{_HOST}/dev/{name}", f"/dev/{name}", None, _BIND)
    os.mkdir(WORK)
    _mount("tmpfs", WORK, "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"mode=700,size={file_bytes},nr_inodes=1024")
    if os.geteuid() == 0:
        os.chown(WORK, identity, identity)
    _call("umount2", _HOST.encode(), _DETACH)
    os.rmdir(_HOST)
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(WORK)
    _call("sethostname", b"sandbox", 7)


def _bind(path: str) -> None:
    """Shows a folder or file of the host at its own place, read-only."""
    _mount(f"{_HOST}{path}", path, None, _BIND | _REC)
    # What the host's mount forbids must be forbidden again, or the kernel refuses.
    kept = os.statvfs(path).f_flag & (_NOSUID | _NODEV | _NOEXEC)
    _mount(None, path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)


def _drop_privileges(identity: int) -> None:
    """Becomes an ordinary user without capabilities."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    # struct __user_cap_header_struct (version 3, this process) and two empty __user_cap_data_struct
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def _set_limits(limits: dict[str, Any], tasks: int) -> None:
    cpu = limits["cpu_seconds"]
    bounds = {
        # The first ends it with a signal that says why; the second cannot be caught.
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NPROC: (tasks,) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        # RLIMIT_MSGQUEUE, which the module has no name for.
        12: (0, 0),
    }
    for limit, (soft, hard) in bounds.items():
        ceiling = resource.getrlimit(limit)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(limit, (soft, hard))


def _filter(code: bytes) -> None:
    """Installs a seccomp filter; `code` is an array of struct sock_filter."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code) // 8, code)
    _prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.addressof(program))


def _prctl(option: int, *values: int) -> None:
    _call("prctl", option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]), what=f"prctl {option}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], what=f"mount {target}")


def _call(name: str, *arguments: Any, what: str = "") -> None:
    """A function of the C library that returns 0, or -1 and sets errno."""
    function = getattr(_libc, name, None)
    if function is None:
        raise SetupError(f"{name}: the C library does not have it")
    if function(*arguments) != 0:
        raise SetupError(f"{what or name}: {os.strerror(ctypes.get_errno())}")


def _read(count: int) -> bytes:
    parts = []
    while count > 0:
        part = os.read(0, count)
        if not part:
            raise EOFError("The order is not complete.")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _tell(report: int, message: dict[str, Any]) -> None:
    os.write(report, json.dumps(message).encode() + b"\n")


def _fail(report: int, error: Exception) -> NoReturn:
    _tell(report, {"failure": str(error)})
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
