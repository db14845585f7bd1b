"""The unseen task of a configuration: read before there is a model, and built before anything is scored or trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from duet_jax._checks import FieldError
from duet_jax._decode import encode as plain
from duet_jax.config import DomainConfig, TaskConfig
from duet_jax.data import Example, load_examples
from duet_jax.feedback import CommandTask, Engine, PythonTask, Task, WeightedSum, build, load_function
from duet_jax.feedback.harness import Benchmark, HarnessTask, load_benchmark
from duet_jax.feedback.outside import source_of
from duet_jax.feedback.rewards.cache import as_json
from duet_jax.feedback.tasks import Rewarded


@dataclasses.dataclass(frozen=True, eq=False)
class Unseen:
    """A task whose files have been read.

    Attributes:
      config: of the task.
      place: in the configuration, as "task.tasks[0].task", by which errors name it and its examples are drawn.
      examples: of a built-in task.
      benchmark: of kind "harness".
      function: of kind "python".
      parts: of a sum.
    """

    config: TaskConfig
    place: str
    examples: tuple[Example, ...] = ()
    benchmark: Benchmark | None = None
    function: Callable[..., Any] | None = None
    parts: tuple[Unseen, ...] = ()

    @property
    def texts(self) -> tuple[Example, ...]:
        """The examples of all built-in tasks."""
        return self.examples + tuple(example for part in self.parts for example in part.texts)

    def build(self, engine: Engine) -> Task:
        """The task for models of one shape, its examples encoded and its rewards rehearsed.

        Raises:
          ConfigError, DataError, FeedbackError, ModelError: the first mistake found.
        """
        if self.parts:
            built = [part.build(engine) for part in self.parts]
            return WeightedSum(tuple((one.weight, task) for one, task in zip(self.config.tasks, built, strict=True)))
        if self.benchmark is not None:
            try:
                return HarnessTask.build(self.benchmark, self.config, engine)
            except FieldError as error:
                raise error.inside(self.place) from None
        if self.function is not None:
            return PythonTask(self.function)
        if self.config.kind == "command":
            return CommandTask(tuple(self.config.command))
        return build(self.config, engine, self.examples, self.place)

    def identity(self, task: Task) -> list[Any]:
        """What decides a model's score, as values of JSON.

        A function and a reward are known by the text of their modules. Files that a command names, and a benchmark that
        is one, are known by their contents; what they read in turn, only by its name.

        Args:
          task: what `build` made.
        """
        if isinstance(task, WeightedSum):
            parts = zip(self.parts, task.parts, strict=True)
            return [plain(self.config), [part.identity(one) for part, (_, one) in parts]]
        read = json.dumps([dataclasses.astuple(example) for example in self.examples], default=as_json, sort_keys=True)
        reward = task.reward.identity if isinstance(task, Rewarded) else None
        source = None if self.function is None else source_of(self.function)
        named = [*self.config.command, *([] if self.config.benchmark is None else [self.config.benchmark])]
        files = [_content(word) for word in named if os.path.isfile(word)]
        return [plain(self.config), hashlib.sha256(read.encode()).hexdigest(), reward, source, files]


def _content(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_task(config: TaskConfig, seed: int, place: str) -> Unseen:
    """Reads the examples of a (possibly nested) task, and finds its benchmarks and function.

    Args:
      config: of the task.
      seed: of subsamples.
      place: where the task stands in the configuration, as "task".

    Raises:
      ConfigError: there is no such benchmark or function.
      DataError: examples cannot be read.
    """
    if config.kind == "sum":
        parts = [read_task(part.task, seed, f"{place}.tasks[{i}].task") for i, part in enumerate(config.tasks)]
        return Unseen(config, place, parts=tuple(parts))
    if config.kind == "harness":
        try:
            return Unseen(config, place, benchmark=load_benchmark(config))
        except FieldError as error:
            raise error.inside(place) from None
    if config.function is not None:
        return Unseen(config, place, function=load_function(config.function, f"{place}.function"))
    if config.source is None:
        return Unseen(config, place)
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
    return Unseen(config, place, examples=tuple(load_examples(spec, seed=seed)))
