"""A selection by itself: a pool of data in, scored and chosen data out.

Written into a folder are
  scores.parquet     a row for every training example: domain, id, utility, rank among those it was chosen from, and
                     whether it was chosen; of davir, rho and loss_band also losses in nats and response tokens
  selected.jsonl     the chosen examples, highest utility first, with domain and utility: a source for `duet run`
  selection.json     what was done: configuration, model, counts, cost, versions, what was said meanwhile, and with
                     `evaluate` the `evaluation`: a row for the model trained on the chosen examples and for each
                     baseline
  work/              examples, tokens, utilities, trained models and what they were made of, by hash; a run that was
                     killed goes on from there
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet

from duet_jax._decode import encode as plain
from duet_jax._files import alone, write
from duet_jax.config import SelectConfig
from duet_jax.data import Domain, Example
from duet_jax.data.example import any_chat, as_row
from duet_jax.data.texts import ids_of
from duet_jax.display import Display
from duet_jax.distributed.processes import first, lead, led, require_shared
from duet_jax.errors import ConfigError
from duet_jax.evaluate import Evaluation, choices
from duet_jax.loading import Goal, Loaded, load, load_goal
from duet_jax.reading import load_all
from duet_jax.search.constraints import Constraints, round_counts
from duet_jax.selection import choose, floor_share, load_utilities, pool_size
from duet_jax.unseen import read_task


@dataclasses.dataclass(frozen=True)
class Scored:
    """The examples of a domain that can be chosen, their utilities, float64 `[n]`, and what they are made of, `[n]`."""

    name: str
    examples: Sequence[Example]
    utilities: np.ndarray
    details: Mapping[str, np.ndarray]


def select(config: SelectConfig, folder: Path, quiet: bool = False) -> dict[str, tuple[str, ...]]:
    """Scores the training examples of all domains and writes the chosen ones into `folder`.

    With `evaluate`, models are then trained on them and on the baselines, and scored.

    Returns:
      Ids of the chosen examples of each domain, highest utility first.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found.
      FeedbackError: a reply cannot be rewarded, or the task could not be asked; a new run asks again.
      StudyError: another process selects into this folder.
    """
    lead(lambda: folder.mkdir(parents=True, exist_ok=True))
    require_shared(folder)
    said: list[str] = []
    with led(lambda: alone(folder, "selects into")), Display(1, quiet=quiet or not first()) as display:

        def say(line: str) -> None:
            said.append(line)
            display.say(line)

        began = time.perf_counter()
        work = folder / "work"
        domains = load_all(config.data, config.seed, work / "data")
        # Before anything is computed: how many of each there are is known now.
        _counts(config, [len(domain.train) for domain in domains])
        goal = load_goal(config.selector, config.data.domains, domains, config.seed, work)
        loaded, measure = _load(config, domains, goal, work, say, display)
        scored = _score(config, domains, goal, loaded, work, say, display)
        chosen = _choose(config, scored)
        about = lead(_write, config, folder, scored, chosen, loaded)
        total = sum(len(rows) for rows in chosen)
        counts = " · ".join(f"{part.name} {len(rows)}" for part, rows in zip(scored, chosen, strict=True))
        say(f"{total} of {sum(len(part.examples) for part in scored)} examples chosen: {counts}; see {folder}")
        about["cost"] = _cost(loaded, time.perf_counter() - began)
        lead(_note, folder, about, said)
        if measure is not None:
            about["evaluation"] = []
            for name, rows in choices(config, [len(part.examples) for part in scored], chosen):
                found = measure(name, rows)
                say(str(found))
                about["evaluation"].append(dataclasses.asdict(found))
                lead(_note, folder, about, said)
    return {part.name: tuple(part.examples[row].id for row in rows) for part, rows in zip(scored, chosen, strict=True)}


def _load(
    config: SelectConfig,
    domains: list[Domain],
    goal: Goal,
    work: Path,
    say: Callable[[str], None],
    display: Display,
) -> tuple[Loaded | None, Evaluation | None]:
    """The model and the evaluation, where they are wanted; all that can be wrong with the task is told here."""
    unseen = None if config.evaluate is None else read_task(config.evaluate, config.seed, "evaluate")
    if config.model is None or not (config.selector.scores or unseen):
        return None, None
    others = [example for _, examples in goal.targets for example in examples]
    others += [] if unseen is None else unseen.texts
    loaded = load(
        config.model,
        config.data,
        config.training,
        domains,
        others,
        config.seed,
        say,
        config.mesh,
        jax.devices(),
        work / "data",
    )
    if unseen is None:
        return loaded, None
    task = unseen.build(loaded.engine)
    place = work / "evaluation"
    return loaded, Evaluation(loaded, task, unseen.identity(task), config.seed, place, display.work)


def _score(
    config: SelectConfig,
    domains: list[Domain],
    goal: Goal,
    loaded: Loaded | None,
    work: Path,
    say: Callable[[str], None],
    display: Display,
) -> list[Scored]:
    selector = config.selector
    if loaded is None:
        return [
            Scored(
                domain.name,
                domain.train,
                lead(load_utilities, selector.kind, domain.name, domain.train, path=selector.path, cache_folder=work),
                {},
            )
            for domain in domains
        ]
    scores = loaded.scores(selector, goal, work, config.seed, say, display.work)
    found, start = [], 0
    for domain, examples, values in zip(domains, loaded.kept, scores.utilities, strict=True):
        rows = slice(start, start + len(examples))
        details = {name: numbers[rows] for name, numbers in scores.details.items()}
        found.append(Scored(domain.name, examples, values, details))
        start = rows.stop
    return found


def _counts(config: SelectConfig, sizes: Sequence[int]) -> list[int]:
    """Examples to choose of each domain, or of all as one.

    Args:
      config: of the selection.
      sizes: examples of each domain that can be chosen.

    Raises:
      ConfigError: there are not so many, or the share is less than one example.
    """
    selector, names = config.selector, [domain.name for domain in config.data.domains]
    field, total = "count", config.count
    if config.share is not None:
        field, total = "share", floor_share(config.share, sum(sizes))
    if not total:
        raise ConfigError(f"share is {config.share}, less than one of {sum(sizes)} examples; raise it, or give count.")
    if config.pooled:
        names, sizes, counts = ["all domains"], [sum(sizes)], [total]
    else:
        shares = [config.mixture.get(name, 0.0) for name in names] if config.mixture else sizes
        counts = round_counts(np.array(shares, np.float64), total, Constraints()).tolist()
    for name, size, count in zip(names, sizes, counts, strict=True):
        most = pool_size(size, rule=selector.rule, fraction=selector.fraction)
        if count > most:
            raise ConfigError(
                f"{field} is {getattr(config, field)}, which asks for {count} examples of {name}, but there are {most} "
                f"to choose from; lower {field}{'' if config.pooled else ', or give another mixture'}."
            )
    return counts


def _choose(config: SelectConfig, scored: list[Scored]) -> list[np.ndarray]:
    """Rows of each domain that are chosen, highest utility first."""
    sizes = [len(part.examples) for part in scored]
    counts = _counts(config, [int(np.count_nonzero(part.utilities > -np.inf)) for part in scored])
    if config.pooled:
        together = np.concatenate([part.utilities for part in scored])
        rows = choose(config.selector, together, counts[0], np.random.default_rng([config.seed, 0]))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        found = [rows[(rows >= low) & (rows < high)] - low for low, high in zip(starts, starts[1:], strict=False)]
    else:
        found = [
            choose(config.selector, part.utilities, count, np.random.default_rng([config.seed, number]))
            for number, (part, count) in enumerate(zip(scored, counts, strict=True))
        ]
    return [rows[np.argsort(-part.utilities[rows], kind="stable")] for part, rows in zip(scored, found, strict=True)]


def _write(
    config: SelectConfig,
    folder: Path,
    scored: list[Scored],
    chosen: list[np.ndarray],
    loaded: Loaded | None,
) -> dict[str, Any]:
    """Writes scores and chosen examples, and gives what selection.json says of them."""
    utilities = np.concatenate([part.utilities for part in scored])
    domain = np.repeat(np.arange(len(scored)), [len(part.examples) for part in scored])
    group = np.zeros_like(domain) if config.pooled else domain
    order = np.lexsort((-utilities, group))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    table = pyarrow.table(
        {
            "domain": [scored[number].name for number in domain],
            "id": [identifier for part in scored for identifier in ids_of(part.examples)],
            "utility": utilities,
            "rank": rank + 1,
            "selected": np.concatenate(
                [np.isin(np.arange(len(p.examples)), rows) for p, rows in zip(scored, chosen, strict=True)]
            ),
            **{name: np.concatenate([part.details[name] for part in scored]) for name in scored[0].details},
        }
    )
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    write(folder / "scores.parquet", content.getvalue())
    chat = any_chat(part.examples[row] for part, at in zip(scored, chosen, strict=True) for row in at)
    rows = [
        as_row(part.examples[row], chat=chat) | {"domain": part.name, "utility": float(part.utilities[row])}
        for part, at in zip(scored, chosen, strict=True)
        for row in at
    ]
    rows.sort(key=lambda row: -row["utility"])
    write(folder / "selected.jsonl", "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return {
        "config": plain(config),
        "model": None if loaded is None else {"source": loaded.model.source, "fingerprint": loaded.model.fingerprint},
        "domains": {
            part.name: {"examples": len(part.examples), "chosen": len(at)}
            for part, at in zip(scored, chosen, strict=True)
        },
        "versions": {name: importlib.metadata.version(name) for name in ("duet_jax", "jax", "numpy")},
    }


def _cost(loaded: Loaded | None, seconds: float) -> dict[str, Any]:
    """What this run took to read, score and choose: seconds, and with a model its devices and the pool's tokens."""
    if loaded is None:
        return {"seconds": seconds}
    mesh = loaded.trainer.mesh
    tokens = sum(int(part.lengths.sum()) for part in loaded.train)
    return {"seconds": seconds, "devices": 1 if mesh is None else mesh.size, "tokens": tokens}


def _note(folder: Path, about: dict[str, Any], said: list[str]) -> None:
    write(folder / "selection.json", json.dumps({**about, "log": said}, indent=1, ensure_ascii=False) + "\n")
