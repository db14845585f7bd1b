"""DUET (arXiv 2502.00270, Algorithm 1): rounds of propose, sample, train, deploy, hear and record.

    search ── mixture ── sample examples ── train ── deploy ── feedback ──┐
       └───────────────────────────── record ────────────────────────────┘

Every round is a pure function of the configuration, the round's number and the feedback before it, and leaves a
file after each stage. So a run that was killed anywhere goes on where it was, to the same end.

Where we differ from the paper: the first rounds are a space-filling design that begins with the uniform mixture,
instead of 50 random mixtures; one model is trained per mixture and all feedback is kept.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from duet_jax import job as jobs
from duet_jax.config import StudyConfig
from duet_jax.display import Display, shares
from duet_jax.errors import StudyError
from duet_jax.feedback import Deployed
from duet_jax.feedback.likelihood import response_tokens
from duet_jax.job import Job
from duet_jax.recall import at_target, make_search, recall
from duet_jax.search import Search
from duet_jax.search.constraints import round_counts
from duet_jax.study import Study
from duet_jax.training.sft import StepReport, Trained
from duet_jax.trial import Trial

MOST_FAILURES = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
      mixture: of the observed mixtures the one with the highest posterior mean, share by domain name; None
        before any feedback.
      value: that posterior mean, in units of the feedback.
      stderr: posterior standard deviation of the noise-free value.
      trial: the trial it was observed in.
      settings: the settings of that trial, by dotted path. The value is that of a trial at the target fidelity.
      waiting: trials that were trained and wait for `duet tell`.
    """

    mixture: dict[str, float] | None
    value: float | None
    stderr: float | None
    trial: int | None
    waiting: tuple[int, ...] = ()
    settings: dict[str, Any] | None = None


def run(config: StudyConfig, folder: Path, quiet: bool = False) -> Result:
    """Runs a study to its last round, from wherever its directory stands.

    With a task of kind `external` one model is trained and exported, and the run ends: the feedback comes by
    `duet tell`, and another run trains the next one, whether or not it has come.

    Raises:
      StudyError: another run holds the directory, or it belongs to another configuration.
      ConfigError, DataError, ModelError: before anything is trained.
      FeedbackError: the task could not be asked; the trained model is kept, and a new run asks again.
    """
    study = Study.open(folder, config) if Study.exists(folder) else Study.create(folder, config)
    with study.running(), Display(config.rounds, quiet=quiet) as display:
        job = jobs.prepare(config, study.folder, display.say, display.work)
        if config.search.repetition is not None:
            study.note_sizes(job.sizes)
        while (trial := _unfinished(study) or _next_trial(job, study)) is not None:
            advance(job, study, trial, display)
            if job.task is None:
                break
        result = best(study, job.search)
        if result.trial is not None:
            _forget_models(study, keep=result.trial)
            _export_best(job, study, result.trial, display)
            display.say(
                f"best mixture: {shares(result.mixture or {}, result.settings)}, expected feedback "
                f"{result.value:.4g} ± {result.stderr:.2g} (round {result.trial + 1})"
            )
        for number in result.waiting:
            display.say(
                f"trial {number} waits for its feedback: its model is in {_export_folder(study, number)}; "
                f"tell it with: duet tell {study.folder} {number} SCORE"
            )
        return result


def ask(folder: Path) -> Trial:
    """Opens a new trial at the search's next mixture, for somebody else to train and tell.

    Mixtures of open trials are taken into account, so that several can be asked for at once.

    Raises:
      StudyError: there is no such study, or `search.repetition` needs numbers that only a run finds out.
      DataError: a domain whose examples these numbers are cannot be loaded.
    """
    study = Study.open(folder)
    config = study.config
    if config.search.repetition is not None and study.sizes() is None:
        study.note_sizes(jobs.domain_sizes(config))
    search = make_search(config, study.sizes())
    with study.editing():
        return _propose(study, search, stage="asked")


