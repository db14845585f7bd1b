"""Everything the rounds of a study share, loaded and checked once, before any compute is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from duet_jax import models
from duet_jax._search_config import configured
from duet_jax.config import StudyConfig, TrainingConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.place import row_parts
from duet_jax.distributed.processes import led
from duet_jax.errors import ConfigError, DataError, StudyError
from duet_jax.feedback import Coarse, Engine, Task
from duet_jax.loading import Goal, check_layers, load, load_goal
from duet_jax.reading import load_all
from duet_jax.recall import make_search
from duet_jax.search import Search
from duet_jax.search.constraints import round_counts
from duet_jax.selection import choose, plan, pool_size
from duet_jax.selection.online import reference_losses
from duet_jax.training.optimiser import program_of
from duet_jax.training.sft import Trainer
from duet_jax.unseen import read_task

# Trainers whose compiled programs are kept.
MOST_TRAINERS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What a round needs.

    Attributes:
      config: the study's configuration.
      names: of the domains, in the order of every mixture.
      data: training examples of all domains, one after the other.
      sizes: examples of each domain that may be chosen, by name.
      starts: int64 `[d + 1]`, where each domain begins in `data`.
      utilities: for each domain float64 `[examples]`.
      reference: of online selection, float32 `[len(data)]`, summed losses under its reference; None without it.
      validation: held-out examples of each domain that are scored after training.
      model: the base model.
      trainer: training as the configuration has it, less online selection; see `trainer_for`.
      engine: compiled scoring and generation.
      task: the unseen task; None when feedback is told from outside.
      coarse: what is done to the task's feedback before the search hears it.
      search: the outer search.
    """

    config: StudyConfig
    names: tuple[str, ...]
    data: Encoded
    sizes: dict[str, int]
    starts: np.ndarray
    utilities: tuple[np.ndarray, ...]
    reference: np.ndarray | None
    validation: dict[str, Encoded]
    model: models.Model
    trainer: Trainer
    engine: Engine
    task: Task | None
    coarse: Coarse
    search: Search
    _trainers: dict[TrainingConfig, Trainer] = dataclasses.field(default_factory=dict)

    def counts(self, mixture: np.ndarray) -> np.ndarray:
        """Examples of each domain for a mixture, int64 `[d]`, summing to the budget."""
        return round_counts(mixture, self.config.budget, self.search.constraints)

    def trainer_for(self, settings: Mapping[str, Any]) -> Trainer:
        """Training with a trial's own settings, by dotted path.

        Trials whose settings make the same compiled programs share them; those of the last few are kept.
        """
        training = configured(self.config.training, settings)
        program = program_of(training)
        known = self._trainers.pop(program, None)
        made = dataclasses.replace(self.trainer, settings=training) if known is None else known
        found = made.retuned(training)
        self._trainers[program] = found
        while len(self._trainers) > MOST_TRAINERS:
            del self._trainers[next(iter(self._trainers))]
        return found

    def sample(self, wanted: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
        """Rows of `data` to train on, int64 `[budget]`, and what is repeated, in words."""
        selector = self.config.selector
        rows, plans = [], []
        for i, name in enumerate(self.names):
            utilities = self.utilities[i]
            eligible = int(np.count_nonzero(utilities > -np.inf))
            pool = pool_size(eligible, rule=selector.rule, fraction=selector.fraction)
            if wanted[i] > pool:
                plans.append(plan(name, pool, int(wanted[i])))
            rng = np.random.default_rng([seed, i])
            rows.append(self.starts[i] + choose(selector, utilities, int(wanted[i]), rng))
        return np.concatenate(rows), plans


def prepare(
    config: StudyConfig,
    folder: Path,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Job:
    """Loads data and model and builds what the rounds share.

    Files are read before the model is loaded, so that a mistake in them is told within seconds.

    Args:
      config: the study's configuration.
      folder: the study's directory, for examples, tokens and utilities, which are kept.
      say: is given one line of news at a time.
      on_progress: is given what a selector does, how much of it is done, and of how much.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found.
    """
    make_search(config)
    kept = folder / "data"
    domains = load_all(config.data, config.seed, kept)
    online, plain = config.training.online, dataclasses.replace(config.training, online=None)
    total = sum(len(domain.train) for domain in domains)
    if online is not None and total < online.candidates:
        raise ConfigError(
            f"training.online.candidates is {online.candidates}, but the domains have {total} training examples in "
            f"all; lower it, or add data."
        )
    # What even all examples are too few for is told before the model is loaded.
    make_search(config, _sizes(config, [len(domain.train) for domain in domains]))
    unseen = read_task(config.task, config.seed, "task")
    selector, selections = config.selector, folder / "selections"
    goal = load_goal(selector, config.data.domains, domains, config.seed, selections)
    texts = [*unseen.texts, *(example for _, examples in goal.targets for example in examples)]
    devices = jax.devices()
    loaded = load(config.model, config.data, plain, domains, texts, config.seed, say, config.mesh, devices, kept)
    model = loaded.model
    check_layers(model, config.training, _searched_layers(config))
    _check_searched_batches(config, row_parts(loaded.trainer.mesh))
    if config.task.kind == "people" and config.task.max_new_tokens > model.config.max_length - 2:
        raise ConfigError(
            f"task.max_new_tokens is {config.task.max_new_tokens}, but the model {model.source} takes at most "
            f"{model.config.max_length} tokens, of which the prompt needs some; lower task.max_new_tokens."
        )
    task = None if config.task.asked_outside else unseen.build(loaded.engine)
    held_out = {
        domain.name: loaded.encode(domain.validation[: config.data.validation_examples], f"{domain.name} (validation)")
        for domain in domains
        if domain.validation and config.data.validation_examples
    }
    reference = None
    selections.mkdir(parents=True, exist_ok=True)
    # Of workers that begin together one scores, and the others read what it kept.
    with led(lambda: _only_one(selections / ".lock", say)):
        utilities = loaded.utilities(selector, goal, selections, config.seed, say, on_progress)
        if online is not None:
            pool = loaded.pool(Goal(()), None, config.seed, say, on_progress)
            reference = reference_losses(pool, online, selections)
    for domain, values in zip(domains, utilities, strict=True):
        if not np.any(values > -np.inf):
            raise DataError(
                f"domain '{domain.name}': the selector '{selector.kind}' leaves none of its {len(values)} examples to "
                f"choose from; leave the domain out, or take another selector"
            )
    # Which examples the selector leaves out is known only now.
    sizes = _sizes(config, [int(np.count_nonzero(values > -np.inf)) for values in utilities])
    search = make_search(config, sizes)
    feedback = config.feedback
    return Job(
        config=config,
        names=tuple(domain.name for domain in domains),
        data=join(loaded.train),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum([len(one) for one in loaded.train])]),
        utilities=utilities,
        reference=reference,
        validation=held_out,
        model=model,
        trainer=loaded.trainer,
        engine=loaded.engine,
        task=task,
        coarse=Coarse(feedback.noise, feedback.stars, feedback.low, feedback.high),
        search=search,
    )


