"""Training throughput and memory: ours against transformers + PEFT on the same work, one after the other.

One optimiser step of a decoder of SmolLM2-135M's shape on 8 sequences of 256 tokens, every token a label, LoRA
(rank 16, all linear layers) or all parameters, AdamW. Each measurement is a process of its own; the rounds are
interleaved and medians are reported, because machines are shared. Weights are random: speed does not depend on them.

    python benchmarks/training.py                        # ours alone
    python benchmarks/training.py --peer-python PYTHON   # a Python that has torch, transformers and peft
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

BATCH, LENGTH = 8, 256
SHAPE = dict(vocab=49152, hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head=64)
# For each way of ours: compute dtype, rows per micro-batch, what the backward pass computes again.
OURS = {"lora": ("bfloat16", 4, "products"), "full": ("bfloat16", 4, "products")}


def measure_ours(method: str, dtype: str, rows: int, remat: str, steps: int, labels: float) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from duet_jax.config import LoraSettings, TrainingConfig
    from duet_jax.models import llama
    from duet_jax.training.sft import Trainer

    s = SHAPE
    model = llama.LlamaConfig(
        s["vocab"], s["hidden"], s["inner"], s["layers"], s["heads"], s["kv_heads"], s["head"], rope_theta=1e5
    )
    initialise = jax.jit(lambda key: llama.init(model, key=key, dtype=jnp.float32))
    resident = initialise(jax.random.key(0)) if method == "lora" else None
    settings = TrainingConfig(
        method=method,
        batch_size=BATCH,
        micro_batch_size=rows,
        learning_rate=1e-4,
        lora=LoraSettings(rank=16, alpha=32.0),
    )
    trainer = Trainer(
        model,
        lambda: initialise(jax.random.key(0)) if resident is None else resident,
        settings,
        (LENGTH,),
        0,
        jnp.dtype(dtype),
        remat,
    )
    state = trainer.start(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, s["vocab"], (BATCH, LENGTH)).astype(np.int32)
    mask = np.broadcast_to(np.arange(LENGTH) >= max(1, LENGTH * (1 - labels)), (BATCH, LENGTH))
    key, dials, seconds = jax.random.key(1), trainer.dials, []
    for number in range(steps + 1):
        began = time.perf_counter()
        state, metrics = trainer.step(state, resident, dials, tokens, mask, np.float32(1e-4), key, np.int32(number))
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - began)
    return {"first_step_s": seconds[0], "step_s": statistics.median(seconds[1:]), "loss": loss}


def measure_peer(method: str, dtype: str, steps: int, labels: float) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SHAPE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=s["vocab"],
            hidden_size=s["hidden"],
            intermediate_size=s["inner"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"],
            tie_word_embeddings=True,
        )
    )
    model.config.use_cache = False
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, s["vocab"], (BATCH, LENGTH))
    targets_ = tokens.clone()
    targets_[:, : int(LENGTH * (1 - labels))] = -100
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=targets_).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        seconds.append(time.perf_counter() - began)
    return {"first_step_s": seconds[0], "step_s": statistics.median(seconds[1:]), "loss": value}


def child(python: str, *arguments: str) -> dict:
    done = subprocess.run([python, __file__, "--child", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with torch, transformers and peft; none: ours alone")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind, interleaved")
    parser.add_argument("--labels", type=float, default=1.0, help="share of tokens that are labels")
    parser.add_argument("--ours", help="DTYPE,ROWS,REMAT in place of the default")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results" / "training.json"
    parser.add_argument("--output", type=Path, nargs="?", const=default, help="write JSON (results/training.json)")
    options = parser.parse_args()
    if options.child:
        who, method, dtype, steps, labels, *rest = options.child
        if who == "ours":
            result = measure_ours(method, dtype, int(rest[0]), rest[1], int(steps), float(labels))
        else:
            result = measure_peer(method, dtype, int(steps), float(labels))
            result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(result))
        return

    # Not above: the other Python need not have JAX.
    from search_common import write

    rows: list[dict] = []
    versions: dict[str, str] = {}
    for method in options.methods:
        dtype, size, remat = OURS[method]
        if options.ours:
            dtype, size, remat = options.ours.split(",")
        kinds = {f"ours {dtype}": (sys.executable, "ours", dtype, str(size), remat)}
        if options.peer_python:
            kinds["transformers float32"] = (options.peer_python, "peer", "float32")
            kinds["transformers bfloat16"] = (options.peer_python, "peer", "bfloat16")
        runs: dict[str, list[dict]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, (python, who, kind, *rest) in kinds.items():
                runs[name].append(child(python, who, method, kind, str(options.steps), str(options.labels), *rest))
        for name, results in runs.items():
            step = statistics.median(r["step_s"] for r in results)
            versions |= results[0].get("versions", {})
            rows.append(
                {
                    "method": method,
                    "who": name,
                    "tokens_per_s": BATCH * LENGTH / step,
                    "first_step_s": statistics.median(r["first_step_s"] for r in results),
                    "peak_gb": max(r["peak_gb"] for r in results),
                }
            )
    print(f"{'method':6} {'who':22} {'tokens/s':>9} {'first step':>11} {'peak GB':>8}")
    for row in rows:
        print(
            f"{row['method']:6} {row['who']:22} {row['tokens_per_s']:9.0f} {row['first_step_s']:9.1f} s "
            f"{row['peak_gb']:8.2f}"
        )
    write(options.output, options, {"rows": rows}, versions)


if __name__ == "__main__":
    main()
