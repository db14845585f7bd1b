"""DUET (arXiv 2502.00270, Algorithm 1): rounds of propose, sample, train, deploy, hear and record.

    search ── mixture ── sample examples ── train ── deploy ── feedback ──┐
       └───────────────────────────── record ────────────────────────────┘

Every round is a pure function of the configuration, the round's number and the feedback before it, and leaves a
file after each stage. So a run that was killed anywhere goes on where it was, to the same end.

Where we differ from the paper: the first rounds are the uniform mixture and two random ones, instead of 50 random
mixtures; one model is trained per mixture and all feedback is kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from duet_jax import job as jobs
from duet_jax import kept, workers
from duet_jax.config import StudyConfig
from duet_jax.display import Display, shares
from duet_jax.distributed.processes import Stopped, first, lead, led, require_shared, several, shared, stop_if_told
from duet_jax.errors import DuetError, FeedbackError, StudyError
from duet_jax.feedback import Deployed
from duet_jax.feedback.likelihood import response_tokens
from duet_jax.job import Job
from duet_jax.proposals import LONG_PAUSE, new_trial, next_trial
from duet_jax.recall import at_target, make_search, recall
from duet_jax.search import Search
from duet_jax.storage import Folder, Place, Shelf, at
from duet_jax.study import Study
from duet_jax.tracking import Tracking
from duet_jax.training.sft import StepReport, Trained
from duet_jax.trial import Trial
from duet_jax.types import Feedback
from duet_jax.watching import Watch, watching
from duet_jax.workers import Worker


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


def run(
    config: StudyConfig, folder: Place, quiet: bool = False, worker: str | None = None, profile: Path | None = None
) -> Result:
    """Runs a study to its last round, from wherever it stands.

    With a task of kind `external` one model is trained and exported, and the run ends: the feedback comes by
    `duet tell`, and another run trains the next one, whether or not it has come. With a task of kind `people` the run
    goes on as `duet serve`, another process, tells what ratings there are.

    Args:
      config: the study's configuration.
      folder: the study's directory, or its address in an object store; it may be there already.
      quiet: whether nothing is printed.
      worker: a name; other processes may run the study under other names at the same time. Each trains trials of its
        own, and goes on with those of workers that died. Without a name no other process may train.
      profile: folder for a trace of a few training steps, for TensorBoard's profiler.

    Raises:
      StudyError: another run holds the directory, or a worker its name, or it belongs to another configuration, or the
        run needs a directory and not an address.
      ConfigError, DataError, ModelError: before anything is trained.
      FeedbackError: the task could not be asked; the trained model is kept, and a new run asks again.
    """
    # Hosts may have been given files that differ: all go by the first one's.
    config = lead(lambda: config)
    _check_place(folder, config, worker)
    study = _begin(folder, config)
    display = Display(config.rounds, quiet=quiet or not first(), shared=worker is not None)
    held = led(lambda: workers.alone(study) if worker is None else workers.join(study, worker, display.say))
    with held as me, display:
        tracking = Tracking(study)
        job = jobs.prepare(config, study.folder, display.say, display.work)
        if config.search.repetition is not None:
            lead(study.note_sizes, job.sizes)
        with watching(study, display, tracking, job.trainer.compute_dtype, profile) as watch:
            while (trial := next_trial(study, job.search, me, display)) is not None:
                try:
                    advance(job, study, trial, watch)
                except Exception as error:
                    # Whatever went wrong, it may be because the trial's folder is another worker's by now; or it went
                    # wrong in this one of several processes, for which it cannot decide.
                    if (several() and not isinstance(error, DuetError)) or lead(study.holds, trial):
                        raise
                    display.say(f"round {trial.trial + 1} was taken over by another worker")
                if config.task.kind == "external":
                    break
        result = lead(_settle, study, job.search)
        if result.trial is not None:
            if (number := _to_export(study, job.search, result.trial, me, display)) is not None:
                _export_best(job, study, number, display)
            display.say(
                f"best mixture: {shares(result.mixture or {}, result.settings)}, expected feedback "
                f"{result.value:.4g} ± {result.stderr:.2g} (round {result.trial + 1})"
            )
        for number in result.waiting:
            display.say(
                f"trial {number} waits for its feedback: its model is in {kept.export(study, number)}; "
                f"tell it with: duet tell {study.folder} {number} SCORE"
            )
        return result


def _check_place(place: Place, config: StudyConfig, worker: str | None) -> None:
    """Raises a StudyError for a run that needs a study in a folder, and has it in an object store."""
    storage = at(place)
    if isinstance(storage, Folder):
        return
    if worker is None:
        raise StudyError(f"{storage.address} has no locks for a run alone; give this one a name: --worker NAME.")
    if config.task.asked_outside:
        raise StudyError(
            f"The models of a task of kind '{config.task.kind}' are handed over in the study's folder, which "
            f"{storage.address} is not; give a folder that is shared."
        )


def _begin(folder: Place, config: StudyConfig) -> Study:
    """The study as this process sees it, made by the first one if there is none."""
    lead(lambda: Study.begin(folder, config) and None)
    storage = at(folder)
    if isinstance(storage, Folder):
        require_shared(storage.local / "config.yaml")
    study = Study.open(storage, config)
    scored = config.selector.scores or config.training.online is not None
    if study.remote and scored and not shared(study.folder):
        raise StudyError(
            f"{study.folder} is not seen by all processes of this run; there they keep what selectors and "
            f"training.online score: set XDG_CACHE_HOME to a folder of a file system they share, or score with duet "
            f"select first (selector.kind: utilities)."
        )
    return study


def _settle(study: Study, search: Search) -> Result:
    """The best mixture so far; the models of all other trials are removed."""
    # Read before the best is known, so that what other workers tell meanwhile is not forgotten unseen.
    told = study.completed()
    result = best(study, search)
    if result.trial is not None:
        kept.forget(study, told, result.trial)
    return result


def ask(folder: Place) -> Trial:
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
    trial = new_trial(study, make_search(config, study.sizes()), "asked")
    assert trial is not None
    return trial


def best(study: Study, search: Search) -> Result:
    """The best mixture so far, as the surrogate sees it."""
    waiting = tuple(trial.trial for trial in study.trials() if trial.status == "pending" and trial.stage == "trained")
    state, told, mixtures, _ = recall(search, study)
    if not told:
        return Result(None, None, None, None, waiting)
    settings = [at_target(study.config, trial) for trial in told]
    mean, stderr = search.predict(state, mixtures, settings)
    # Of trials as good as the same the first one: machines that share a study may round differently.
    top = int(np.argmax(mean >= mean.max() - 1e-6 * np.ptp(mean)))
    mixture = dict(told[top].mixture)
    return Result(mixture, float(mean[top]), float(stderr[top]), told[top].trial, waiting, settings[top])


def advance(job: Job, study: Study, trial: Trial, watch: Watch) -> None:
    """Takes one trial from its proposal to its feedback, through whatever stages are missing."""
    began, display = time.perf_counter(), watch.display
    display.stage(trial.trial, "training")
    with watch.tracking.trial(trial) as log:
        trial, model = train(job, study, trial, watch.steps(trial, log))
        assert trial.training is not None
        if lead(_closed, study, trial, "trained", display):
            return
        if trial.diverged:
            lead(study.abandon, trial, "the training loss is not finite")
            lead(kept.forget, study, [trial], None)
            display.say(f"round {trial.trial + 1} is abandoned: the training loss is not finite")
            return
        if job.task is None:
            if job.config.task.kind == "external":
                model.export(kept.export(study, trial.trial))
            return
        display.stage(trial.trial, "evaluating")
        feedback = job.coarse(job.task(model), trial.seeds["feedback"])
        if not lead(_tell, study, trial, feedback, display):
            return
        # TensorBoard hides what it has from the first step that a resumed run logs: not the last one of training.
        log(trial.training["steps"] + 1, {"feedback": feedback.value, "feedback_stderr": feedback.stderr})
    result = lead(_settle, study, job.search)
    assert result.trial is not None and result.value is not None
    display.round(
        trial,
        trial.training["loss"],
        feedback,
        (result.trial, result.value),
        time.perf_counter() - began,
    )


def _tell(study: Study, trial: Trial, feedback: Feedback, display: Display) -> bool:
    """Records a trial's feedback, unless it has been closed."""
    independent = study.config.task.kind in ("python", "command")
    try:
        study.tell(trial, feedback.value, feedback.stderr, details=feedback.details, independent=independent)
    except FeedbackError:
        if _closed(study, trial, "evaluated", display):
            return False
        raise
    return True


