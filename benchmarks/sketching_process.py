"""What the processes that `sketching_peers.py` starts have in common; the standard library alone.

Each reads one JSON request from standard input and answers one line of JSON, with what it needed from start to end.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Meter:
    """Wall and CPU seconds of a block, and the peak of the process's resident memory meanwhile, in GB."""

    highest = 0.0  # of the process, before the peak was last reset

    def __enter__(self) -> Meter:
        Meter.highest = max(Meter.highest, _peak_gb())
        # Where the peak cannot be reset, it is that of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: Any) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.process_time() - self._cpu
        self.peak_gb = _peak_gb()

    def report(self) -> dict[str, float]:
        return {"wall_s": self.wall_s, "cpu_s": self.cpu_s, "work_gb": self.peak_gb}


def _peak_gb() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rate(operations: float, run: Callable[[], Any], repeats: int = 15) -> float:
    """Median of operations per CPU second: on a shared machine, wall seconds would say what the others leave."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return operations / sorted(seconds)[repeats // 2]


def answer(tasks: Mapping[str, Callable[[dict], dict]]) -> None:
    """Does what the request names, and prints what it found."""
    request = json.load(sys.stdin)
    # Libraries print as well: only the answer goes to standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = tasks[request["task"]](request)
    found |= {"process_gb": max(Meter.highest, _peak_gb()), "process_cpu_s": time.process_time()}
    print(json.dumps(found), file=out, flush=True)
