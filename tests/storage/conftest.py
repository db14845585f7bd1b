"""An S3 server in a process of its own, and a storage of each kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from duet_jax.storage import Folder, Storage, at

# One request after the other: moto looks at a condition and writes in two steps, between which a real server lets
# nobody else in.
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


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object store in this process."""
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return MemoryStore()


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, Storage]:
    """One storage as two processes see it."""
    if request.param == "folder":
        return Folder(tmp_path / "study"), Folder(tmp_path / "study")
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        return at(address), at(address + "/")
    store = request.getfixturevalue("memory")

    from duet_jax.storage.objects import Objects

    return Objects(store, "memory"), Objects(store, "memory")
