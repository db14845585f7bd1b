"""Compiles the kernels for a TPU on a machine without one, and prints what the compiler says of their memory.

`python tpu_programs.py TOPOLOGY` in an environment with libtpu; used by test_tpu_compilation.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from duet_jax.kernels.gradient_sketch import gradient_sketch
from duet_jax.kernels.linear_cross_entropy import losses_and_gradients, token_log_probs
from duet_jax.kernels.rademacher import signed_sums
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

K, TOKENS = 8192, 2048
KERNEL = {"implementation": "pallas"}
NUMBER = ((), jnp.uint32)


class Program(NamedTuple):
    """A function with the shapes and dtypes of its arrays, and the size of what must never be in memory."""

    name: str
    function: Callable[..., Any]
    arrays: list[tuple[tuple[int, ...], Any]]
    forbidden_bytes: int


def sketch(x: Any, d: Any, seed: Any, stream: Any) -> Any:
    return gradient_sketch(x, d, seed, stream, K, **KERNEL)


def dense(vectors: Any, seed: Any, stream: Any) -> Any:
    return signed_sums(vectors, seed, stream, K, **KERNEL)


def log_probs(hidden: Any, head: Any, labels: Any, weights: Any) -> Any:
    return token_log_probs(hidden, head, labels, weights != 0, compute_dtype=jnp.bfloat16, **KERNEL)


def loss(of_head: bool, *given: Any) -> Any:
    return losses_and_gradients(*given, 256, jnp.bfloat16, of_head=of_head, **KERNEL)


def programs() -> Iterator[Program]:
    """Layers and heads of SmolLM2-135M and Llama-3.1-8B."""
    for batch, rows, cols in [(8, 576, 576), (8, 576, 192), (8, 576, 1536), (2, 4096, 1024), (2, 4096, 14336)]:
        x, d = ((batch, 128, rows), jnp.bfloat16), ((batch, 128, cols), jnp.bfloat16)
        yield Program(f"sketch {rows}x{cols}", sketch, [x, d, NUMBER, NUMBER], 4 * batch * rows * cols)
    yield Program("dense", dense, [((64, 331776), jnp.float32), NUMBER, NUMBER], 331776 * K)
    for size, vocabulary, functions in [
        (576, 49152, {"log-probabilities": log_probs, "loss": partial(loss, False), "loss, head": partial(loss, True)}),
        (4096, 128256, {"log-probabilities": log_probs, "loss": partial(loss, False)}),
    ]:
        hidden, head = ((TOKENS, size), jnp.bfloat16), ((vocabulary, size), jnp.bfloat16)
        given = [hidden, head, ((TOKENS,), jnp.int32), ((TOKENS,), jnp.float32)]
        for name, function in functions.items():
            yield Program(f"{name} {size}", function, given, 4 * TOKENS * vocabulary)


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    where = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), PartitionSpec())
    for program in programs():
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in program.arrays]
        compiled = jax.jit(program.function).lower(*shapes).compile()
        found = {
            "name": program.name,
            "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "forbidden": program.forbidden_bytes,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
