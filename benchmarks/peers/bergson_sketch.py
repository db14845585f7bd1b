"""bergson's gradient index of the same examples, as its command `bergson build --projection_dim 16` makes it.

Run by a Python that has bergson and torch (`benchmarks/sketching_peers.py --peer-python`). The calls are those of
`bergson.build.build_worker`, taken apart so that reading the model and making the random projections are not counted:
loss summed over labels, both sides of every module's gradient projected to 16, rows in the model's dtype, batches that
its own packing fills up to `token_batch_size` tokens. With adapters, their two factors are the modules. Written for
bergson 2.5; torchvision, which it asks for but does not use, must be of torch's own build or be removed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson import IndexConfig, collect_gradients, load_gradients
from bergson.data import allocate_batches
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset, disable_progress_bars

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sketching_process import Meter, answer, rate  # noqa: E402

VERSIONS = ("bergson", "torch", "transformers", "peft", "traker")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def examples(request: dict, part: str, count: int | None = None) -> Dataset:
    """Token ids, and labels that leave prompts out."""
    found = json.loads(Path(request["folder"], "examples.json").read_text())[part]
    tokens, prompts = found["tokens"][:count], found["prompts"][:count]
    labels = [[-100] * max(n, 1) + ids[max(n, 1) :] for ids, n in zip(tokens, prompts, strict=True)]
    return Dataset.from_dict({"input_ids": tokens, "labels": labels, "length": [len(ids) for ids in tokens]})


class Collector:
    """A model and its hooks. `seed` is that of the projections."""

    runs = itertools.count(1)

    def __init__(self, request: dict, seed: int | None = None):
        folder = Path(request["folder"])
        self.config = IndexConfig(
            run_path=str(folder / "bergson"),
            model=str(folder / ("adapter" if request["feature"] == "lora" else "model")),
            tokenizer=str(folder / "model"),
            precision=PRECISIONS[request["dtype"]],
            projection_dim=request["projection_dim"],
            projection_seed=seed,
            token_batch_size=request["token_batch_size"],
        )
        self.model, self.targets = setup_model_and_peft(self.config)
        self.processor: Any = None

    def __call__(self, data: Dataset) -> Path:
        """Builds an index; where it is."""
        name = f"bergson{os.getpid()}.{next(Collector.runs)}"
        self.config.run_path = str(Path(self.config.run_path).with_name(name))
        self.config.partial_run_path.mkdir(parents=True)
        if self.processor is None:
            self.processor = create_processor(self.model, self.config, self.targets)
        collect_gradients(
            self.model,
            data,
            self.processor,
            self.config,
            batches=allocate_batches(data["length"][:], self.config.token_batch_size),
            target_modules=self.targets,
        )
        return self.config.partial_run_path


def speed(request: dict) -> dict:
    collect, data = Collector(request), examples(request, "train")
    with Meter() as setup:
        collect(data.select(range(2)))
    with Meter() as meter:
        index = collect(data)
    per_row = (index / "gradients.bin").stat().st_size // len(data)
    return {**meter.report(), "setup_s": setup.cpu_s, "bytes": per_row, **about()}


def cosines(request: dict) -> dict:
    """Cosines of stored rows of training examples and targets, `[seeds, n, m]`."""
    found, per_row = [], 0
    for seed in request["seeds"]:
        collect = Collector(request, seed)
        train, targets = (
            np.array(load_gradients(collect(data)), np.float64)
            for data in (examples(request, "train", request["train"]), examples(request, "targets"))
        )
        train, targets = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, targets))
        found.append((train @ targets.T).tolist())
        per_row = train.shape[1] * (4 if request["dtype"] == "float32" else 2)
    return {"cosines": found, "bytes": per_row, **about()}


def rates(request: dict) -> dict:
    """Rates of matrix products in FLOP per CPU second, as ours."""

    def measure(m: int, k: int, n: int, dtype: torch.dtype) -> float:
        x, y = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
        return rate(2.0 * m * k * n, lambda: x @ y)

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = {name: max(measure(*shape, dtype) for shape in request["shapes"]) for name, dtype in dtypes.items()}
    return {**found, **about()}


def about() -> dict:
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"versions": versions, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    disable_progress_bars()
    answer({"speed": speed, "cosines": cosines, "rates": rates})