def _only_one(path: Path, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except filelock.Timeout:
        say("another worker scores the examples; this one waits for it")
        return lock.acquire()


def domain_sizes(config: StudyConfig) -> dict[str, int]:
    """Examples of each domain by name, as `prepare` finds them where no example is left out because of its length.

    Raises:
      StudyError: the selector may leave out some, which only a run finds out.
      DataError: a domain cannot be loaded.
    """
    if config.selector.scores:
        raise StudyError(
            f"search.repetition counts the examples that the selector '{config.selector.kind}' leaves to choose from, "
            f"which are not known before duet run has scored them; start that first, or take the selector 'random'."
        )
    return _sizes(config, [len(domain.train) for domain in load_all(config.data, config.seed)])


def _sizes(config: StudyConfig, counts: Sequence[int]) -> dict[str, int]:
    """Of so many examples of each domain those that the rule chooses from, by name."""
    rule, fraction = config.selector.rule, config.selector.fraction
    pairs = zip(config.data.domains, counts, strict=True)
    return {domain.name: pool_size(count, rule=rule, fraction=fraction) for domain, count in pairs}


def _check_searched_batches(config: StudyConfig, parts: int) -> None:
    """Raises a ConfigError if trials may have batches that the devices cannot share; micro-batches are not searched."""
    for setting in config.search.settings if config.training.micro_batch_size is None else ():
        if setting.field == "training.batch_size":
            low, high = setting.low, setting.high
            sizes = setting.values if low is None or high is None else range(int(low), int(high) + 1)
            wrong = [size for size in sizes if size % parts]
            if wrong:
                raise ConfigError(
                    f"search.settings: training.batch_size may be {wrong[0]}; it must be a multiple of {parts}, the "
                    f"devices along data and fsdp of the mesh."
                )


def _searched_layers(config: StudyConfig) -> list[tuple[int, ...]]:
    """What training.lora.layers may be where it is searched."""
    searched = [setting for setting in config.search.settings if setting.field == "training.lora.layers"]
    return [layers for setting in searched for layers in (setting.members, *setting.values) if layers]
