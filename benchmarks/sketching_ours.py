"""Our side of `sketching_peers.py`, a process like the others: it prepares the inputs of all, and is measured.

Tasks: `prepare` writes the model, its adapters and the examples where every tool can read them; `rates` measures matrix
products; `speed` sketches the training examples; `cosines` compares sketches of training examples and targets; `exact`
compares their whole gradients, from plain `jax.grad`, one at a time.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from duet_jax.kernels.linear_cross_entropy import linear_cross_entropy
from jax import Array
from safetensors.numpy import save_file
from sketching_process import Meter, answer, rate

from duet_jax.data import Encoded, gather_batch, plan_batches
from duet_jax.influence import CountSketch, ExampleGradients, KroneckerSketch, quantise
from duet_jax.influence.header import Header
from duet_jax.influence.store import Store
from duet_jax.models import Model, llama, load, save
from duet_jax.models import lora as adapters

VERSIONS = ("jax", "jaxlib")
MODULES = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
# What cosines of one-bit rows with Gaussian queries are short of.
ONE_BIT = np.sqrt(np.pi / 2)


def shell(model: Model, rank: int) -> adapters.Lora:
    return adapters.without_factors(model.config, adapters.LoraConfig(rank=rank, alpha=2.0 * rank))


def total_loss(model: Model, params: Any, lora: Any, tokens: Array, weights: Array, dtype: Any) -> Array:
    """Sum of the weighted token losses, by nothing but the decoder and its loss: what a user would differentiate."""
    hidden = llama.hidden_states(model.config, params, tokens, lora=lora, compute_dtype=dtype, remat="full")
    flat, head = hidden[:, :-1].reshape(-1, hidden.shape[-1]), llama.output_head(params)
    return linear_cross_entropy(flat, head, tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1), 256, dtype)


def tokenised(rows: list[str], model: Model, length: int) -> dict[str, list]:
    """Prompts and responses of JSON lines as token ids, cut to `length`."""
    from duet_jax.data import Example, encode

    found = map(json.loads, rows)
    examples = [Example(row["id"], row["prompt"], row["response"]) for row in found]
    coded = encode(examples, model.tokenizer, chat=False, max_length=length)
    return {"tokens": [ids.tolist() for ids in coded.tokens], "prompts": coded.prompt_lengths.tolist()}


def read(request: dict, part: str) -> Encoded:
    found = json.loads(Path(request["folder"], "examples.json").read_text())[part]
    tokens = tuple(np.array(ids, np.int32) for ids in found["tokens"])
    return Encoded(tokens, np.array(found["prompts"], np.int32), tuple(map(str, range(len(tokens)))))


def prepare(request: dict) -> dict:
    """The model and a PEFT adapter in folders of the Hugging Face layout, and token ids in `examples.json`.

    Adapters come from a few steps of Adam on the examples: as they are initialised, half of them has no gradient.
    """
    folder, rank = Path(request["folder"]), request["rank"]
    model = load(request["model"])
    save(model, folder / "model")
    parts = {}
    for part, count in (("train", request["examples"]), ("targets", request["targets"])):
        with Path(request["data"], "train.jsonl" if part == "train" else "eval.jsonl").open() as file:
            parts[part] = tokenised([next(file) for _ in range(count)], model, request["length"])
    (folder / "examples.json").write_text(json.dumps(parts))
    factors = warmed_up(model, read(request, "train"), request)
    (folder / "adapter").mkdir()
    np.savez(folder / "factors.npz", **{f"{n}.{p}": a for n, pair in factors.items() for p, a in pair.items()})
    save_file(
        {
            f"base_model.model.model.layers.{layer}.{MODULES[name]}.lora_{part.upper()}.weight": kernel.T.copy()
            for name, pair in factors.items()
            for part, array in pair.items()
            for layer, kernel in enumerate(array)
        },
        folder / "adapter" / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / "model")}
    about |= {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    about |= {"target_modules": [path.split(".")[1] for path in MODULES.values()]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    return {
        "shape": dataclasses.asdict(model.config),
        "lengths": [len(ids) for ids in parts["train"]["tokens"]],
        "labels": [
            len(ids) - max(prompt, 1)
            for ids, prompt in zip(parts["train"]["tokens"], parts["train"]["prompts"], strict=True)
        ],
    }


def warmed_up(model: Model, encoded: Encoded, request: dict) -> dict[str, dict[str, np.ndarray]]:
    empty = shell(model, request["rank"])
    start = adapters.init(model.config, adapters.LoraConfig(rank=request["rank"]), key=jax.random.key(0)).factors
    optimiser = optax.adam(1e-3)

    @jax.jit
    def step(factors: Any, state: Any, tokens: Array, weights: Array) -> tuple[Any, Any]:
        def loss(factors: Any) -> Array:
            lora = dataclasses.replace(empty, factors=factors)
            return total_loss(model, model.params, lora, tokens, weights, jnp.bfloat16) / jnp.sum(weights)

        updates, state = optimiser.update(jax.grad(loss)(factors), state)
        return optax.apply_updates(factors, updates), state

    factors, state = start, optimiser.init(start)
    for number in range(request["warmup_steps"]):
        rows = np.arange(4 * number, 4 * number + 4) % len(encoded)
        batch = gather_batch(encoded, rows, request["length"], 4, 0)
        factors, state = step(factors, state, batch.tokens, batch.loss_mask.astype(np.float32))
    return jax.tree.map(np.asarray, factors)


def prepared(request: dict) -> tuple[Model, adapters.Lora | None, ExampleGradients]:
    """What is measured: model, adapters where the request's `feature` is theirs, and which gradients."""
    model, lora = load(Path(request["folder"], "model")), None
    if request["feature"] == "lora":
        with np.load(Path(request["folder"], "factors.npz")) as arrays:
            factors = {name: {part: jnp.asarray(arrays[f"{name}.{part}"]) for part in "ab"} for name in MODULES}
        lora = dataclasses.replace(shell(model, request["rank"]), factors=factors)
    dtype = jnp.dtype(request["dtype"])
    gradients = ExampleGradients(
        model.config,
        target=request["feature"],
        reduction="sum",
        compute_dtype=dtype,
        remat=request["remat"],
        micro_batch=request["micro_batch"],
    )
    return model, lora, gradients


