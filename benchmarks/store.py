"""How many bytes, how fast and how true are the row formats of a store of sketches?

Rows are synthetic: Gaussian, of low rank, with norms spread like those of gradients; targets share their subspace. For
every format: bytes on disk a row, rates of writing (encode, checksum, fsync) and of scoring a store from the page cache
against the targets (rows and their bytes a second, every target a column), and how its scores order the examples:
Spearman and overlap of the best 5%, means over targets, with float32 rows of the same k, and with the exact cosines
before projection. The last row is the wide and thin store: half the bytes of k = 8192 at int8.

    python benchmarks/store.py
    python benchmarks/store.py --rows 20000 --output
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from search_common import parse, write

from duet_jax.influence.accuracy import overlap, spearman
from duet_jax.influence.header import Header
from duet_jax.influence.scores import Checkpoint, Scoring, blocks
from duet_jax.influence.store import Store

KINDS = ((8192, "float32"), (8192, "bfloat16"), (8192, "int8"), (8192, "int4"), (8192, "1bit"), (32768, "1bit"))
RANK = 256


def draw(count: int, seed: int) -> np.ndarray:
    """Coordinates float32 `[count, RANK]` of gradients in their subspace, of spread norms."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(size=(count, 1)))
    return (norms * rng.normal(size=(count, RANK))).astype(np.float32)


def sketch(points: np.ndarray, k: int) -> np.ndarray:
    """What a projection makes of an orthonormal subspace: nearly Gaussian, its columns nearly orthogonal."""
    basis = np.random.default_rng(k).standard_normal((RANK, k)).astype(np.float32) / np.float32(np.sqrt(k))
    return points @ basis


def matrix(store: Store, targets: np.ndarray, scoring: Scoring) -> np.ndarray:
    """Scores `[rows, targets]`: kept whole here alone, to be compared."""
    checkpoint = Checkpoint(store, targets)
    return np.concatenate([np.asarray(scores) for _, scores in blocks([checkpoint], scoring, np.arange(len(targets)))])


def measure(folder: Path, k: int, format: str, query_format: str, options: argparse.Namespace) -> dict[str, Any]:
    count, size = options.rows, options.shard_size
    about = Header("synthetic", 0, k, "sgd", "sum", count, "", "", "", "", format=format, shard_size=size)  # type: ignore[arg-type]
    store = Store.create(folder, about)
    points, targets = draw(count, 0), sketch(draw(options.targets, 1), k)
    writing = 0.0
    for shard in store.missing():
        start, stop = store.bounds(shard)
        rows = sketch(points[start:stop], k)
        ids = [str(i) for i in range(start, stop)]
        began = time.perf_counter()
        store.write(shard, rows, ids=ids, lengths=np.full(stop - start, 512))
        # The first one compiles.
        writing += (time.perf_counter() - began) * (shard > 0)
    files = sum(path.stat().st_size for path in folder.glob("*/c/**/*") if path.is_file())
    scoring = Scoring("mean_of_cosines", query_format=query_format)  # type: ignore[arg-type]
    scores = matrix(store, targets, scoring)
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        matrix(store, targets, scoring)
        seconds.append(time.perf_counter() - began)
    rate = count / min(seconds)
    return {
        "k": k,
        "format": format,
        "query_format": query_format,
        "bytes_per_row": files / count,
        "write_rows_per_s": (count - size) / writing,
        "score_rows_per_s": rate,
        "score_gb_per_s": rate * about.bytes_per_row / 1e9,
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where stores are written; a temporary one by default")
    options = parse(parser, "store")
    points, target = draw(options.rows, 0), draw(options.targets, 1)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (points, target)]
    exact, best, results = units[0] @ units[1].T, options.rows // 20, []
    references: dict[int, np.ndarray] = {}
    print(f"{'k':>6} {'rows':>9} {'queries':>8} {'bytes/row':>9} {'write/s':>8} {'score/s':>8} {'GB/s':>6} ", end="")
    print(f"{'float32':>9} {'top 5%':>7} {'exact':>7} {'top 5%':>7}")
    for k, format in KINDS:
        for query_format in ("float32", "int8") if format in ("int8", "int4") else ("float32",):
            folder = Path(tempfile.mkdtemp(prefix="store-", dir=options.folder))
            row = measure(folder, k, format, query_format, options)
            shutil.rmtree(folder)
            scores, columns = row.pop("scores"), range(options.targets)
            if format == "float32":
                references[k] = scores
            for name, other in (("exact", exact), ("float32", references.get(k))):
                if other is not None:
                    row[f"spearman_{name}"] = float(np.mean([spearman(other[:, j], scores[:, j]) for j in columns]))
                    row[f"overlap_{name}"] = float(np.mean([overlap(other[:, j], scores[:, j], best) for j in columns]))
            results.append(row)
            print(
                f"{k:6} {format:>9} {query_format:>8} {row['bytes_per_row']:9.0f} {row['write_rows_per_s']:8.0f} "
                f"{row['score_rows_per_s']:8.0f} {row['score_gb_per_s']:6.2f} "
                f"{row.get('spearman_float32', np.nan):9.4f} "
                f"{row.get('overlap_float32', np.nan):7.3f} {row['spearman_exact']:7.4f} {row['overlap_exact']:7.3f}",
                flush=True,
            )
    write(options.output, options, {"rows": results})


if __name__ == "__main__":
    main()
