"""Programs that try to get out of the sandbox, to see more than they should, or to use more than they may."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from duet_jax.feedback.rewards import _seccomp, sandbox
from duet_jax.feedback.rewards.sandbox import Limits, Outcome

isolated = pytest.mark.skipif(
    not sandbox.isolation().available, reason=f"no isolation on this machine: {sandbox.isolation().detail}"
)


def run(program: str, **options: Any) -> Outcome:
    limits = Limits(**{"wall_seconds": 30.0, **options})
    return sandbox.run(textwrap.dedent(program), limits)


def refused(statement: str, imports: str = "os") -> str:
    """The name of the error that a statement ends with in the sandbox; empty where it does not."""
    program = f"import {imports}\ntry:\n    {statement}\nexcept Exception as error:\n    print(type(error).__name__)\n"
    outcome = run(program)
    assert outcome.status == "ok", outcome
    return outcome.stdout.strip()


def alive(marker: str) -> list[int]:
    """Processes of this machine, of whichever namespace, that gave themselves the marker as their name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text(encoding="utf-8").strip() == marker:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def gone(marker: str, seconds: float = 10.0) -> bool:
    """Whether no such process is there, or none is soon: killing takes the kernel a moment."""
    end = time.monotonic() + seconds
    while alive(marker) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(marker)


# Sets the name under which `alive` finds a process: PR_SET_NAME.
NAMED = "import ctypes; ctypes.CDLL(None).prctl(15, {!r}, 0, 0, 0)\n"


@isolated
class TestOrdinaryPrograms:
    def test_output_errors_and_exit_status_come_back(self) -> None:
        assert run("print('out')") == Outcome("ok", "out\n", "", 0)
        outcome = run("import sys; print('é', file=sys.stderr); sys.exit(3)")
        assert outcome == Outcome("error", "", "é\n", 3)
        outcome = run("def f():\n    raise ValueError('why')\nf()")
        assert outcome.status == "error" and outcome.exit_code == 1
        assert outcome.stderr.endswith("ValueError: why\n") and 'program.py", line 2, in f' in outcome.stderr

    def test_standard_input_larger_than_a_pipe_arrives_whole(self) -> None:
        given = bytes(range(256)) * 2**12
        program = "import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
        assert sandbox.run(program, stdin=given).stdout.strip() == hashlib.sha256(given).hexdigest()
        assert sandbox.run("print('did not read')", stdin=given).status == "ok"

    def test_it_is_main_and_the_folder_is_its_own(self) -> None:
        program = """
            import os, pathlib, sys
            pathlib.Path("mine").write_text("kept")
            print(__name__, os.getcwd(), os.listdir(), pathlib.Path("mine").read_text(), sys.argv)
        """
        assert run(program).stdout == "__main__ /sandbox ['mine'] kept ['program.py']\n"
        # Another run has another folder.
        assert run("import os; print(os.listdir())").stdout == "[]\n"

    def test_the_whole_standard_library_loads(self) -> None:
        program = """
            import bz2, ctypes, decimal, hashlib, json, lzma, multiprocessing, sqlite3, ssl, tempfile, unittest, zlib
            import dataclasses, numbers, typing
            print(hashlib.sha256(b"").hexdigest()[:8], sqlite3.connect(":memory:").execute("select 1").fetchone())
            tempfile.TemporaryFile()
        """
        assert run(program).stdout == "e3b0c442 (1,)\n"

    def test_sets_come_in_the_same_order_in_every_run(self) -> None:
        assert len({run("print({str(i) for i in range(9)})").stdout for _ in range(3)}) == 1

    def test_no_package_can_be_imported(self) -> None:
        for name in ("numpy", "pip", "duet_jax", "pytest"):
            assert refused(f"import {name}") == "ModuleNotFoundError"