def best(study: Study, search: Search) -> Result:
    """The best mixture so far, as the surrogate sees it."""
    waiting = tuple(trial.trial for trial in study.trials() if trial.status == "pending" and trial.stage == "trained")
    state, told, mixtures, _ = recall(search, study)
    if not told:
        return Result(None, None, None, None, waiting)
    settings = [at_target(study.config, trial) for trial in told]
    mean, stderr = search.predict(state, mixtures, settings)
    top = int(np.argmax(mean))
    mixture = dict(told[top].mixture)
    return Result(mixture, float(mean[top]), float(stderr[top]), told[top].trial, waiting, settings[top])


def advance(job: Job, study: Study, trial: Trial, display: Display) -> None:
    """Takes one trial from its proposal to its feedback, through whatever stages are missing."""
    began = time.perf_counter()
    display.stage(trial.trial, "training")
    trial, model = train(job, study, trial, display)
    assert trial.training is not None
    if study.trials()[trial.trial].status != "pending":
        display.say(f"round {trial.trial + 1} was closed from outside while it was trained")
        return
    if trial.diverged:
        study.abandon(trial, "the training loss is not finite")
        shutil.rmtree(_checkpoint_folder(study, trial.trial), ignore_errors=True)
        display.say(f"round {trial.trial + 1} is abandoned: the training loss is not finite")
        return
    if job.task is None:
        model.export(_export_folder(study, trial.trial))
        return
    display.stage(trial.trial, "evaluating")
    feedback = job.coarse(job.task(model), trial.seeds["feedback"])
    independent = job.config.task.kind in ("python", "command")
    study.tell(trial.trial, feedback.value, feedback.stderr, details=feedback.details, independent=independent)
    result = best(study, job.search)
    assert result.trial is not None and result.value is not None
    _forget_models(study, keep=result.trial)
    display.round(
        trial,
        trial.training["loss"],
        feedback,
        (result.trial, result.value),
        time.perf_counter() - began,
    )


def train(job: Job, study: Study, trial: Trial, display: Display) -> tuple[Trial, Deployed]:
    """Samples the trial's examples, trains on them, or goes on from its checkpoint, and notes how it went."""

    def on_step(report: StepReport) -> None:
        display.step(trial.trial, report)
        study.append_metrics([{"trial": trial.trial, **dataclasses.asdict(report)}])

    began = time.perf_counter()
    rows, repeats, trained, model = _fit(job, trial, _checkpoint_folder(study, trial.trial), on_step)
    if trial.training is None:
        notes = _notes(job, trained, model, rows, repeats, time.perf_counter() - began)
        trial = study.update(trial, stage="trained", training=notes)
    return trial, model


def _fit(
    job: Job, trial: Trial, folder: Path, on_step: Callable[[StepReport], None]
) -> tuple[np.ndarray, list[str], Trained, Deployed]:
    """Trains on the trial's counts with its settings; gives the rows, what is repeated, the training and its model."""
    rows, repeats = job.sample(np.array([trial.counts[name] for name in job.names]), trial.seeds["sample"])
    trainer = job.trainer_for(trial.settings)
    trained = trainer.fit(
        job.data,
        rows,
        seed=trial.seeds["training"],
        start_seed=job.config.seed,
        fingerprint=job.model.fingerprint,
        folder=folder,
        on_step=on_step,
        reference=job.reference,
    )
    return rows, repeats, trained, Deployed(job.engine, *trainer.deployable(trained.trainable))


def _notes(
    job: Job, trained: Trained, model: Deployed, rows: np.ndarray, repeats: list[str], seconds: float
) -> dict[str, Any]:
    validation = {
        name: float(-model.log_probs(held_out, job.config.training.batch_size).sum())
        / float(response_tokens(held_out).sum())
        for name, held_out in job.validation.items()
    }
    return {
        "loss": trained.loss,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": seconds,
        "repeats": repeats,
        "truncated": sum(job.data.cut[row] for row in np.unique(rows)),
        "validation_loss": validation,
    }


def _unfinished(study: Study) -> Trial | None:
    """The first trial of ours that was not seen through: to its feedback, or to the export that others score."""
    external = study.config.task.kind == "external"
    for trial in study.trials():
        exported = external and _export_folder(study, trial.trial).exists()
        if trial.status == "pending" and (trial.stage == "proposed" or (trial.stage == "trained" and not exported)):
            return trial
    return None


