"""What sketches of per-example gradients cost on top of the backward pass that they come from.

A decoder of SmolLM2-135M's shape, random weights (speed does not depend on them), sequences of one length whose second
half are labels. `bare` is the forward pass and the backward pass to the activations of the same batch, with nothing
made of the gradients; the others return a CountSketch of every example's gradient of the LoRA factors, of Adam's step
of it, or of all linear layers' kernels. Each measurement is a process of its own, rounds are interleaved, the best time
of each is kept because machines are shared; CPU seconds are printed as well for the same reason.

    python benchmarks/sketching.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from search_common import parse, write
from sketching_process import Meter

SHAPE = dict(vocab=49152, hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head=64)


class Touch:
    """One number of each layer's derivatives: the backward pass has to come by, and that is all."""

    def of_factors(self, name, context, x, d):
        return d[0, 0, 0].astype("float32")


KINDS = ("bare", "lora", "lora_adam", "full", "full_head")


def passes(kind: str, dtype: str, remat: str, k: int, layers: int):
    """The compiled pass, and what comes before tokens and weights."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from duet_jax.kernels.linear_cross_entropy import linear_cross_entropy

    from duet_jax.influence import Adam, CountSketch, ExampleGradients, Gradient, Moments
    from duet_jax.influence.tap import Context, tap
    from duet_jax.models import llama
    from duet_jax.models import lora as adapters
    from duet_jax.models.linear import Taps

    s = SHAPE
    model = llama.LlamaConfig(
        s["vocab"], s["hidden"], s["inner"], layers, s["heads"], s["kv_heads"], s["head"], rope_theta=1e5
    )
    params = jax.jit(lambda key: llama.init(model, key=key, dtype=jnp.float32))(jax.random.key(0))
    lora = None
    if not kind.startswith("full"):
        make = jax.jit(lambda key: adapters.init(model, adapters.LoraConfig(rank=16), key=key).factors)
        factors = jax.tree.map(lambda x: x + 1e-3, make(jax.random.key(1)))
        lora = dataclasses.replace(adapters.without_factors(model, adapters.LoraConfig(rank=16)), factors=factors)
    if kind == "bare":

        def loss(accumulator, params, lora, tokens, weights):
            def observe(name, layer, x, y):
                return tap(Touch(), name, accumulator, Context(0), x, y) if name == "q" else y

            params = llama.frozen(params, jnp.dtype(dtype))
            hidden = llama.hidden_states(
                model, params, tokens, lora=lora, compute_dtype=jnp.dtype(dtype), remat=remat, taps=Taps(observe)
            )
            return linear_cross_entropy(
                hidden[:, :-1].reshape(-1, s["hidden"]),
                params["embedding"],
                tokens[:, 1:].reshape(-1),
                weights[:, 1:].reshape(-1),
                256,
                jnp.dtype(dtype),
            )

        run = jax.jit(jax.value_and_grad(loss))
        return lambda tokens, weights: run(jnp.zeros(()), params, lora, tokens, weights)
    gradients = ExampleGradients(
        model,
        target="lora" if lora else "full",
        head=kind == "full_head",
        compute_dtype=jnp.dtype(dtype),
        remat=remat,
    )
    compute = gradients.sketch(CountSketch(k), Adam() if kind == "lora_adam" else Gradient())
    extra = {}
    if kind == "lora_adam":
        extra["moments"] = Moments(factors, jax.tree.map(jnp.square, factors), jnp.asarray(10))
    return lambda tokens, weights: compute(params, lora, tokens, weights, **extra)


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    run = passes(kind, options.dtype, options.remat, options.k, options.layers)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab"], (options.batch, options.length)).astype(np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, options.length // 2 :] = 1
    jax.block_until_ready(run(tokens, weights))
    meters = []
    for _ in range(options.steps):
        with Meter() as meter:
            jax.block_until_ready(run(tokens, weights))
        meters.append(meter)
    wall, cpu, peak = (min(getattr(m, name) for m in meters) for name in ("wall_s", "cpu_s", "peak_gb"))
    return {"kind": kind, "seconds": wall, "cpu_seconds": cpu, "peak_gb": max(Meter.highest, peak), "working_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remat", default="products", choices=["none", "products", "full"])
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="timed passes a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind, interleaved")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parse(parser, "sketching")
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    runs: dict[str, list[dict]] = {kind: [] for kind in options.kinds}
    for _ in range(options.rounds):
        for kind in options.kinds:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows = []
    for found in runs.values():
        row = {name: min(run[name] for run in found) for name in ("seconds", "cpu_seconds")}
        rows.append(found[0] | row | {name: max(run[name] for run in found) for name in ("peak_gb", "working_gb")})
    bare = rows[0]
    columns = ("examples/s", "of bare", "CPU s", "of bare", "peak GB", "of bare", "working", "of bare")
    print(f"{'pass':10}" + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        print(
            f"{row['kind']:10} {options.batch / row['seconds']:10.2f} {bare['seconds'] / row['seconds']:10.0%} "
            f"{row['cpu_seconds']:10.2f} {bare['cpu_seconds'] / row['cpu_seconds']:10.0%} {row['peak_gb']:10.2f} "
            f"{row['peak_gb'] / bare['peak_gb']:10.2f} {row['working_gb']:10.2f} "
            f"{row['working_gb'] / bare['working_gb']:10.2f}"
        )
    write(options.output, options, {"rows": rows})


if __name__ == "__main__":
    main()