@isolated
class TestSecrets:
    def test_no_file_of_the_host_is_there(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("secret", encoding="utf-8")
        os.chmod(secret, 0o666)
        for path in (secret, __file__, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ", "/bin/sh"):
            assert refused(f"open({str(path)!r})") == "FileNotFoundError"
        top = run("import os; print(os.listdir('/'), os.path.exists('/.host'))").stdout
        assert not {"home", "proc", "sys", "tmp", "bin", "var"} & set(top.split("'"))
        assert top.endswith("False\n")

    def test_nothing_but_libraries_and_devices_is_visible(self) -> None:
        program = """
            import os
            for folder, _, names in os.walk("/"):
                paths = [os.path.join(folder, name) for name in names]
                print(*(path for path in paths if not os.path.islink(path)), sep="\\n")
        """
        library = os.path.dirname(os.path.realpath(os.__file__))
        seen = run(program, output_bytes=2**24).stdout.split("\n")
        outside = {path for path in seen if path and not path.startswith(library)}
        assert len(seen) > 500
        assert {path for path in outside if ".so" not in path} == {"/dev/null", "/dev/zero", "/dev/urandom"}
        assert not [path for path in seen if "site-packages" in path or "dist-packages" in path]

    def test_the_environment_is_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_KEY", "secret")
        assert run("import os; print(dict(os.environ))").stdout == "{}\n"
        outcome = run("import ctypes; f = ctypes.CDLL(None).getenv; f.restype = ctypes.c_char_p; print(f(b'API_KEY'))")
        assert outcome.stdout == "None\n"

    def test_no_descriptor_but_the_three_is_open(self) -> None:
        with open(__file__, "rb") as file:
            os.set_inheritable(file.fileno(), True)
            program = """
                import os
                def is_open(number):
                    try:
                        return os.fstat(number) is not None
                    except OSError:
                        return False
                print([number for number in range(256) if is_open(number)])
            """
            assert run(program).stdout == "[0, 1, 2]\n"

    def test_the_host_has_no_name_and_no_processes(self) -> None:
        program = "import os, platform; print(platform.node(), os.getppid(), os.getuid() == 0)"
        outcome = run(program)
        assert outcome.stdout == ("sandbox 1 False\n")


@isolated
class TestNetwork:
    def test_no_socket_reaches_a_listener(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            listener.settimeout(0.2)
            assert refused(f"socket.create_connection(('127.0.0.1', {port}), timeout=5)", "socket").endswith("Error")
            with pytest.raises(TimeoutError):
                listener.accept()

    def test_the_namespace_alone_would_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_seccomp, "bpf", lambda machine: None)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            program = f"import socket\nprint(socket.if_nameindex())\nsocket.create_connection(('127.0.0.1', {port}))"
            outcome = run(program)
        assert outcome.stdout == "[(1, 'lo')]\n" and outcome.stderr.strip().endswith("Network is unreachable")


@isolated
class TestWrites:
    def test_nothing_can_be_written_outside_of_the_folder(self) -> None:
        for path in ("/written", "/tmp/written", "/dev/written", os.path.join(os.path.dirname(os.__file__), "os.py")):
            assert refused(f"open({path!r}, 'w')") in ("OSError", "PermissionError", "FileNotFoundError")
        assert refused("os.mkdir('/sandbox/../made')") in ("OSError", "PermissionError")
        assert refused("os.chmod('/', 0o777)") in ("OSError", "PermissionError")

    def test_a_file_and_a_folder_are_no_larger_than_the_limit(self) -> None:
        program = """
            import errno
            def fill(name):
                with open(name, "wb", buffering=0) as file:
                    total = 0
                    try:
                        while True:
                            total += file.write(bytes(2**16))
                    except OSError as error:
                        print(total, errno.errorcode[error.errno])
            fill("first"); fill("second")
        """
        outcome = run(program, file_bytes=2**20)
        assert outcome.stdout == f"{2**20} EFBIG\n0 ENOSPC\n"

    def test_files_without_end_are_refused(self) -> None:
        program = "for i in range(10**6):\n    open(str(i), 'w').close()"
        assert "No space left" in run(program, cpu_seconds=20).stderr

    def test_endless_output_is_cut(self) -> None:
        for stream in (1, 2):
            outcome = run(f"import os\nwhile True: os.write({stream}, b'x' * 65536)", output_bytes=100_000)
            assert outcome.status == "output" and outcome.exit_code is None
            assert len(outcome.stdout) + len(outcome.stderr) == 100_000

    def test_closed_and_doubled_descriptors_do_not_hold_the_caller(self) -> None:
        program = """
            import os
            for number in range(3, 60):
                os.dup2(1, number)
            os.close(0); os.close(1); os.close(2)
            os._exit(5)
        """
        assert run(program) == Outcome("error", "", "", 5)


@isolated
class TestResources:
    def test_an_endless_loop_ends_at_the_limit_of_cpu_time(self) -> None:
        outcome = run("while True: pass", cpu_seconds=1)
        assert (outcome.status, outcome.exit_code) == ("timeout", -signal.SIGXCPU)

    def test_ignoring_the_signal_gains_a_second(self) -> None:
        program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        outcome = run(program, cpu_seconds=1)
        assert (outcome.status, outcome.exit_code) == ("timeout", -signal.SIGKILL)

    def test_waiting_ends_at_the_limit_of_wall_time_and_keeps_the_output(self) -> None:
        begin = time.monotonic()
        outcome = run("import time; print('begun', flush=True); time.sleep(60)", wall_seconds=3.0)
        assert outcome == Outcome("timeout", "begun\n", "", None)
        assert time.monotonic() - begin < 30

    def test_a_memory_hog_is_told_so(self) -> None:
        assert run("x = bytearray(2**30)", memory_bytes=2**28).status == "memory"
        assert run("x = []\nwhile True: x.append(bytearray(2**20))", memory_bytes=2**27).status == "memory"
        # A program that handles it goes on.
        assert run("try:\n    bytearray(2**40)\nexcept MemoryError:\n    print('handled')").stdout == "handled\n"

    @pytest.mark.skipif(_seccomp.bpf(os.uname().machine) is None, reason="no filter is written for this machine")
    def test_memory_that_no_limit_counts_is_refused(self) -> None:
        assert refused("os.memfd_create('x')") == "PermissionError"
        program = """
            import ctypes, os
            libc = ctypes.CDLL(None, use_errno=True)
            print(libc.shmget(0, ctypes.c_size_t(2**20), 0o1600), os.strerror(ctypes.get_errno()))
        """
        assert run(program).stdout == "-1 Operation not permitted\n"

    def test_a_fork_bomb_stays_within_the_limit(self) -> None:
        program = """
            import os, time
            first = os.getpid()
            reading, writing = os.pipe()
            for _ in range(300):
                try:
                    if os.fork() == 0:
                        os.write(writing, b".")
                except BlockingIOError:
                    continue
            if os.getpid() == first:
                time.sleep(1)
                print(len(os.read(reading, 10**6)))
            else:
                time.sleep(60)
        """
        # The program itself is the sixth; all of them tried to become more.
        assert run(program, processes=6) == Outcome("ok", "5\n", "", 0)

    def test_threads_count_as_processes(self) -> None:
        program = """
            import threading, time
            threads = [threading.Thread(target=time.sleep, args=(1,), daemon=True) for _ in range(20)]
            started = 0
            try:
                for thread in threads:
                    thread.start()
                    started += 1
            except RuntimeError:
                print(started)
        """
        assert run(program, processes=4).stdout == "3\n"


@isolated
class TestProcesses:
    def test_no_daemon_stays_behind(self) -> None:
        marker = f"dm{os.getpid()}"
        program = NAMED.format(marker.encode()) + textwrap.dedent("""
            import os, signal, time
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for number in range(1, 32):
                        try:
                            signal.signal(number, signal.SIG_IGN)
                        except OSError:
                            pass
                    for number in range(3):
                        os.close(number)
                    time.sleep(300)
                os._exit(0)
            time.sleep(0.3)
        """)
        assert run(program).status == "ok"
        assert gone(marker)

    def test_at_the_deadline_all_are_ended(self) -> None:
        marker = f"dl{os.getpid()}"
        program = NAMED.format(marker.encode()) + "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(300)"
        assert run(program, wall_seconds=3.0).status == "timeout"
        assert gone(marker)

    def test_the_parents_cannot_be_killed(self) -> None:
        program = """
            import os, signal
            for target in (1, 0, -1, os.getppid(), -os.getppid()):
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                    try:
                        os.kill(target, number)
                    except OSError:
                        pass
            try:
                os.kill(1, signal.SIGKILL)
            except OSError:
                pass
            print("still here")
        """
        assert run(program) == Outcome("ok", "still here\n", "", 0)

    def test_every_process_id_of_the_host_is_out_of_reach(self) -> None:
        ours = os.getpid()
        program = f"""
            import os
            for target in ({ours}, {os.getppid()}):
                if target > 10:
                    try:
                        os.kill(target, 9)
                        print("killed")
                    except ProcessLookupError:
                        print("not there")
        """
        assert "killed" not in run(program).stdout

    def test_a_signal_that_ends_it_is_told(self) -> None:
        outcome = run("import os; os.kill(os.getpid(), 9)")
        assert (outcome.status, outcome.exit_code) == ("killed", -9)
        assert run("import ctypes; ctypes.string_at(1)").exit_code == -signal.SIGSEGV
        assert run("import os; os.abort()").exit_code == -signal.SIGABRT

    @pytest.mark.skipif(_seccomp.bpf(os.uname().machine) is None, reason="no filter is written for this machine")
    def test_new_namespaces_mounts_and_tracing_are_refused(self) -> None:
        program = """
            import ctypes, os
            libc = ctypes.CDLL(None, use_errno=True)
            print(libc.unshare(0x10000000), libc.mount(b"t", b"/sandbox", b"tmpfs", 0, None), libc.ptrace(0, 0, 0, 0))
            # clone(CLONE_NEWUSER | SIGCHLD), and clone3, which is said not to exist
            number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
            print(libc.syscall(ctypes.c_long(number), 0x10000011, 0, 0, 0, 0), os.strerror(ctypes.get_errno()))
            print(libc.syscall(ctypes.c_long(435), None, 0), os.strerror(ctypes.get_errno()))
        """
        assert run(program).stdout == ("-1 -1 -1\n-1 Operation not permitted\n-1 Function not implemented\n")

    def test_no_privilege_can_be_regained(self) -> None:
        for statement in ("os.setuid(0)", "os.setgroups([0])", "os.chroot('/')", "os.chown('/sandbox', 0, 0)"):
            assert refused(statement) in ("PermissionError", "OSError")

    def test_it_ends_with_the_process_that_asked(self) -> None:
        marker = f"or{os.getpid()}"
        program = NAMED.format(marker.encode()) + "import time; time.sleep(300)"
        caller = (
            "from duet_jax.feedback.rewards import sandbox\n"
            f"sandbox.run({program!r}, sandbox.Limits(wall_seconds=300.0))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", caller])
        try:
            end = time.monotonic() + 60
            while not alive(marker):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        assert gone(marker)
