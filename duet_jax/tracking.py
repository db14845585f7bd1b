"""Metrics of a study's trials for TensorBoard, W&B or trackio, beside its own files.

Their packages are imported when they are asked for. All three write in the background; none is waited for in a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from duet_jax.distributed.processes import first
from duet_jax.errors import ConfigError
from duet_jax.study import Study
from duet_jax.trial import Trial

# Takes the number of a step and its values.
Log = Callable[[int, Mapping[str, Any]], None]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Tracking:
    """Opens a run of the configured tracker for each trial, or does nothing without one.

    Raises:
      ConfigError: its package is not installed.
    """

    def __init__(self, study: Study):
        self._study = study
        # Of several processes the first one alone tells.
        self._config = study.config.tracking if first() else None
        self._package: Any = None
        if self._config is not None:
            kind = self._config.kind
            try:
                self._package = importlib.import_module(PACKAGES[kind])
            except ModuleNotFoundError:
                raise ConfigError(
                    f"tracking.kind is '{kind}', which needs the package {PACKAGES[kind]}; install it with: "
                    f"pip install 'duet_jax[{kind}]'."
                ) from None

    @contextmanager
    def trial(self, trial: Trial) -> Iterator[Log]:
        """A run of the tracker, begun with the first values; what is no number is left out.

        A trial that is trained on after a kill goes on in its run, in which some steps may come by twice.
        """
        sinks: list[Any] = []

        def log(step: int, values: Mapping[str, Any]) -> None:
            if self._config is None:
                return
            if not sinks:
                sinks.append(self._tensorboard(trial, step) if self._config.kind == "tensorboard" else self._run(trial))
            # The step is told as such, and its name is trackio's own.
            numbers = {name: x for name, x in values.items() if isinstance(x, int | float) and name != "step"}
            if self._config.kind != "tensorboard":
                sinks[0].log(numbers, step=step)
                return
            for name, value in numbers.items():
                sinks[0].add_scalar(name, value, step)

        try:
            yield log
        finally:
            for sink in sinks:
                sink.close() if hasattr(sink, "add_scalar") else sink.finish()

    def _tensorboard(self, trial: Trial, step: int) -> Any:
        folder = self._study.folder / "tensorboard" / f"{trial.trial:04d}"
        # What a killed process wrote of this step and later ones is hidden.
        return self._package.SummaryWriter(str(folder), purge_step=step)

    def _run(self, trial: Trial) -> Any:
        assert self._config is not None
        study, kind = self._study, self._config.kind
        # Studies may have the same name, and projects are shared; where a study lies may change.
        about_trial = f"{trial.times.get('proposed')} {sorted(trial.seeds.items())}"
        mark = hashlib.sha256(about_trial.encode()).hexdigest()[:8]
        name = f"{study.config.name}-{trial.trial:04d}-{mark}"
        about = {"mixture": trial.mixture, "counts": trial.counts, "settings": trial.settings}
        own = {"id": name, "dir": str(study.folder)} if kind == "wandb" else {}
        return self._package.init(
            project=self._config.project or study.config.name,
            name=name,
            group=study.config.name,
            config={"trial": trial.trial, **about, "training": dataclasses.asdict(study.config.training)},
            resume="allow",
            **own,
            **self._config.options,
        )
