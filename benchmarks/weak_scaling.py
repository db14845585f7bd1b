"""How much of a chip's speed is left when a job grows: an estimate from compiled programs, nothing is run.

A job grows along `data`: more copies of the mesh's `fsdp x tensor` group, each with the rows that it has now, so that a
step trains on as many times more examples. The tables of `duet compile` in results/ say what one chip computes, reads
and sends in a step. Assumed is

  - that parameters are gathered and gradients scattered within a group, whose size stays: those bytes stay;
  - that all-reduces are those of gradients over `data`, by rings: of b bytes a chip sends 2 b (n - 1) / n, n = `data`,
    of which only the last factor grows, from what the table says;
  - products at the stated MFU, links at their published rates, both directions of one axis of the torus, no latency;
  - two bounds: what is sent is hidden behind computing wholly (`overlapped`), or not at all (`exposed`);
  - between slices only the all-reduce goes over the data centre's network, each host with the stated gigabytes a second
    in and out for its chips; it comes after the step, and is hidden by nothing.

Efficiency is the time of computing alone over the time of the step: a half means that twice as many chips are needed.

    python benchmarks/weak_scaling.py --output
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from search_common import HERE, parse, write

GROWTH = (1, 2, 4, 8, 16)
SLICES = (2, 4, 8)


def ring(bytes_: float, size: int) -> float:
    """Bytes that a chip sends to sum arrays over so many by a ring."""
    return 2 * bytes_ * (size - 1) / size


def grown(program: dict[str, Any], data: int, times: int) -> float:
    """Bytes that a chip sends in a step with `times` as many copies as the table's `data`."""
    collectives = program["collectives"]
    sent = sum(found["sent"] for found in collectives.values())
    if "all-reduce" not in collectives or data == 1:
        return sent
    reduced = collectives["all-reduce"]
    return sent + reduced["sent"] * ((data * times - 1) / (data * times) / ((data - 1) / data) - 1)


def estimate(table: dict[str, Any], program: dict[str, Any], host_rate: float, host_chips: int) -> dict[str, Any]:
    """Efficiencies of one program, as it grows within a slice and over several slices."""
    computing, reading = program["estimate"]["computing"], program["estimate"]["memory"]
    rate, data = 2 * table["chip"]["link_rate"], table["mesh"]["data"]
    inside = []
    for times in GROWTH:
        links = grown(program, data, times) / rate
        seconds = (max(computing, reading, links), max(computing, reading) + links)
        inside.append(
            {
                "chips": table["chips"] * times,
                "overlapped": computing / seconds[0],
                "exposed": computing / seconds[1],
            }
        )
    step = max(computing, reading, program["estimate"]["links"])
    reduced = program["collectives"].get("all-reduce", {"bytes": 0.0})["bytes"]
    across = [
        {
            "slices": slices,
            "seconds": ring(reduced, slices) * host_chips / host_rate,
            "overlapped": computing / (step + ring(reduced, slices) * host_chips / host_rate),
        }
        for slices in SLICES
    ]
    return {"program": program["program"], "rows": program["rows"], "slice": inside, "slices": across}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="*", help="of duet compile --output (default: results/aot_*.json)")
    parser.add_argument("--host-rate", type=float, default=12.5, help="gigabytes a second between hosts (default 12.5)")
    parser.add_argument("--host-chips", type=int, default=4, help="chips that share it (default 4)")
    options = parse(parser, "weak_scaling")
    found = []
    for path in options.tables or sorted((HERE / "results").glob("aot_*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        rank = f" r={table['rank']}" if table["rank"] else ""
        name = f"{table['model'].split('/')[-1]}, {table['method']}{rank}, {table['topology']}"
        for program in table["programs"]:
            if program["program"] not in ("train step", "sketch step"):
                continue
            row = estimate(table, program, options.host_rate * 1e9, options.host_chips)
            found.append({"job": name, "mesh": table["mesh"], "mfu": table["mfu"]} | row)
            inside = ", ".join(f"{x['chips']}: {x['overlapped']:.0%}/{x['exposed']:.0%}" for x in row["slice"])
            across = ", ".join(f"{x['slices']}: {x['overlapped']:.0%}" for x in row["slices"])
            print(f"{name}, {row['program']}: chips {inside}; slices {across}")
    del options.tables
    write(options.output, options, {"jobs": found})


if __name__ == "__main__":
    main()
