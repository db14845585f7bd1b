"""DUET with each selector on eight real domains: is the data that it finds better, and what does it cost?

For every unseen task, selector and seed a study is run: the search proposes mixtures of the domains in `$DUET_DATA`,
the selector draws examples of each, a model is trained and its score on the task is heard. The task `in` is one of the
domains (gsm8k), `out` is none (math); both answer with minus a loss, nats a token, and `accuracy` with that on multiple
choice that is no domain either (creak). What is compared is the score, on examples of the task that no study has heard
of, of models trained anew:

  uniform, random   the even mixture of random examples: nobody searches or selects
  uniform           the even mixture of the selector's examples: nobody searches
  duet              the recommended mixture of the selector's examples

Selectors see the domains alone, never the task; those that need targets take each domain's held-out examples. Seconds
are of the selection (with the programs it compiles) and of the whole study. A killed run goes on from --output.

    DUET_DATA=FOLDER python benchmarks/selector_study.py --model FOLDER_OF_STORIES260K --seeds 3 --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mixture_table import DOMAINS
from search_common import parse, write
from study_common import score

from duet_jax import config, duet, job
from duet_jax.config import DomainConfig, TaskConfig
from duet_jax.data import load_examples
from duet_jax.feedback import build
from duet_jax.study import Study

TASKS = {
    "in": ("gsm8k", "response_loss"),
    "out": ("math", "response_loss"),
    "accuracy": ("creak", "multiple_choice"),
}
SELECTORS: dict[str, dict[str, Any]] = {
    "random": {},
    "influence": {},
    "nice": {
        "reward": {"kind": "rouge_l"},
        "warmup_epochs": 1,
        "policy": {"samples": 8, "max_new_tokens": 48, "batch_size": 64},
    },
    "davir": {"warmup_epochs": 2},
    # A model of stories cannot be asked by letters; its own answers are left, and how likely it finds the target.
    "clear": {"confidence": {"samples": 2, "max_new_tokens": 32, "alpha": 0.0, "beta": 1.0, "likelihood": 1.0}},
    "log_det": {},
}
UNIFORM = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))


def study(task: str, selector: str, seed: int, options: argparse.Namespace) -> config.StudyConfig:
    folder = Path(os.environ["DUET_DATA"])
    domains = [
        {"name": name, "source": str(folder / name / "train.jsonl"), "max_examples": options.each} for name in DOMAINS
    ]
    name, kind = TASKS[task]
    training: dict[str, Any] = {"method": "full"} if options.method == "full" else {"lora": {"rank": 16, "alpha": 32}}
    tree = {
        "name": "selector_study",
        "seed": seed,
        "budget": options.budget,
        "rounds": options.rounds,
        "model": {"source": options.model, "dtype": options.dtype, "chat": False},
        "data": {
            "max_length": 256,
            "buckets": [64, 128, 256],
            "validation_fraction": 0.1,
            "validation_examples": 0,
            "domains": domains,
        },
        "training": {**training, "learning_rate": options.learning_rate, "batch_size": 16},
        "task": {"kind": kind, "source": str(folder / name / "eval.jsonl"), "max_examples": options.heard},
        "selector": {"kind": selector, **SELECTORS[selector]},
    }
    return config.from_dict(tree)


def unheard(made: job.Job, task: TaskConfig, options: argparse.Namespace) -> Any:
    """The task on examples of its file that the study does not hear of."""
    wanted = DomainConfig(name="unheard", source=task.source, max_examples=options.heard + options.unheard)
    examples = load_examples(wanted)[options.heard :]
    return build(dataclasses.replace(task, max_examples=None), made.engine, examples, "unheard")


def run(task: str, selector: str, seed: int, options: argparse.Namespace, utilities: Path) -> dict[str, Any]:
    """One study. Utilities do not depend on the task: they are taken from a folder, or go there."""
    told, known = study(task, selector, seed, options), utilities.exists()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Study.begin(folder / "study", told)
        if known:
            shutil.copytree(utilities, folder / "study" / "selections")
        began = time.perf_counter()
        # What is selected here is found by the run.
        made = job.prepare(told, folder / "study", lambda line: None)
        selected = time.perf_counter()
        if not known:
            shutil.copytree(folder / "study" / "selections", utilities)
        result = duet.run(told, folder / "study", quiet=True)
        ended = time.perf_counter()
        assert result.mixture is not None
        judge = unheard(made, told.task, options)
        values = {
            way: score(made, judge, mixture, options.trainings, folder)
            for way, mixture in (("uniform", UNIFORM), ("duet", result.mixture))
        }
    seconds = {"selection": None if known else round(selected - began, 1), "study": round(ended - selected, 1)}
    return {"task": task, "selector": selector, "seed": seed, **values, "mixture": result.mixture, "seconds": seconds}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task and selector means over seeds, and gains over the even mixture of random examples, seed by seed."""
    start = {(row["task"], row["seed"]): row["uniform"] for row in rows if row["selector"] == "random"}
    found = []
    for task, selector in dict.fromkeys((row["task"], row["selector"]) for row in rows):
        some = [row for row in rows if (row["task"], row["selector"]) == (task, selector)]
        gains = {
            way: np.array([row[way] - start[task, row["seed"]] for row in some if (task, row["seed"]) in start])
            for way in ("uniform", "duet")
        }
        row: dict[str, Any] = {"task": task, "selector": selector, "seeds": len(some)}
        for way, gain in gains.items():
            spread = float(gain.std(ddof=1)) if len(gain) > 1 else None
            row[way] = float(np.mean([one[way] for one in some]))
            row[f"{way}_gain"] = [float(gain.mean()), spread] if len(gain) else None
        # Utilities are computed in the first task alone.
        same = [one["seconds"]["selection"] for one in rows if one["selector"] == selector]
        row["seconds"] = {"selection": float(np.median([one for one in same if one is not None]))}
        row["seconds"] |= {"study": float(np.median([one["seconds"]["study"] for one in some]))}
        found.append(row)
    return found


