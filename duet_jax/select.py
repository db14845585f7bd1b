"""A selection by itself: a pool of data in, scored and chosen data out.

Written into a folder are
  scores.parquet     a row for every training example: domain, id, utility, rank among those it was chosen from, and
                     whether it was chosen
  selected.jsonl     the chosen examples, highest utility first, with domain and utility: a source for `duet run`
  selection.json     what was done: configuration, model, counts, versions, and what was said meanwhile
  work/              utilities and what they were made of, by hash; a run that was killed goes on from there
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow
import pyarrow.parquet

from duet_jax._decode import encode as plain
from duet_jax._files import write
from duet_jax.config import SelectConfig
from duet_jax.data import Domain, Example
from duet_jax.display import Display
from duet_jax.errors import ConfigError, StudyError
from duet_jax.loading import Loaded, load, load_all, load_goal
from duet_jax.search.constraints import Constraints, round_counts
from duet_jax.selection import choose, load_utilities, pool_size


@dataclasses.dataclass(frozen=True)
class Scored:
    """The examples of a domain that can be chosen, and their utilities, float64 `[n]`."""

    name: str
    examples: Sequence[Example]
    utilities: np.ndarray


def select(config: SelectConfig, folder: Path, quiet: bool = False) -> dict[str, tuple[str, ...]]:
    """Scores the training examples of all domains and writes the chosen ones into `folder`.

    Returns:
      Ids of the chosen examples of each domain, highest utility first.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found.
      StudyError: another process selects into this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with _alone(folder), Display(1, quiet=quiet) as display:

        def say(line: str) -> None:
            said.append(line)
            display.say(line)

        domains = load_all(config.data, config.seed)
        # Before anything is computed: how many of each there are is known now.
        _counts(config, [len(domain.train) for domain in domains])
        loaded, scored = _score(config, domains, folder / "work", say, display)
        chosen = _choose(config, scored)
        _write(config, folder, scored, chosen, loaded, said)
        total = sum(len(rows) for rows in chosen)
        counts = " · ".join(f"{part.name} {len(rows)}" for part, rows in zip(scored, chosen, strict=True))
        say(f"{total} of {sum(len(part.examples) for part in scored)} examples chosen: {counts}; see {folder}")
    return {part.name: tuple(part.examples[row].id for row in rows) for part, rows in zip(scored, chosen, strict=True)}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StudyError(f"Another process selects into {folder}; wait for it, or give another folder.") from None
    with lock:
        yield


def _score(
    config: SelectConfig, domains: list[Domain], work: Path, say: Callable[[str], None], display: Display
) -> tuple[Loaded | None, list[Scored]]:
    selector = config.selector
    if config.model is None or config.training is None or not selector.scores:
        return None, [
            Scored(
                domain.name,
                domain.train,
                load_utilities(selector.kind, domain.name, domain.train, path=selector.path, cache_folder=work),
            )
            for domain in domains
        ]
    goal = load_goal(selector, config.data.domains, domains, config.seed, work)
    others = [example for _, examples in goal.targets for example in examples]
    loaded = load(config.model, config.data, config.training, domains, others, config.seed, say)
    utilities = loaded.utilities(selector, goal, work, config.seed, say, display.work)
    found = []
    for domain, encoded, values in zip(domains, loaded.train, utilities, strict=True):
        kept = set(encoded.ids)
        found.append(Scored(domain.name, [example for example in domain.train if example.id in kept], values))
    return loaded, found


def _counts(config: SelectConfig, sizes: Sequence[int]) -> list[int]:
    """Examples to choose of each domain, or of all as one.

    Raises:
      ConfigError: there are not so many.
    """
    selector, names = config.selector, [domain.name for domain in config.data.domains]
    if config.pooled:
        names, sizes, counts = ["all domains"], [sum(sizes)], [config.count]
    else:
        shares = [config.mixture.get(name, 0.0) for name in names] if config.mixture else sizes
        counts = round_counts(np.array(shares, np.float64), config.count, Constraints()).tolist()
    for name, size, count in zip(names, sizes, counts, strict=True):
        most = pool_size(size, rule=selector.rule, fraction=selector.fraction)
        if count > most:
            raise ConfigError(
                f"count is {config.count}, which asks for {count} examples of {name}, but there are {most} to choose "
                f"from; lower count{'' if config.pooled else ', or give another mixture'}."
            )
    return counts


def _choose(config: SelectConfig, scored: list[Scored]) -> list[np.ndarray]:
    """Rows of each domain that are chosen, highest utility first."""
    sizes = [len(part.examples) for part in scored]
    counts = _counts(config, sizes)
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
    said: list[str],
) -> None:
    utilities = np.concatenate([part.utilities for part in scored])
    domain = np.repeat(np.arange(len(scored)), [len(part.examples) for part in scored])
    group = np.zeros_like(domain) if config.pooled else domain
    order = np.lexsort((-utilities, group))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    table = pyarrow.table(
        {
            "domain": [scored[number].name for number in domain],
            "id": [example.id for part in scored for example in part.examples],
            "utility": utilities,
            "rank": rank + 1,
            "selected": np.concatenate(
                [np.isin(np.arange(len(p.examples)), rows) for p, rows in zip(scored, chosen, strict=True)]
            ),
        }
    )
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    write(folder / "scores.parquet", content.getvalue())
    chat = any(
        not isinstance(part.examples[row].prompt, str) for part, at in zip(scored, chosen, strict=True) for row in at
    )
    rows = [
        _row(part.name, part.examples[row], float(part.utilities[row]), chat)
        for part, at in zip(scored, chosen, strict=True)
        for row in at
    ]
    rows.sort(key=lambda row: -row["utility"])
    write(folder / "selected.jsonl", "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    about = {
        "config": plain(config),
        "model": None if loaded is None else {"source": loaded.model.source, "fingerprint": loaded.model.fingerprint},
        "domains": {
            part.name: {"examples": len(part.examples), "chosen": len(at)}
            for part, at in zip(scored, chosen, strict=True)
        },
        "versions": {name: importlib.metadata.version(name) for name in ("duet_jax", "jax", "numpy")},
        "log": said,
    }
    write(folder / "selection.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _row(domain: str, example: Example, utility: float, chat: bool) -> dict[str, Any]:
    """An example as `load_examples` reads it; with `chat`, prompt and response are one conversation."""
    row: dict[str, Any] = {"id": example.id, "domain": domain, "utility": utility}
    if chat:
        prompt = example.prompt
        turns = ([{"role": "user", "content": prompt}] if prompt else []) if isinstance(prompt, str) else list(prompt)
        row["messages"] = [*turns, {"role": "assistant", "content": example.response}]
    else:
        row |= {"prompt": example.prompt, "response": example.response}
    return {**dict(example.meta), **row}
