"""Reward of code: 1 if it passes the unit tests of its example, else 0. HumanEval's and MBPP's formats.

HumanEval (Chen et al., arXiv 2107.03374): the prompt is Python that ends with the header of the function `entry_point`;
`test` defines `check(candidate)`. MBPP (Austin et al., arXiv 2108.07732): assertions in `test_list` or `test`, after
`test_imports` and `test_setup_code` where there are any. All of these are read from `Example.meta`, and HumanEval's
prompt from `meta["prompt"]` if it is there (for examples whose prompt is worded otherwise), else from the example.

The code of a reply is its first fenced block that defines the function, or else its first fenced block, or else the
reply itself. With HumanEval, code that defines the function takes the place of the prompt from the header on; any other
code is a continuation of the prompt, to which it is appended as it is, so that an indented body stays one. A
continuation outside of a fence ends before the first of HumanEval's stop strings, `STOPS`. Code that defines the
function outside of a fence begins at its first line that defines, imports or assigns something. Trailing lines from the
first statement on that is no Python are left out.

Each reply is examined in a sandbox of its own, in which the tests run in another process than the code (`_examiner`
says how): ending early, printing, replacing builtins, overloading comparisons, tracing, finalisers and walking frames
do not reach the verdict. What is not prevented: code that knows the answers, from the prompt or by heart; code that
looks at its arguments or counts its calls; and tests that are too weak. Since only data cross, what code does to its
arguments is not seen by the tests, tests cannot give it functions, and objects other than None, numbers, texts, bytes,
ranges, lists, tuples, sets and dictionaries are equal to themselves alone. With `unsafe` the code can do
all that a process of ours can, and forging the verdict is among the lesser things.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import _examiner, _launcher, _layout, _seccomp, sandbox
from duet_jax.feedback.rewards.reward import code_digest
from duet_jax.feedback.rewards.sandbox import Limits

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The three seconds of HumanEval's own harness, but of processor time, which a busy machine does not use up.
LIMITS = Limits(cpu_seconds=3, wall_seconds=15.0)

_FENCE = re.compile(r"^[ ]{0,3}```[^\n`]*\n(.*?)(?:^[ ]{0,3}```|\Z)", re.DOTALL | re.MULTILINE)
_FIRST = re.compile(r"^(?:(?:def|class|import|from|async)\b|@|\w+[ ]*=(?!=))", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Exam:
    """The tests of one example.

    Attributes:
      header: HumanEval's prompt, which ends with the header of the function; None in MBPP's format.
      preamble: what stands before the header: imports and functions that code and tests may use.
      tests: Python that raises where the code is wrong.
      entry_point: the name of the function under test, if it is known.
    """

    header: str | None
    preamble: str
    tests: str
    entry_point: str | None

    def code(self, reply: str) -> str:
        """The program that a reply stands for."""
        blocks = _FENCE.findall(reply)
        code = next((block for block in blocks if self._defined(block)), blocks[0] if blocks else reply)
        if self.header is not None and not self._defined(code):
            return self.header + (code if blocks else _cut(code))
        first = None if blocks else _FIRST.search(code)
        return f"{self.preamble}\n{code[first.start() :] if first else code}"

    def _defined(self, code: str) -> bool:
        return self.entry_point is not None and _definition(self.entry_point).search(code) is not None


def exam(example: Example) -> Exam:
    """Reads the tests of an example.

    Raises:
      FeedbackError: it has none, or HumanEval's do not fit its prompt.
    """
    meta = example.meta
    parts = [_texts(example, name) for name in ("test_imports", "test_setup_code", "test_list")]
    tests = "\n".join(line for part in parts for line in part) if parts[2] else "\n".join(_texts(example, "test"))
    if not tests.strip():
        raise FeedbackError(
            f"Example {example.id} has no unit tests; it needs the column 'test' (HumanEval) or 'test_list' (MBPP)."
        )
    entry_point = meta.get("entry_point")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise FeedbackError(f"Example {example.id} has entry_point {entry_point!r}; it must be the name of a function.")
    if re.search(r"^def check\(", tests, re.MULTILINE) is None:
        return Exam(None, "", tests, entry_point)
    header = _header(example)
    found = None if entry_point is None else _definition(entry_point).search(header)
    if found is None:
        raise FeedbackError(
            f"Example {example.id} is in HumanEval's format, but its prompt does not define the function "
            f"'{entry_point}' that entry_point should name; give the prompt as Python in the column 'prompt'."
        )
    if re.search(r"^check\(", tests, re.MULTILINE) is None:
        tests += f"\n\ncheck({entry_point})\n"
    return Exam(header, header[: found.start()], tests, entry_point)


def unit_tests(
    limits: Limits = LIMITS, *, unsafe: bool = False
) -> Callable[[Sequence[str], Sequence[Example]], list[float]]:
    """The function of a `Reward` with the range [0, 1]: replies and examples in, 1.0 or 0.0 for each out, in order.

    It needs no labels, `exam` is what it requires of an example, and `identity` tells what decides its values.

    Args:
      limits: of each reply.
      unsafe: run code where this machine cannot isolate it, see `sandbox.run`.

    Raises:
      FeedbackError: the machine cannot isolate code. Of the function: an example has no tests, or tests that do not
        run; or a sandbox could not be set up.
    """
    sandbox.require(unsafe=unsafe)

    def function(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        exams = [exam(example) for example in examples]
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            jobs = zip(replies, exams, examples, strict=True)
            futures = [pool.submit(_passes, *job, limits, unsafe) for job in jobs]
            return [float(future.result()) for future in futures]
        finally:
            # After an error, what has not begun need not.
            pool.shutdown(cancel_futures=True)

    return function


def identity(limits: Limits = LIMITS, *, unsafe: bool = False) -> str:
    """All that decides the values besides reply and example: limits, this code, and Python's version."""
    digest = code_digest(sys.modules[__name__], sandbox, _launcher, _layout, _seccomp, _examiner)
    python = ".".join(str(number) for number in sys.version_info[:3])
    return f"unit tests {digest}, Python {python}, {limits}, unsafe={unsafe}"


