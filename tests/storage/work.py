"""One worker of the test that kills them: its training counts steps in checkpoints, its feedback is its claim.

Runs with the names ADDRESS, NAME, CONFIG, STEPS and ENVIRONMENT.
"""

import os
import threading
import uuid

os.environ.update(ENVIRONMENT)  # type: ignore[name-defined]  # noqa: F821

import numpy as np

from duet_jax import config as configs
from duet_jax import kept, leases, proposals, workers
from duet_jax.display import Display
from duet_jax.errors import StudyError
from duet_jax.study import Study

leases.BEAT, workers.SILENCE, proposals.PAUSE, proposals.LONG_PAUSE = 0.1, 1.0, 0.02, 0.05
proposals._propose = lambda study, search, trials: {
    "mixture": {"a": 0.5, "b": 0.5},
    "counts": {"a": 8, "b": 8},
    "settings": {},
    "proposal": None,
    "seeds": {},
}


def see_through(study, trial, name, steps):
    shelf, there = kept.checkpoints(study, trial), threading.Event()
    there.set()
    step, _ = shelf.latest() or (0, None)
    while step < steps:
        study.append_metrics([{"trial": trial.trial, "step": step, "worker": name, "claim": trial.claim}])
        study.share_metrics(trial)
        step += 1
        checkpoint = shelf.name(step, uuid.uuid4().hex)
        shelf.write_part(checkpoint, 0, np.zeros(8, np.uint8))
        shelf.finish(checkpoint, 1, {}, there, threading.Event())
    if trial.stage == "proposed":
        trial = study.update(trial, stage="trained", training={"loss": 1.0})
    study.share_metrics(trial)
    study.tell(trial, float(trial.claim))


def work(address, name, config, steps):
    study = Study.begin(address, configs.loads(config))
    with workers.join(study, name) as me, Display(study.config.rounds, quiet=True) as display:
        while (trial := proposals.next_trial(study, None, me, display)) is not None:
            try:
                see_through(study, trial, name, steps)
            except StudyError:
                # It was slow to show that it is alive, and another worker has the trial.
                if study.holds(trial):
                    raise


work(ADDRESS, NAME, CONFIG, STEPS)  # type: ignore[name-defined]  # noqa: F821
