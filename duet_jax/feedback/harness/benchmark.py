"""A benchmark of the harness as an unseen task: loaded and rehearsed before training, then scored every round."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duet_jax._checks import FieldError, nearest
from duet_jax.errors import ConfigError, DataError, DuetError, FeedbackError
from duet_jax.feedback.deployed import Deployed, Engine
from duet_jax.types import Feedback

if TYPE_CHECKING:
    from duet_jax.config import TaskConfig

# The harness's own seeds, of Python's and NumPy's generators and of the choice of examples in prompts.
RANDOM_SEED, NUMPY_SEED, EXAMPLES_SEED = 0, 1234, 1234
# Resamples behind the standard error of a metric that has no formula for it, as a perplexity's.
BOOTSTRAP = 1000
SHORTEST = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """A task or a group of tasks of the harness, with its data.

    Attributes:
      name: of the task or group in the harness's results.
      loaded: what the harness's `TaskManager` loaded.
      limit: first examples of each task that count; None for all.
    """

    name: str
    loaded: Mapping[str, Any]
    limit: int | None

    def evaluate(self, model: Any, chat: bool, bootstrap: int) -> tuple[dict[str, Any], dict[str, bool | None]]:
        """The harness's results of this benchmark by name, and of which metrics higher is better.

        Args:
          model: a model of the harness.
          chat: whether prompts go through the chat template, examples as turns of it.
          bootstrap: resamples for standard errors; with 0 there are none, not even by formula.
        """
        from lm_eval.evaluator import evaluate

        with _as_the_harness_does():
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=EXAMPLES_SEED)
            results = evaluate(
                model,
                self.loaded,
                limit=self.limit,
                bootstrap_iters=bootstrap,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        return results["results"].get(self.name, {}), results["higher_is_better"].get(self.name, {})


def load_benchmark(config: TaskConfig) -> Benchmark:
    """Loads a benchmark by its name, or from a task file (.yaml); a group's may name tasks of files beside it.

    Raises:
      ConfigError: the harness is not installed, there is no such benchmark, or it is not one that we can measure.
      DataError: its data cannot be loaded.
    """
    _require_harness()
    name = config.benchmark
    assert name is not None
    manager, spec = _find(name)
    try:
        with _as_the_harness_does():
            loaded = manager.load(spec)
    # Task files are programs, and their data comes from anywhere: exceptions of several libraries.
    except Exception as error:
        raise DataError(f"The benchmark {name} cannot be loaded: {_reason(error)}.") from error
    for one in loaded["tasks"].values():
        _check(one, name)
        _set_examples(one, name, config.num_fewshot)
    tasks = list(loaded["tasks"])
    within = {child for children in loaded["group_map"].values() for child in children}
    tops = [one for one in (*loaded["groups"], *tasks) if one not in within]
    if len(tops) != 1:
        raise FieldError("benchmark", f"is {name!r}, a tag of {len(tops)} tasks; name one of {', '.join(tops)}.")
    return Benchmark(tops[0], loaded, config.max_examples)


@dataclasses.dataclass(frozen=True, eq=False)
class HarnessTask:
    """One metric of a benchmark, with the harness's standard error; negated where lower is better.

    Attributes:
      benchmark: what is measured.
      engine: the study's, with lengths up to all that the model can take.
      metric: name and filter of the metric, as "acc,none".
      sign: 1, or -1 where lower is better.
      batch_size: requests in a forward pass.
    """

    benchmark: Benchmark
    engine: Engine
    metric: str
    sign: int
    batch_size: int

    @classmethod
    def build(cls, benchmark: Benchmark, config: TaskConfig, engine: Engine) -> HarnessTask:
        """Rehearses the benchmark without a model, so that what is wrong with it is told before training.

        Raises:
          ConfigError: it has no such metric, or none at all, or cannot be run with this model.
          DataError: the harness fails on it.
        """
        longest = engine.model.config.max_length if config.max_length is None else config.max_length
        if longest > engine.model.config.max_length:
            most = engine.model.config.max_length
            raise FieldError("max_length", f"is {longest}, but the model {engine.model.source} takes at most {most}.")
        buckets = (*(1 << i for i in range(SHORTEST.bit_length() - 1, (longest - 1).bit_length())), longest)
        engine = dataclasses.replace(engine, buckets=buckets)
        try:
            model = _harness_model(engine, None, config.batch_size)
            results, higher_is_better = benchmark.evaluate(model, engine.chat, bootstrap=0)
        except DuetError:
            raise
        # Prompts and metrics are programs of the task's makers.
        except Exception as error:
            raise DataError(f"The benchmark {benchmark.name} cannot be evaluated: {_reason(error)}.") from error
        metric = _choose(config.metric, list(_metrics(results)), benchmark)
        higher = higher_is_better.get(metric.rpartition(",")[0])
        if higher is None:
            raise ConfigError(f"The benchmark {benchmark.name} does not say whether higher is better for {metric}.")
        return cls(benchmark, engine, metric, 1 if higher else -1, config.batch_size)

    def __call__(self, model: Deployed) -> Feedback:
        deployed = _harness_model(self.engine, model, self.batch_size)
        results, _ = self.benchmark.evaluate(deployed, self.engine.chat, BOOTSTRAP)
        metrics = _metrics(results)
        if self.metric not in metrics:
            there = ", ".join(metrics) or "none"
            raise FeedbackError(f"The benchmark {self.benchmark.name} gave no {self.metric}; its metrics are {there}.")
        name, _, chosen = self.metric.rpartition(",")
        stderr = results.get(f"{name}_stderr,{chosen}")
        error = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None  # or "N/A"
        return Feedback(self.sign * metrics[self.metric], error, metrics)


def _harness_model(engine: Engine, model: Deployed | None, batch_size: int) -> Any:
    from duet_jax.feedback.harness.model import HarnessModel

    return HarnessModel(engine, model, batch_size=batch_size)


def _require_harness() -> None:
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "A task of kind 'harness' needs lm_eval; install it with: pip install 'duet_jax[eval]'"
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < (0, 4, 12):
        raise ConfigError(f"lm_eval is {version}; it must be at least 0.4.12: pip install -U 'duet_jax[eval]'")


@lru_cache(maxsize=1)
def _own_tasks() -> Any:
    """The harness's index of its own task files, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _find(name: str) -> tuple[Any, str]:
    """An index that knows the benchmark, and how it is called there."""
    from lm_eval.tasks import TaskManager

    path = Path(name)
    if path.is_file():
        # A group cannot be loaded from its path (lm_eval 0.4.13 takes the list of its tasks for its name).
        group = re.search(r"^group:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if group is None:
            return TaskManager(include_defaults=False), name
        return TaskManager(include_path=str(path.parent), include_defaults=False), group[1].strip("'\"")
    manager = _own_tasks()
    if name not in manager.all_tasks:
        near = nearest(name, manager.all_tasks)
        raise FieldError(
            "benchmark",
            f"is {name!r}, which is no file and none of the {len(manager.all_tasks)} tasks and groups of lm_eval "
            f"(lm-eval ls tasks lists them){f'; did you mean {near!r}' if near else ''}?",
        )
    return manager, name


def _check(task: Any, name: str) -> None:
    """Refuses what a language model alone cannot, or should not, be measured by."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"The benchmark {name} runs code that the model writes, in this process; use a task of kind 'reward' with "
            f"unit tests, which runs it in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"The benchmark {name} shows images or sounds; it must be text alone.")


def _set_examples(task: Any, name: str, wanted: int | None) -> None:
    """Sets the number of solved examples in a prompt; some tasks have none in principle."""
    own = task.get_config("num_fewshot")
    if own == 0 and wanted:
        raise FieldError("num_fewshot", f"is {wanted}, but the benchmark {name} is made for 0; leave it out.")
    if wanted is not None or own is None:
        task.set_config(key="num_fewshot", value=wanted or 0)


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Metrics among a benchmark's results, which also hold standard errors, names and counts."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _choose(wanted: str | None, metrics: list[str], benchmark: Benchmark) -> str:
    if not metrics:
        tasks = ", ".join(benchmark.loaded["tasks"])
        raise ConfigError(f"The benchmark {benchmark.name} is a group without a metric of its own; use one of {tasks}.")
    found = [metric for metric in metrics if wanted in (None, metric, metric.rpartition(",")[0])]
    if not found:
        raise FieldError("metric", f"is {wanted!r}; the benchmark {benchmark.name} has {', '.join(metrics)}.")
    return found[0]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}".rstrip(".")


@contextlib.contextmanager
def _as_the_harness_does() -> Iterator[None]:
    """The harness's seeds, and its prints where they disturb nothing; afterwards all is as it was.

    It would bootstrap in forked processes, in which JAX's threads are missing and their locks held.
    """
    python, legacy = random.getstate(), np.random.get_state()
    forks = os.environ.get("DISABLE_MULTIPROC")
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks
