"""Everything the rounds of a study share, loaded and checked once, before any compute is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duet_jax import models
from duet_jax._search_config import configured
from duet_jax.config import DomainConfig, StudyConfig, TaskConfig, TrainingConfig
from duet_jax.data import Domain, Encoded, Example, join, load_examples
from duet_jax.errors import ConfigError
from duet_jax.feedback import Coarse, CommandTask, Engine, PythonTask, Task, WeightedSum, build, load_function
from duet_jax.feedback.harness import Benchmark, HarnessTask, load_benchmark
from duet_jax.loading import load, load_all, load_goal
from duet_jax.recall import make_search
from duet_jax.search import Search
from duet_jax.search.constraints import round_counts
from duet_jax.selection import choose, plan, pool_size
from duet_jax.training.optimiser import program_of
from duet_jax.training.sft import Trainer

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
      validation: held-out examples of each domain that are scored after training.
      model: the base model.
      trainer: compiled training, as the configuration has it; see `trainer_for`.
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
            pool = pool_size(len(utilities), rule=selector.rule, fraction=selector.fraction)
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
      folder: the study's directory, for cached utilities.
      say: is given one line of news at a time.
      on_progress: is given what a selector does, how much of it is done, and of how much.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found.
    """
    make_search(config)
    domains = load_all(config.data, config.seed)
    sizes = _sizes(config, domains)
    search = make_search(config, sizes)
    evaluation = _task_examples(config.task, config.seed, "task")
    benchmarks = _benchmarks(config.task)
    function = None if config.task.function is None else load_function(config.task.function)
    selector, selections = config.selector, folder / "selections"
    goal = load_goal(selector, config.data.domains, domains, config.seed, selections)
    texts = [example for _, examples in [*evaluation, *goal.targets] for example in examples]
    loaded = load(config.model, config.data, config.training, domains, texts, config.seed, say)
    model = loaded.model
    _check_layers(config, model)
    task = None
    if config.task.kind != "external":
        task = _build_task(config.task, loaded.engine, iter(evaluation), iter(benchmarks), function)
    held_out = {
        domain.name: loaded.encode(domain.validation[: config.data.validation_examples], f"{domain.name} (validation)")
        for domain in domains
        if domain.validation and config.data.validation_examples
    }
    utilities = loaded.utilities(selector, goal, selections, config.seed, say, on_progress)
    feedback = config.feedback
    return Job(
        config=config,
        names=tuple(domain.name for domain in domains),
        data=join(loaded.train),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum([len(one) for one in loaded.train])]),
        utilities=utilities,
        validation=held_out,
        model=model,
        trainer=loaded.trainer,
        engine=loaded.engine,
        task=task,
        coarse=Coarse(feedback.noise, feedback.stars, feedback.low, feedback.high),
        search=search,
    )


def domain_sizes(config: StudyConfig) -> dict[str, int]:
    """Examples of each domain that may be chosen, by name, as `prepare` finds them.

    Raises:
      DataError: a domain cannot be loaded.
    """
    return _sizes(config, load_all(config.data, config.seed))


def _sizes(config: StudyConfig, domains: Sequence[Domain]) -> dict[str, int]:
    rule, fraction = config.selector.rule, config.selector.fraction
    return {domain.name: pool_size(len(domain.train), rule=rule, fraction=fraction) for domain in domains}


def _check_layers(config: StudyConfig, model: models.Model) -> None:
    """Layers with adapters must be those of the model, also where they are searched."""
    searched = [setting for setting in config.search.settings if setting.field == "training.lora.layers"]
    chosen = [config.training.lora.layers, *(one for setting in searched for one in (setting.members, *setting.values))]
    last = model.config.num_layers - 1
    for layers in chosen if config.training.method == "lora" else ():
        if layers and max(layers) > last:
            raise ConfigError(
                f"training.lora.layers may be {list(layers)}, but the layers of {model.source} are 0 to {last}."
            )


def _task_examples(config: TaskConfig, seed: int, place: str) -> list[tuple[str, list[Example]]]:
    """Name and examples of every built-in task of a (possibly nested) task, in order."""
    if config.kind == "sum":
        nested = [_task_examples(part.task, seed, f"{place}.tasks[{i}].task") for i, part in enumerate(config.tasks)]
        return [pair for part in nested for pair in part]
    if config.source is None:
        return []
    spec = DomainConfig(
        name=place,
        source=config.source,
        split=config.split,
        prompt=config.prompt,
        response=config.response,
        messages=config.messages,
        max_examples=config.max_examples,
        options=config.options,
    )
    return [(place, load_examples(spec, seed=seed))]


def _benchmarks(config: TaskConfig) -> list[Benchmark]:
    """Every benchmark of a (possibly nested) task, in order."""
    if config.kind == "sum":
        return [benchmark for part in config.tasks for benchmark in _benchmarks(part.task)]
    return [load_benchmark(config)] if config.kind == "harness" else []


def _build_task(  # type: ignore[no-untyped-def]
    config: TaskConfig, engine: Engine, evaluation, benchmarks, function
) -> Task:
    if config.kind == "sum":
        parts = [(part.weight, _build_task(part.task, engine, evaluation, benchmarks, None)) for part in config.tasks]
        return WeightedSum(tuple(parts))
    if config.kind == "harness":
        return HarnessTask.build(next(benchmarks), config, engine)
    if config.kind == "python":
        return PythonTask(function)
    if config.kind == "command":
        return CommandTask(tuple(config.command))
    name, examples = next(evaluation)
    return build(config, engine, examples, name)
