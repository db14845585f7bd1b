"""The part of a configuration that says what the unseen task is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from duet_jax._checks import FieldError, at_least, require
from duet_jax._people_config import PeopleConfig
from duet_jax._reward_config import RewardConfig

BuiltIn = Literal["response_loss", "perplexity", "multiple_choice", "exact_match", "token_f1", "reward"]
TaskKind = Literal[BuiltIn, "harness", "sum", "python", "command", "external", "people"]


def check_rows(config: Any) -> None:
    """Checks the fields that say which rows of a file are read, of a domain or a task."""
    for name in ("source", "split", "prompt", "response", "messages"):
        require(getattr(config, name) != "", name, "", "a text that is not empty")
    if config.max_examples is not None:
        at_least(1, config, "max_examples")
    if config.options and not str(config.source).startswith("synthetic:"):
        raise FieldError("options", f"are for synthetic data, but the source is {config.source!r}; leave them out.")


# The fields that a kind of task uses; any other must be left at its default.
_ROWS = {"source", "split", "prompt", "response", "messages", "max_examples", "options", "batch_size"}
_TASK_FIELDS: dict[str, set[str]] = {
    "response_loss": _ROWS,
    "perplexity": _ROWS,
    "multiple_choice": _ROWS | {"normalisation"},
    "exact_match": _ROWS | {"max_new_tokens"},
    "token_f1": _ROWS | {"max_new_tokens"},
    "reward": _ROWS | {"max_new_tokens", "reward", "stop", "temperature", "samples", "best_of"},
    "harness": {"benchmark", "metric", "num_fewshot", "max_examples", "max_length", "batch_size"},
    "sum": {"tasks"},
    "python": {"function"},
    "command": {"command"},
    "external": set(),
    "people": {"people", "max_new_tokens", "temperature", "stop"},
}
_TASK_NEEDS = {"reward": "reward", "harness": "benchmark", "sum": "tasks", "python": "function", "command": "command"}


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The unseen task. The search hears its score and nothing else.

    Attributes:
      kind: what is measured; "external" feedback is told with `duet tell`, that of "people" comes from
        the page of `duet serve`.
      source, split, prompt, response, messages, max_examples, options: rows, as of a domain; the response may be None
        where a reward needs none.
      batch_size: examples in a forward pass.
      normalisation: of a choice's log-likelihood: none, or by its length in bytes.
      max_new_tokens: of a generated answer.
      reward: how good an answer is, of kind "reward".
      stop: strings that end an answer of kind "reward" or "people"; what follows the first of them is not part of it.
      temperature: of answers of kind "reward" or "people"; 0 takes the most probable token each time.
      samples: answers to each prompt; 1 of temperature 0.
      best_of: the best of so many answers counts, in expectation over `samples` of them: pass@k of programs.
      benchmark: task or group of the lm-evaluation-harness, or a task file (.yaml), of kind "harness".
      metric: of the benchmark, such as "acc" or "acc,none"; its first without one.
      num_fewshot: solved examples in a prompt of the benchmark; its own number without one.
      max_length: most tokens of a prompt and its answer in the benchmark, whose beginning is cut; those of the model
        without one.
      tasks: the parts of a "sum".
      function: "module:callable" of kind "python".
      command: program and arguments of kind "command".
      people: how testers rate answers, of kind "people".
    """

    kind: TaskKind
    source: str | None = None
    split: str = "test"
    prompt: str = "prompt"
    response: str | None = "response"
    messages: str | None = None
    max_examples: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    normalisation: Literal["raw", "length"] = "raw"
    max_new_tokens: int = 64
    reward: RewardConfig | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    samples: int = 1
    best_of: int = 1
    benchmark: str | None = None
    metric: str | None = None
    num_fewshot: int | None = None
    max_length: int | None = None
    tasks: tuple[WeightedTask, ...] = ()
    function: str | None = None
    command: tuple[str, ...] = ()
    people: PeopleConfig | None = None

    def __post_init__(self) -> None:
        used = _TASK_FIELDS[self.kind]
        for each in dataclasses.fields(self):
            default = each.default_factory() if callable(each.default_factory) else each.default
            if each.name not in used | {"kind"} and getattr(self, each.name) != default:
                raise FieldError(each.name, f"has no meaning for a task of kind {self.kind!r}; leave it out.")
        for needed in ("source", _TASK_NEEDS.get(self.kind)):
            if needed in used and not getattr(self, needed):
                raise FieldError(needed, f"is missing; a task of kind {self.kind!r} needs it.")
        if self.kind == "people" and self.people is None:
            object.__setattr__(self, "people", PeopleConfig())
        if "source" in used:
            check_rows(self)
            if self.response is None and self.kind != "reward":
                reason = "is null, but only a task of kind 'reward' can do without responses; name the column."
                raise FieldError("response", reason)
        if self.function is not None:
            named = re.fullmatch(r"[\w.]+:\w+", self.function) is not None
            require(named, "function", self.function, "of the form module:callable")
        require("" not in self.stop, "stop", list(self.stop), "a list of texts that are not empty")
        at_least(1, self, "batch_size", "max_new_tokens", "samples", "best_of")
        at_least(0, self, "temperature")
        rule = f"at most samples ({self.samples})"
        require(self.best_of <= self.samples, "best_of", self.best_of, rule)
        different = self.temperature > 0 or self.samples == 1
        require(different, "temperature", self.temperature, "greater than 0 where samples is greater than 1")
        for name, least in (("max_examples", 1), ("num_fewshot", 0), ("max_length", 2)):
            if getattr(self, name) is not None:
                at_least(least, self, name)

    @property
    def asked_outside(self) -> bool:
        """Whether feedback comes when it comes, and not from a task that a run can ask."""
        return self.kind in ("external", "people")


@dataclass(frozen=True, kw_only=True)
class WeightedTask:
    """One part of a sum of tasks."""

    weight: float
    task: TaskConfig

    def __post_init__(self) -> None:
        require(self.weight != 0, "weight", self.weight, "a number other than 0")
        if self.task.kind not in (*get_args(BuiltIn), "harness", "sum"):
            raise FieldError("task.kind", f"is {self.task.kind!r}; the parts of a sum must be built-in tasks.")
