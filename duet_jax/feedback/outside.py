"""Unseen tasks that are not ours: a Python function, or a command."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet_jax.distributed.processes import lead
from duet_jax.errors import ConfigError, FeedbackError
from duet_jax.feedback.deployed import Deployed
from duet_jax.types import Feedback


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function named `module:function` in a field; modules of the working directory are found too.

    Raises:
      ConfigError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise ConfigError(f"{field}: the module '{module_name}' cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ConfigError(
            f"{field}: the module '{module_name}' has no function '{function_name}'; write it as module:function."
        )
    return function


def source_of(function: Callable[..., Any]) -> str:
    """SHA-256 of the text of a function's module, hexadecimal.

    Changes in other modules that it imports, and in compiled ones, are not seen.
    """
    try:
        source = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        source = "compiled"
    return hashlib.sha256(source.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PythonTask:
    """Calls a function with the `Deployed` model; it returns a number, a pair (value, stderr) or a `Feedback`.

    Of several processes all call it, since each has a part of the model: they must ask it the same. What the first one
    returns counts.
    """

    function: Callable[[Deployed], Any]

    def __call__(self, model: Deployed) -> Feedback:
        return _feedback(self.function(model), f"The function {self.function.__name__}")


@dataclasses.dataclass(frozen=True)
class CommandTask:
    """Runs a command on the exported model (a Hugging Face folder) and reads the last line it prints.

    `{model}` in an argument becomes the folder, which the environment variable DUET_MODEL names as well. The
    line is a number, or JSON such as `{"value": 0.71, "stderr": 0.02}`. The folder is removed afterwards. Of several
    processes the first one runs it.
    """

    command: tuple[str, ...]

    def __call__(self, model: Deployed) -> Feedback:
        with tempfile.TemporaryDirectory(prefix="duet-model-") as parent:
            return lead(self._ask, str(model.export(Path(parent) / "model")))

    def _ask(self, folder: str) -> Feedback:
        arguments = [argument.replace("{model}", folder) for argument in self.command]
        what = f"The command {' '.join(self.command)}"
        try:
            done = subprocess.run(
                arguments,
                env={**os.environ, "DUET_MODEL": folder},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        except OSError as error:
            raise FeedbackError(f"{what} could not be started: {error}.") from error
        if done.returncode != 0:
            raise FeedbackError(f"{what} ended with status {done.returncode}; it must end with 0.")
        lines = done.stdout.strip().splitlines()
        try:
            return _feedback(json.loads(lines[-1]), what)
        except (IndexError, json.JSONDecodeError) as error:
            last = f"its last line is {lines[-1]!r}" if lines else "it printed nothing"
            raise FeedbackError(f"{what} must print a number or JSON with 'value' as its last line; {last}.") from error


def _feedback(answer: Any, what: str) -> Feedback:
    if isinstance(answer, Feedback):
        return answer
    if isinstance(answer, dict) and "value" in answer:
        answer = answer["value"], answer.get("stderr")
    value, stderr = answer if isinstance(answer, (tuple, list)) and len(answer) == 2 else (answer, None)
    try:
        return Feedback(float(value), None if stderr is None else float(stderr))
    except (TypeError, ValueError) as error:
        if isinstance(error, FeedbackError):
            raise FeedbackError(f"{what} gave {answer!r}: {error}") from error
        raise FeedbackError(
            f"{what} gave {answer!r}; it must give a number, or a value and its standard error."
        ) from error
