"""Property tests give the same examples on every run, and take the time they need on a busy machine.

Programs of tests run for milliseconds and compile for seconds, most of which goes into making them fast. XLA is told
not to, unless XLA_FLAGS is set (empty is enough): LLVM optimises nothing, which takes a third of the time, and where
jaxlib still has the older emitters, they write the loops of programs in a quarter of what remains.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    # Later ones do not know the flag, and end the process that has it.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("duet", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("duet")


def pytest_configure(config: pytest.Config) -> None:
    """What one module, worker, process or run of the tests has compiled, the others need not compile again."""
    assert config.cache is not None
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        # Seconds: reading a program takes about a quarter of compiling it, which pays for all but the smallest.
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program holds some of the mappings that a process may have; those of all tests are too many."""
    yield
    jax.clear_caches()


@pytest.fixture
def kill_at_random() -> Callable[[Callable[[str], Any], Callable[[], int], int], int]:
    """Four workers at a time, of which one is killed after some more logged lines, until all have ended well.

    Given are how a worker of a name is started, the lines that are logged so far, and the most of them until the next
    kill. Gives the number of kills.
    """

    def run(start: Callable[[str], Any], logged: Callable[[], int], most: int) -> int:
        rng, alive = random.Random(0), [start(name) for name in "abcd"]
        kills, moment, deadline = 0, 5, time.monotonic() + 200
        while any(worker.is_alive() for worker in alive):
            assert time.monotonic() < deadline
            time.sleep(0.001)
            slot = rng.randrange(4)
            if logged() >= moment and alive[slot].is_alive():
                alive[slot].kill()
                alive[slot].join()
                kills, moment = kills + 1, logged() + rng.randrange(2, most)
                # Some come back, and in place of some another one comes.
                alive[slot] = start(alive[slot].name if kills % 2 else f"w{kills}")
        assert [worker.exitcode for worker in alive] == [0] * 4
        return kills

    return run


# An S3 server. One request after the other: moto looks at a condition and writes in two steps, between which a real
# server lets nobody else in.
SERVER = """
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, application, threaded=False, request_handler=MotoRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    for package in ("obstore", "moto", "flask_cors"):
        pytest.importorskip(package)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty place in a bucket, for which the environment is right."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with urlopen(Request(f"{s3_server}/bucket", method="PUT")):
        return f"s3://bucket/{tmp_path.parent.name}-{tmp_path.name}/study"


def _arrays(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _arrays(inner)


@pytest.fixture
def arrays() -> Callable[[Any], Iterator[Any]]:
    """Gives shape and type of every array that a program makes, in its inner programs too."""
    return _arrays