def _closed(study: Study, trial: Trial, done: str, display: Display) -> bool:
    """Whether somebody has told or closed a trial while this process trained or evaluated it; says so."""
    closed = study.trials()[trial.trial].status != "pending"
    if closed:
        display.say(f"round {trial.trial + 1} was closed from outside while it was {done}")
    return closed


def train(job: Job, study: Study, trial: Trial, on_step: Callable[[StepReport], None]) -> tuple[Trial, Deployed]:
    """Samples the trial's examples, trains on them, or goes on from its checkpoint, and notes how it went."""
    began = time.perf_counter()
    try:
        rows, repeats, trained, model = _fit(job, trial, kept.checkpoints(study, trial), on_step)
    except Stopped:
        # Another machine may go on.
        lead(study.share_metrics, trial)
        raise
    if trial.training is None:
        notes = _notes(job, trained, model, rows, repeats, time.perf_counter() - began)
        trial = lead(study.update, trial, stage="trained", training=notes)
    lead(study.share_metrics, trial)
    return trial, model


def deployed(job: Job, study: Study, trial: Trial) -> Deployed:
    """The model of a trained trial, from its checkpoint.

    Raises:
      StudyError: the checkpoint is gone.
      ModelError: it is of another model or of other data.
    """
    folder = kept.checkpoints(study, trial)
    if trial.stage == "proposed" or not folder.exists():
        raise StudyError(f"Trial {trial.trial} of {study.folder} has no trained model in {folder}.")
    return _fit(job, trial, folder, lambda report: None)[-1]


