"""Attention of a training step: ours in blocks against `jax.nn.dot_product_attention`, forwards and backwards.

Shapes are those of a layer of SmolLM2-135M. CPU seconds, medians, both in turn in one process.

    python benchmarks/attention.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from search_common import parse, write

from duet_jax.models.attention import causal_attention

HEADS, KEY_HEADS, SIZE = 9, 3, 64


def library(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def passes(attend: Callable[..., Array]) -> Callable[..., tuple]:
    """The values and the derivatives by all arguments."""
    return jax.jit(lambda q, k, v, d: (lambda out, pull: (out, pull(d)))(*jax.vjp(attend, q, k, v)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 192, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch (default 2048)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parse(parser, "attention")
    rows = []
    print(f"{'length':>6} {'ours ms':>9} {'library ms':>11} {'ratio':>6}   CPU, forwards and backwards")
    for length in options.lengths:
        batch = max(1, options.tokens // length)
        keys = jax.random.split(jax.random.key(0), 4)
        counts = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
        given = [
            jax.random.normal(key, (batch, length, count, SIZE), options.dtype)
            for key, count in zip(keys, counts, strict=True)
        ]
        ways = {"ours": passes(causal_attention), "library": passes(library)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, run in ways.items():
                began = time.process_time()
                jax.block_until_ready(run(*given))
                if number:
                    seconds[name].append(time.process_time() - began)
        ours, theirs = (statistics.median(seconds[name]) for name in ways)
        values = [run(*given)[0].astype(jnp.float32) for run in ways.values()]
        error = float(jnp.max(jnp.abs(values[0] - values[1])))
        rows.append({"length": length, "batch": batch, "ours_s": ours, "library_s": theirs, "difference": error})
        print(f"{length:6} {ours * 1e3:9.2f} {theirs * 1e3:11.2f} {theirs / ours:6.2f}", flush=True)
    write(options.output, options, {"rows": rows})


if __name__ == "__main__":
    main()
