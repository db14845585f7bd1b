"""A curation by itself: data in, and what a model's mistakes, samples or doubts say about it out.

Written into a folder are
  the files of its kind   see the module of the kind in `duet_jax.curation`
  curation.json           what was done: configuration, model, versions, and what was said meanwhile
  work/                   trained models, replies and scores, by hash; a run that was killed goes on from there
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_jax._decode import encode as plain
from duet_jax._files import alone, write
from duet_jax.config import CurateConfig, TrainingConfig
from duet_jax.curation import (
    Bench,
    Curated,
    active_correction,
    bad_cases,
    clear,
    grounded,
    hard_examples,
    pruning,
    self_guide,
)
from duet_jax.curation.bench import Student
from duet_jax.data import load_examples
from duet_jax.display import Display
from duet_jax.loading import load, load_all

# By kind: the bench and the section of that name in, files out.
KINDS: dict[str, Callable[[Bench, Any], Curated]] = {
    "error_weights": bad_cases.curate,
    "hard_examples": hard_examples.curate,
    "self_guide": self_guide.curate,
    "grounded": grounded.curate,
    "active_correction": active_correction.curate,
    "calibration": pruning.curate,
    "clear": clear.curate,
}
# Of a model that is taken as it is, nothing of its training is read but that adapters leave the base in memory.
_UNTRAINED = TrainingConfig(learning_rate=1.0)


def curate(config: CurateConfig, folder: Path, quiet: bool = False) -> Curated:
    """Does what a configuration describes, and writes what comes of it into `folder`.

    Raises:
      ConfigError, DataError, ModelError, FeedbackError: the first mistake found.
      StudyError: another process curates into this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with alone(folder, "curates into"), Display(1, quiet=quiet) as display:

        def say(line: str) -> None:
            said.append(line)
            display.say(line)

        bench = _bench(config, folder / "work", say, display)
        found = KINDS[config.kind](bench, config.section)
        for name, content in found.files.items():
            write(folder / name, content)
        say(f"{found.summary}; see {folder}")
        about = {
            "config": plain(config),
            "model": None if bench.given is None else bench.given.fingerprint,
            "files": sorted(found.files),
            "versions": {name: importlib.metadata.version(name) for name in ("duet_jax", "jax", "numpy")},
            "log": said,
        }
        write(folder / "curation.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return found


def _bench(config: CurateConfig, work: Path, say: Callable[[str], None], display: Display) -> Bench:
    domains = load_all(config.data, config.seed)
    held_out = [example for domain in domains for example in domain.validation]
    if config.calibration is not None and config.calibration.held_out:
        held_out = [one for spec in config.calibration.held_out for one in load_examples(spec, seed=config.seed)]
    given = None
    if config.model is not None:
        loaded = load(config.model, config.data, config.training or _UNTRAINED, domains, held_out, config.seed, say)
        given = Student(
            engine=loaded.engine,
            trainer=loaded.trainer,
            train=loaded.train,
            fingerprint=loaded.model.fingerprint,
            trains=config.training is not None,
        )
    work.mkdir(exist_ok=True)
    return Bench(domains, config.seed, work, tuple(held_out), say, display.work, given)