def _next_trial(job: Job, study: Study) -> Trial | None:
    """A new trial, or None when the study has all its rounds."""
    trials = study.trials()
    if len(trials) >= MOST_FAILURES and all(trial.diverged for trial in trials[-MOST_FAILURES:]):
        raise StudyError(
            f"The last {MOST_FAILURES} trials of {study.folder} failed ({trials[-1].error}); "
            f"lower training.learning_rate, or the range of it that is searched, and start a new study."
        )
    if sum(trial.status in ("pending", "completed") for trial in trials) >= study.config.rounds:
        return None
    with study.editing():
        return _propose(study, job.search, stage="proposed")


def _propose(study: Study, search: Search, *, stage: str) -> Trial:
    names, trials, config = study.domain_names, study.trials(), study.config
    number = len(trials)
    state, *_ = recall(search, study)
    # The search keeps away from what was abandoned as from what is under way; what failed may come back.
    avoided = [trial for trial in trials if trial.status in ("pending", "abandoned") or trial.diverged]
    mixture, diagnostics = search.ask(
        state,
        key=jax.random.fold_in(jax.random.key(config.seed), number),
        pending=np.array([[trial.mixture[name] for name in names] for trial in avoided]).reshape(-1, len(names)),
        pending_settings=[trial.settings for trial in avoided],
    )
    counts = round_counts(mixture, diagnostics.settings.get("budget", config.budget), search.constraints)
    # What is trained on is what the surrogate hears of: whole examples.
    realised = counts / counts.sum()
    words = np.random.SeedSequence([config.seed, number]).generate_state(3)
    return study.new_trial(
        mixture={name: float(share) for name, share in zip(names, realised, strict=True)},
        counts={name: int(count) for name, count in zip(names, counts, strict=True)},
        settings=diagnostics.settings,
        proposal={
            "mean": diagnostics.mean,
            "stderr": diagnostics.stderr,
            "acquisition": diagnostics.acquisition if math.isfinite(diagnostics.acquisition) else None,
            "gap": diagnostics.gap if math.isfinite(diagnostics.gap) else None,
            "origin": diagnostics.origin,
        },
        seeds=dict(zip(("sample", "training", "feedback"), map(int, words), strict=True)),
        stage=stage,
    )


def _checkpoint_folder(study: Study, number: int) -> Path:
    return study.folder / "checkpoints" / f"{number:04d}"


def _target_folder(study: Study, number: int) -> Path:
    """Checkpoints of a training at the target fidelity of what a trial tried at a lower one."""
    return study.folder / "checkpoints" / f"{number:04d}-target"


def _export_folder(study: Study, number: int) -> Path:
    return study.folder / "exports" / f"{number:04d}"


def _forget_models(study: Study, keep: int) -> None:
    """Removes models of finished trials other than the best; any can be trained again to the same bits."""
    for trial in study.completed():
        shutil.rmtree(_export_folder(study, trial.trial), ignore_errors=True)
        if trial.trial != keep:
            shutil.rmtree(_checkpoint_folder(study, trial.trial), ignore_errors=True)
            shutil.rmtree(_target_folder(study, trial.trial), ignore_errors=True)


def _export_best(job: Job, study: Study, number: int, display: Display) -> None:
    """Writes the best trial's model as a Hugging Face folder, training it again if its checkpoint is gone.

    A trial at a lower fidelity is trained anew at the target, which is what its mixture and settings are best for.
    """
    trial, fidelity = study.trials()[number], study.config.search.fidelity
    if trial.training is None:  # asked for and trained by somebody else
        return
    display.stage(number, "exporting")
    if fidelity is None or trial.settings[fidelity.field] == fidelity.levels[-1]:
        _, model = train(job, study, trial, display)
    else:
        mixture = np.array([trial.mixture[name] for name in job.names])
        counts = dict(zip(job.names, map(int, job.counts(mixture)), strict=True))
        settings = {**trial.settings, fidelity.field: fidelity.levels[-1]}
        whole = dataclasses.replace(trial, counts=counts, settings=settings)
        *_, model = _fit(job, whole, _target_folder(study, number), lambda report: display.step(number, report))
    model.export(study.folder / "best_model")
