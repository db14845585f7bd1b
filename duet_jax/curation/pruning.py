"""Which examples to prune a model by.

Wanda (Sun et al. 2023, arXiv 2306.11695), section 3: a weight is worth its magnitude times the norm of its input over
calibration data, and of the weights of each output the least worth are set to zero. Which data is best is an open
question (Bandari et al. 2024, arXiv 2410.07461): here candidate sets are
compared by the perplexity of held-out text after pruning.

Wanda prunes a layer before it computes the inputs of the next; here all inputs are those of the model before pruning,
in one pass. Its calibration sequences are 2048 tokens long; here they are examples as they are.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.config import CalibrationConfig
from duet_jax.curation.bench import Bench, Curated, lines
from duet_jax.data import Encoded, Example, gather_batch, plan_batches
from duet_jax.data.example import any_chat, as_row
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed
from duet_jax.feedback.tasks import ResponseLoss
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.decoding import block
from duet_jax.models.packed import unpack
from duet_jax.models.rope import rotation


@partial(jax.jit, static_argnames="count")
def prune(kernel: Array, norms: Array, count: int) -> Array:
    """A kernel with the least worth weights of each output set to zero.

    Args:
      kernel: `[in, out]`; Wanda's rows, of one output each, are its columns.
      norms: float32 `[in]`, of each input over all calibration tokens.
      count: weights of each output to prune; of equally worth ones those with the lowest index.
    """
    worth = jnp.abs(kernel.astype(jnp.float32)) * norms[:, None]
    least = jnp.argsort(worth, axis=0, stable=True)[:count]
    return kernel.at[least, jnp.arange(kernel.shape[1])].set(0)


def prune_all(params: llama.Params, norms: dict[str, Array], sparsity: float) -> llama.Params:
    """Parameters whose layers' linear kernels have lost `floor(sparsity * in)` weights of each output.

    Args:
      params: of `llama.init`.
      norms: of `input_norms`.
      sparsity: in [0, 1).
    """
    layers = params["layers"]
    found = _pruned({name: layers[name]["kernel"] for name in norms}, norms, sparsity)
    pruned = {name: {**layers[name], "kernel": kernel} for name, kernel in found.items()}
    return {**params, "layers": {**layers, **pruned}}


@partial(jax.jit, static_argnames="sparsity")
def _pruned(kernels: dict[str, Any], norms: dict[str, Array], sparsity: float) -> dict[str, Array]:
    """All layers' kernels `[layers, in, out]`, pruned one after the other."""
    found = {}
    for name, packed in kernels.items():
        kernel = unpack(packed)
        # 0.29 * 100 is 28.999999999999996.
        count = math.floor(sparsity * kernel.shape[1] + 1e-9)
        found[name] = jax.lax.map(lambda pair, count=count: prune(*pair, count), (kernel, norms[name]))
    return found


@lru_cache(maxsize=8)
def _squares(config: llama.LlamaConfig, compute_dtype: Any) -> Any:
    """Compiled `(params, tokens [B, T], real [B, T]) -> {name: float32 [layers, in]}`: sums of squares of inputs."""

    @jax.jit
    def squares(params: llama.Params, tokens: Array, real: Array) -> dict[str, Array]:
        turned = rotation(config, jnp.arange(tokens.shape[1])[None])

        def layer(x: Array, own: llama.Params) -> tuple[Array, dict[str, Array]]:
            found = {}

            def watch(name: str, x: Array, y: Array) -> Array:
                found[name] = jnp.einsum("bti,bt->i", jnp.square(x.astype(jnp.float32)), real)
                return y

            return block(config, own)(x, {}, llama.Pass(compute_dtype, turned, tap=watch)), found

        return jax.lax.scan(layer, params["embedding"][tokens].astype(jnp.float32), params["layers"])[1]

    return squares


def input_norms(model: Deployed, encoded: Encoded, batch_size: int) -> dict[str, Array]:
    """Norms of the inputs of all layers' linear kernels over all tokens of some examples, float32 `[layers, in]` each.

    Args:
      model: without adapters.
      encoded: at least one example.
      batch_size: examples in a forward pass.
    """
    engine = model.engine
    squares = _squares(engine.model.config, engine.compute_dtype)
    total: dict[str, Array] | None = None
    for length, rows in plan_batches(encoded.lengths, engine.buckets, batch_size):
        batch = gather_batch(encoded, rows, length, batch_size, engine.model.tokenizer.pad_id)
        real = np.zeros((batch_size, length), np.float32)
        real[: len(rows)] = np.arange(length) < encoded.lengths[rows][:, None]
        found = squares(model.params, batch.tokens, real)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    return jax.tree.map(jnp.sqrt, total)


def curate(bench: Bench, config: CalibrationConfig) -> Curated:
    """Compares random sets of each domain's training examples.

    Files: calibration.jsonl, the set of the lowest perplexity; perplexities.json, of all sets and of the model before
    pruning.

    Raises:
      DataError: a domain has too few examples, or there is none to compare on.
    """
    candidates = _candidates(bench, config)
    engine = bench.student.engine
    if not bench.held_out:
        raise DataError("calibration: there is no held-out example to compare on; give calibration.held_out.")
    loss = ResponseLoss(engine.encode(bench.held_out, "held-out examples"), config.batch_size, perplexity=True)
    encoded = [engine.encode(examples, name) for name, examples in candidates]

    def one(part: list[int]) -> list[float]:
        (number,) = part
        whole = bench.model
        if whole.lora is not None:
            whole = Deployed(engine, adapters.merge(whole.params, whole.lora))
        # The last is the model before pruning.
        if number < len(encoded):
            norms = input_norms(whole, encoded[number], config.batch_size)
            whole = Deployed(engine, prune_all(whole.params, norms, config.sparsity))
        return [loss(whole).details["perplexity"]]

    digests = [part.digest for part in (*encoded, loss.encoded)]
    identity = [bench.identity, digests, config.sparsity]
    *values, before = bench.kept("candidate sets", identity, [1] * (len(encoded) + 1), one, 1)
    best = int(np.argmin(values))
    name, examples = candidates[best]
    chat = any_chat(examples)
    measured = {
        "sparsity": config.sparsity,
        "before": before,
        "sets": {other: value for (other, _), value in zip(candidates, values, strict=True)},
        "chosen": name,
    }
    files = {
        "calibration.jsonl": lines(as_row(example, chat=chat) for example in examples),
        "perplexities.json": json.dumps(measured, indent=1, ensure_ascii=False) + "\n",
    }
    return Curated(files, f"{name} of {len(values)} sets: perplexity {values[best]:.4g}, {before:.4g} before pruning")


def _candidates(bench: Bench, config: CalibrationConfig) -> list[tuple[str, tuple[Example, ...]]]:
    found = []
    for number, domain in enumerate(bench.domains):
        if len(domain.train) < config.examples:
            raise DataError(
                f"domain '{domain.name}' has {len(domain.train)} training examples, fewer than calibration.examples "
                f"({config.examples})."
            )
        for draw in range(config.draws):
            rng = np.random.default_rng([bench.seed, number, draw])
            rows = rng.choice(len(domain.train), config.examples, replace=False)
            name = domain.name if config.draws == 1 else f"{domain.name} {draw + 1}"
            found.append((name, tuple(domain.train[row] for row in np.sort(rows))))
    return found
