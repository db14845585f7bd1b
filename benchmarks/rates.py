"""What the machine can do at most: the limit that benchmarks of models are measured by."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp


def product_rate(dtype: Any) -> float:
    """Operations a second of products of large matrices, the best of several."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)