def _fit(
    job: Job, trial: Trial, folder: Path | Shelf, on_step: Callable[[StepReport], None]
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
        "truncated": job.data.take(np.unique(rows)).truncated,
        "validation_loss": validation,
    }


def _export_best(job: Job, study: Study, number: int, display: Display) -> None:
    """Writes the best trial's model as a Hugging Face folder, training it again if its checkpoint is gone.

    A trial at a lower fidelity is trained anew at the target, which is what its mixture and settings are best for.
    """
    trial, fidelity = lead(study.trials)[number], study.config.search.fidelity
    if trial.training is None:  # asked for and trained by somebody else
        return
    lock = filelock.FileLock(study.folder / "export.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(led(lambda: lock.acquire(blocking=False)))
        except filelock.Timeout:
            display.say("another worker writes the best model")
            return
        display.stage(number, "exporting")
        checkpoints = kept.checkpoints(study, trial)
        if fidelity is not None and trial.settings[fidelity.field] != fidelity.levels[-1]:
            mixture = np.array([trial.mixture[name] for name in job.names])
            counts = dict(zip(job.names, map(int, job.counts(mixture)), strict=True))
            settings = {**trial.settings, fidelity.field: fidelity.levels[-1]}
            trial = dataclasses.replace(trial, counts=counts, settings=settings)
            checkpoints = kept.target_checkpoints(study, trial)
        *_, model = _fit(job, trial, checkpoints, lambda report: display.step(number, report))
        model.export(study.folder / "best_model")
        if study.remote:
            lead(kept.publish, study, number)


def _to_export(study: Study, search: Search, number: int, me: Worker | None, display: Display) -> int | None:
    """The trial whose model this run writes: the best one. None where another worker has put it into the object store.

    In an object store the worker writes it that trained it, or any if that one is gone. Which trial is the best may
    change while this one waits.
    """
    said = ""
    while study.remote and (writer := lead(_writer, study, number, me)) != "":
        if writer is None:
            return None
        if said != writer:
            display.say(f"{writer}, which trained the best model, writes it; this worker waits for that")
            said = writer
        stop_if_told()
        time.sleep(LONG_PAUSE)
        found = lead(best, study, search).trial
        assert found is not None, "what has been told stays told"
        number = found
    return number


def _writer(study: Study, number: int, me: Worker | None) -> str | None:
    """Another worker that is to write a trial's model into the object store; "": this one; None: it is there."""
    assert me is not None, "an object store has workers alone"
    if kept.published(study) == number:
        return None
    trial = study.trials()[number]
    return "" if trial.training is None or me.gone(trial.worker) else str(trial.worker)