def _passes(reply: str, exam: Exam, example: Example, limits: Limits, unsafe: bool) -> bool:
    parts = (
        {"code": exam.code(reply)},
        {"preamble": exam.preamble, "tests": exam.tests, "entry_point": exam.entry_point},
    )
    texts = [json.dumps(part).encode() for part in parts]
    stdin = b"".join(len(text).to_bytes(8, "big") + text for text in texts)
    outcome = sandbox.run(_program(), limits, stdin=stdin, unsafe=unsafe)
    if outcome.status == "timeout" and outcome.exit_code is None:
        # Its time on the clock was up, not that of the processor: a busy machine may have done that.
        outcome = sandbox.run(_program(), limits, stdin=stdin, unsafe=unsafe)
    if outcome.status == "error":
        raise FeedbackError(f"The tests of example {example.id} could not be run: {outcome.stderr.strip()[-500:]}")
    # Killed or out of time or memory: whatever was written before, the tests did not run to their end.
    answer = json.loads(outcome.stdout) if outcome.status == "ok" else {"verdict": "failed"}
    if answer["verdict"] == "broken":
        raise FeedbackError(f"The tests of example {example.id} do not work: {answer['reason']}.")
    return answer["verdict"] == "passed"


def _program() -> str:
    return Path(_examiner.__file__).read_text(encoding="utf-8")


def _texts(example: Example, name: str) -> list[str]:
    """A field that holds one text, a list of texts or nothing."""
    value = example.meta.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise FeedbackError(f"Example {example.id} has {name} {value!r}; it must be a text or a list of texts.")
    return [text for text in texts if text]


def _header(example: Example) -> str:
    given = example.meta.get("prompt", example.prompt)
    return given if isinstance(given, str) else given[-1]["content"]


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async )?def {re.escape(name)}\s*\(", re.MULTILINE)


def _cut(continuation: str) -> str:
    ends = [end for stop in STOPS if (end := continuation.find(stop)) >= 0]
    return continuation[: min(ends, default=len(continuation))]