def projection(request: dict, seed: int = 0) -> CountSketch | KroneckerSketch:
    return KroneckerSketch(request["k"], request["side"], seed) if request["side"] else CountSketch(request["k"], seed)


def speed(request: dict) -> dict:
    """Sketches of all training examples, from token ids to a finished store."""
    model, lora, gradients = prepared(request)
    params = llama.frozen(model.params, gradients.compute_dtype)
    del model
    encoded, size = read(request, "train"), request["batch"]
    compute = gradients.sketch(projection(request))
    plan = plan_batches(encoded.lengths, request["buckets"], size)

    def rows_of(bucket: int, index: np.ndarray) -> np.ndarray:
        batch = gather_batch(encoded, index, bucket, size, 0)
        found = compute(params, lora, batch.tokens, batch.loss_mask.astype(np.float32))
        return np.asarray(found.values)[: len(index)]

    with Meter() as setup:
        for bucket, index in dict(plan).items():
            rows_of(bucket, index)
    count = len(encoded)
    header = Header("count_sketch", 0, request["k"], "sgd", "sum", count, "", "", "", "", shard_size=count)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder, "store"), header)
        with Meter() as meter:
            rows = np.empty((count, request["k"]), np.float32)
            for bucket, index in plan:
                rows[index] = rows_of(bucket, index)
            store.write(0, rows, ids=encoded.ids, lengths=encoded.lengths)
            store.finish()
    padded = sum(bucket * size for bucket, _ in plan)
    return {**meter.report(), "setup_s": setup.cpu_s, "padded_tokens": padded, "bytes": header.bytes_per_row}


def cosines(request: dict) -> dict:
    """Cosines of sketched training examples and targets, `[seeds, n, m]` for every row format."""
    model, lora, gradients = prepared(request | {"micro_batch": None})
    found: dict[str, list] = {name: [] for name in request["formats"]}
    for seed in request["seeds"]:
        compute = gradients.sketch(projection(request, seed))
        train, targets = (
            np.concatenate(
                [
                    np.asarray(compute(model.params, lora, *one).values)
                    for one in single(read(request, part), count, request["length"])
                ]
            )
            for part, count in (("train", request["train"]), ("targets", None))
        )
        for name in found:
            measured = np.asarray(quantise.cosine(quantise.encode(jnp.asarray(train), name), jnp.asarray(targets)))
            found[name].append((measured * (ONE_BIT if name == "1bit" else 1.0)).tolist())
    bytes_of = {name: Header("", 0, request["k"], "", "sum", 1, "", "", "", "", format=name) for name in found}
    return {"cosines": found, "bytes": {name: header.bytes_per_row for name, header in bytes_of.items()}}


def single(encoded: Encoded, count: int | None, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and weights of the first examples, each a batch of its own of one shape."""
    batches = [gather_batch(encoded, np.array([i]), length, 1, 0) for i in range(len(encoded))[:count]]
    return [(batch.tokens, batch.loss_mask.astype(np.float32)) for batch in batches]


def exact(request: dict) -> dict:
    """Cosines of whole gradients in float32, `[n, m]`; of targets they exist all at once, of examples one."""
    model, lora, gradients = prepared(request)

    @jax.jit
    def gradient(params: Any, lora: Any, tokens: Array, weights: Array) -> Any:
        def loss(factors: Any, params: Any) -> Array:
            adapted = None if lora is None else dataclasses.replace(lora, factors=factors)
            return total_loss(model, params, adapted, tokens, weights, jnp.float32)

        if lora is None:
            return jax.grad(loss, argnums=1)(None, params)
        return jax.grad(loss)(lora.factors, params)

    def flat(one: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        arrays = gradients.named(gradient(model.params, lora, *one))
        whole = np.concatenate([np.asarray(arrays[name]).ravel() for name in sorted(arrays)])
        return whole / np.linalg.norm(whole.astype(np.float64))

    targets = [flat(one) for one in single(read(request, "targets"), None, request["length"])]
    rows = (flat(one) for one in single(read(request, "train"), request["train"], request["length"]))
    return {"cosines": [[float(np.dot(row, target)) for target in targets] for row in rows], "size": len(targets[0])}


def rates(request: dict) -> dict:
    """Rates of matrix products in FLOP per CPU second, the highest of the request's `shapes` (m, k, n)."""

    def measure(m: int, k: int, n: int, dtype: Any) -> float:
        x, y = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        multiply = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
        return rate(2.0 * m * k * n, lambda: multiply(x, y).block_until_ready())

    return {
        name: max(measure(*shape, jnp.dtype(name)) for shape in request["shapes"]) for name in ("float32", "bfloat16")
    }


if __name__ == "__main__":
    answer({"prepare": prepare, "rates": rates, "speed": speed, "cosines": cosines, "exact": exact})