def kept(options: argparse.Namespace, shown: argparse.Namespace) -> list[dict[str, Any]]:
    """What a run that was killed has measured of what is asked, with the same settings."""
    if options.output is None or not options.output.exists():
        return []
    found = json.loads(options.output.read_text(encoding="utf-8"))
    choices = {"output", "tasks", "selectors", "seeds"}
    if any(found["settings"].get(name) != value for name, value in vars(shown).items() if name not in choices):
        return []
    return [
        row
        for row in found["rows"]
        if row["task"] in options.tasks and row["selector"] in options.selectors and row["seed"] < options.seeds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of stories260K, or another model as `model.source`")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=int, default=256, help="examples of a training (default 256)")
    parser.add_argument("--each", type=int, default=200, help="examples of each domain (default 200)")
    parser.add_argument("--heard", type=int, default=64, help="examples of the task that are heard of (default 64)")
    parser.add_argument("--unheard", type=int, default=200, help="others that mixtures are judged by (default 200)")
    parser.add_argument("--trainings", type=int, default=3, help="models that a mixture's score is the mean of")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parse(parser, "selector_study")
    # The model's folder is of this machine, its name is not.
    shown = argparse.Namespace(**vars(options) | {"model": Path(options.model).name})
    rows = kept(options, shown)
    done = {(row["task"], row["selector"], row["seed"]) for row in rows}
    # Studies of one size run the same programs.
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        for seed in range(options.seeds):
            for task in options.tasks:
                for selector in options.selectors:
                    if (task, selector, seed) in done:
                        continue
                    rows.append(row := run(task, selector, seed, options, Path(cache, f"{selector}-{seed}")))
                    print(
                        f"{task:8} {selector:10} seed {seed}: uniform {row['uniform']:.4f}, duet {row['duet']:.4f}; "
                        f"{row['seconds']['selection']} s and {row['seconds']['study']} s",
                        flush=True,
                    )
                    write(options.output, shown, {"means": summarise(rows), "rows": rows})
    write(options.output, shown, {"means": summarise(rows), "rows": rows})
    for line in summarise(rows):
        print(line)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
