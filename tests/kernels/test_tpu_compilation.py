"""Every kernel goes through the real TPU compiler, which needs libtpu but no TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The third: two such compilers may run at a time, as no TPU is opened. The last: they compile as users' do.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_a_tpu(topology):
    script = Path(__file__).with_name("tpu_programs.py")
    done = subprocess.run(
        [sys.executable, script, topology], capture_output=True, text=True, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 11
    for program in found:
        assert program["kernels"] == 1 + ("head" in program["name"]), program
        assert program["temporary"] < program["forbidden"], program
