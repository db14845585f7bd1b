"""How near the embedded default comes to the mixture that is known to be best, over seeds.

python benchmarks/quickstart.py --seeds 5 --output
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from search_common import parse, write

from duet_jax import config, duet
from duet_jax.study import Study

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
BEST = {"cats": 0.5, "dogs": 0.5, "birds": 0.0, "noise": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parse(parser, "quickstart")
    rows = []
    print(f"{'seed':>4} {'distance':>9} {'uniform':>9} {'best':>9} {'seconds':>8}")
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            result = duet.run(config.load(CONFIG, [f"seed={seed}"]), Path(folder) / "study", quiet=True)
            seconds = time.perf_counter() - began
            uniform = Study.open(Path(folder) / "study").trials()[0].feedback
        assert result.mixture is not None and uniform is not None
        distance = 0.5 * sum(abs(result.mixture[name] - share) for name, share in BEST.items())
        rows.append(
            {
                "seed": seed,
                "mixture": result.mixture,
                "distance": distance,
                "uniform": uniform["value"],
                "best": result.value,
                "seconds": seconds,
            }
        )
        print(f"{seed:4} {distance:9.3f} {uniform['value']:9.3f} {result.value:9.3f} {seconds:8.0f}", flush=True)
    middle = {name: statistics.median(row[name] for row in rows) for name in ("distance", "uniform", "best", "seconds")}
    print(
        f"median distance {middle['distance']:.3f} (uniform is {0.5 * np.abs(0.25 - np.array([*BEST.values()])).sum()})"
    )
    write(options.output, options, {"rows": rows, "median": middle})


if __name__ == "__main__":
    main()
