"""A curation by itself: data in, and what a model's mistakes, samples or doubts say about it out.

Written into a folder are
  the files of its kind   see the module of the kind in `duet_jax.curation`
  curation.json           what was done: configuration, model, versions, and what was said meanwhile; files that it
                          lists and the next run does not write are removed
  work/                   tokens, trained models, replies and scores, by hash; a run that was killed goes on from there
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from duet_jax._decode import encode as plain
from duet_jax._decode import flat
from duet_jax._files import alone, write
from duet_jax.config import CurateConfig
from duet_jax.curation import (
    Bench,
    Curated,
    active_correction,
    answers,
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
from duet_jax.errors import StudyError
from duet_jax.loading import load
from duet_jax.reading import load_all

# By kind: the bench and the section of that name in, files out.
KINDS: dict[str, Callable[[Bench, Any], Curated]] = {
    "error_weights": bad_cases.curate,
    "hard_examples": hard_examples.curate,
    "self_guide": self_guide.curate,
    "grounded": grounded.curate,
    "active_correction": active_correction.curate,
    "calibration": pruning.curate,
    "clear": clear.curate,
    "answers": answers.curate,
}


def curate(config: CurateConfig, folder: Path, quiet: bool = False) -> Curated:
    """Does what a configuration describes, and writes what comes of it into `folder`.

    Raises:
      ConfigError, DataError, ModelError, FeedbackError: the first mistake found.
      StudyError: another process curates into this folder, or its curation.json is damaged.
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
        _remove_stale(config, folder, found.files, say)
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


def _remove_stale(config: CurateConfig, folder: Path, new: Container[str], say: Callable[[str], None]) -> None:
    """Removes what an earlier run wrote and this one did not, unless this one may have read it.

    Raises:
      StudyError: what the earlier run noted is damaged.
    """
    path = folder / "curation.json"
    if not path.is_file():
        return
    try:
        before = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["files"]]
    except (ValueError, TypeError, KeyError):
        raise StudyError(f"{path} is damaged; delete it, or give another folder.") from None
    named = {os.path.abspath(value) for value in flat(plain(config)).values() if isinstance(value, str)}
    for name in before:
        stale = folder / Path(name).name
        if name not in new and stale.is_file() and os.path.abspath(stale) not in named:
            stale.unlink()
            say(f"{stale}, which an earlier run wrote, is removed")


def _bench(config: CurateConfig, work: Path, say: Callable[[str], None], display: Display) -> Bench:
    domains = load_all(config.data, config.seed)
    held_out = [example for domain in domains for example in domain.validation]
    if config.calibration is not None and config.calibration.held_out:
        held_out = [one for spec in config.calibration.held_out for one in load_examples(spec, seed=config.seed)]
    given = None
    if config.model is not None:
        taught, others = domains, held_out
        if config.kind == "answers":
            # Prompts alone: they may have no responses, and none of them is cut.
            taught, others = [], [example for domain in domains for example in domain.train]
        kept = work / "data"
        loaded = load(config.model, config.data, config.training, taught, others, config.seed, say, folder=kept)
        given = Student(
            engine=loaded.engine,
            trainer=loaded.trainer,
            train=loaded.train,
            fingerprint=loaded.model.fingerprint,
            trains=config.training is not None,
        )
    work.mkdir(exist_ok=True)
    return Bench(domains, config.seed, work, tuple(held_out), say, display.work, given)
