"""A table of real trainings, so that searches can be replayed without training: mixtures of domains, and losses.

stories260K, a Llama of 260,000 parameters, is trained (all of it) on as many examples of eight of the domains in
`$DUET_DATA` as a round has, by many mixtures: the uniform one, the natural proportions, every domain alone, every pair
in equal parts, and random ones, of which a half are sparse. Measured of each model is its loss on held-out responses of
those domains and of others that it is never trained on, in nats a token. A few mixtures are trained again with other
seeds, which is how large the noise is.

A killed run goes on with the rows that are missing. `replay.py` searches the table.

    DUET_DATA=FOLDER python benchmarks/mixture_table.py FOLDER_OF_STORIES260K --mixtures 256
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from search_common import HERE, about

from duet_jax import config, job
from duet_jax._files import append_lines
from duet_jax.config import DomainConfig, StudyConfig, TaskConfig
from duet_jax.data import load_examples
from duet_jax.feedback import Deployed, build

DOMAINS = ("gsm8k", "code_alpaca", "medquad", "commonsense_qa", "openbookqa", "roleplay", "triviaqa", "tinystories")
OTHERS = ("math", "mbpp", "arc", "siqa", "creak", "dolly", "alpaca_en", "shakespeare", "wikitext2", "c4")
TABLE = HERE / "results" / "mixture_table.jsonl"
AGAIN = 8  # seeds of the uniform mixture, besides the first


def study(model: Path, options: argparse.Namespace) -> StudyConfig:
    folder = Path(os.environ["DUET_DATA"])
    tree = {
        "name": "mixture_table",
        "budget": options.budget,
        "rounds": 1,
        "model": {"source": str(model)},
        "data": {
            "max_length": 256,
            "buckets": [64, 128, 192, 256],
            "domains": [{"name": name, "source": str(folder / name / "train.jsonl")} for name in DOMAINS],
        },
        "training": {"method": "full", "learning_rate": options.learning_rate, "batch_size": 16},
        "task": {"kind": "external"},
    }
    return config.from_dict(tree)


def mixtures(count: int, sizes: np.ndarray) -> np.ndarray:
    """The table's mixtures, float64 `[n, d]`: those that are named first, then random ones."""
    size, rng = len(sizes), np.random.default_rng(0)
    named = [np.full(size, 1 / size), sizes / sizes.sum(), *np.eye(size)]
    named += [(np.eye(size)[i] + np.eye(size)[j]) / 2 for i, j in combinations(range(size), 2)]
    dense = rng.dirichlet(np.ones(size), count)
    sparse = rng.dirichlet(np.full(size, 0.3), count)
    drawn = [sparse[i // 2] if i % 2 else dense[i // 2] for i in range(max(count - len(named), 0))]
    return np.array([*named, *drawn])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of stories260K, or of another small model")
    parser.add_argument("--mixtures", type=int, default=48)
    parser.add_argument("--budget", type=int, default=512, help="examples of a training (default 512)")
    parser.add_argument("--held-out", type=int, default=64, help="examples of each set that is measured (default 64)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=TABLE, help="file of JSON lines (default results/)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = job.prepare(study(options.model, options), folder, print)
        sets = {}
        for each in (*DOMAINS, *OTHERS):
            source = str(Path(os.environ["DUET_DATA"]) / each / "eval.jsonl")
            examples = load_examples(DomainConfig(name=each, source=source, max_examples=options.held_out))
            sets[each] = build(TaskConfig(kind="response_loss", source=source), made.engine, examples, each)
        sizes = np.array([made.sizes[each] for each in DOMAINS], float)
        found = mixtures(options.mixtures, sizes)
        wanted = [(row, 0) for row in range(len(found))] + [(0, seed) for seed in range(1, AGAIN + 1)]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        lines = options.output.read_text().splitlines() if options.output.exists() else []
        if not lines:
            settings = {key: getattr(options, key) for key in ("budget", "held_out", "learning_rate")}
            append_lines(options.output, [{"domains": DOMAINS, "others": OTHERS, "settings": settings, **about()}])
        done = {(row["row"], row["seed"]) for row in map(json.loads, lines[1:])}
        for row, seed in wanted:
            if (row, seed) in done:
                continue
            began = time.perf_counter()
            counts = made.counts(found[row])
            rows, _ = made.sample(counts, seed)
            trained = made.trainer.fit(made.data, rows, seed=seed, start_seed=seed)
            model = Deployed(made.engine, *made.trainer.deployable(trained.trainable))
            losses = {each: round(-task(model).value, 4) for each, task in sets.items()}
            seconds = round(time.perf_counter() - began, 2)
            line = {"row": row, "seed": seed, "counts": counts.tolist(), "losses": list(losses.values())}
            append_lines(options.output, [line | {"seconds": seconds}])
            print(f"{row} seed {seed}: {seconds} s, {losses}", flush=True)


if __name__ == "__main__":
    main()
