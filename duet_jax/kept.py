"""The models of a study that are on disk: checkpoints of its trials, and exports for somebody else to score.

    checkpoints/NNNN          of a trial
    checkpoints/NNNN-C        of its claim number C, where workers share the study
    checkpoints/NNNN-target   of a training at the target fidelity of what the trial tried at a lower one
    exports/NNNN              a Hugging Face folder that waits to be scored

Each claim of a trial has a folder of its own, which begins as the one before it: a worker that was taken for dead and
still writes cannot touch it. Of a study in an object store the checkpoints are there, too (`Shelf`), and a claim goes
on from those of earlier ones until it has its own. The best model is copied into the store:

    best_model/NNNN/  the Hugging Face folder of trial NNNN
    best_model.json   which of them is the best, written when it is there as a whole
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from duet_jax.errors import StudyError
from duet_jax.storage import Large, Shelf, discard
from duet_jax.study import Study
from duet_jax.trial import Trial


def checkpoints(study: Study, trial: Trial) -> Path | Shelf:
    """Checkpoints of a trial under its present claim."""
    if isinstance(study.storage, Large):
        names = [f"checkpoints/{_of_claim(trial, claim)}" for claim in reversed(range(trial.claim + 1))]
        return Shelf(study.storage, names[0], names[1:])
    return study.folder / "checkpoints" / _of_claim(trial, trial.claim)


def target_checkpoints(study: Study, trial: Trial) -> Path | Shelf:
    """Checkpoints of a training at the target fidelity."""
    name = f"{trial.trial:04d}-target"
    if isinstance(study.storage, Large):
        return Shelf(study.storage, f"checkpoints/{name}")
    return study.folder / "checkpoints" / name


def export(study: Study, number: int) -> Path:
    """The exported model of a trial."""
    return study.folder / "exports" / f"{number:04d}"


def inherit(study: Study, trial: Trial) -> None:
    """Gives a claim that was just made what the one before it left; for its holder alone to call."""
    if study.remote:
        return
    parent = study.folder / "checkpoints"
    for claim in reversed(range(trial.claim)):
        left = parent / _of_claim(trial, claim)
        if left.exists():
            left.rename(parent / _of_claim(trial, trial.claim))
            return


def forget(study: Study, told: Sequence[Trial], keep: int | None) -> None:
    """Removes the models of trials that are through, but the checkpoints of trial `keep`.

    Any of them can be trained again to the same bits. What was told from outside while a worker trains it keeps its
    checkpoints, into which that worker still writes.
    """
    trained = [trial for trial in told if trial.trial != keep and trial.training is not None]
    for trial in told:
        shutil.rmtree(export(study, trial.trial), ignore_errors=True)
    if isinstance(study.storage, Large):
        numbers = {f"{trial.trial:04d}" for trial in trained}
        names = study.storage.listed("checkpoints") if numbers else []
        discard(study.storage, [name for name in names if name.split("/")[1].partition("-")[0] in numbers])
        return
    for trial in trained:
        of_claims = (study.folder / "checkpoints").glob(f"{trial.trial:04d}-*")
        for folder in (study.folder / "checkpoints" / _of_claim(trial, 0), *of_claims):
            shutil.rmtree(folder, ignore_errors=True)


def publish(study: Study, number: int) -> None:
    """Copies the best model, of a trial, into the study's object store."""
    folder = study.folder / "best_model"
    for path in sorted(folder.iterdir()):
        study.storage.upload(path, f"best_model/{number:04d}/{path.name}")
    study.storage.write("best_model.json", json.dumps({"trial": number}).encode())


def published(study: Study) -> int | None:
    """The trial whose model was copied last, None before.

    Raises:
      StudyError: best_model.json is damaged.
    """
    try:
        return int(json.loads(study.storage.read("best_model.json")[0])["trial"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise StudyError(f"{study.address}/best_model.json is damaged; delete it.") from None


def _of_claim(trial: Trial, claim: int) -> str:
    return f"{trial.trial:04d}" + (f"-{claim}" if claim else "")
