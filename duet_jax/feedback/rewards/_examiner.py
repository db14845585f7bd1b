"""Examines code with tests: the program that `unit_tests` runs in the sandbox; it imports the standard library alone.

The examiner forks before it knows the tests. The child becomes the candidate: it runs the code under test and then
answers requests, such as to call a function. The examiner runs the tests; names that the tests take from the code are
stand-ins for the candidate's objects. Only data cross between the two, rebuilt from JSON as exact built-in types, so
that nothing of the candidate's (an overloaded `__eq__`, a replaced builtin, a trace function, `atexit`) acts where the
verdict is made. The candidate never has the pipe to which that is written.

Standard input: two parts, each its length in 8 bytes and then JSON. `{"code": text}` and
`{"preamble": text, "tests": text, "entry_point": text or null}`. Standard output: JSON `{"verdict": "passed" |
"failed" | "broken", "reason": text}`, where "broken" means that the tests themselves do not work.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator

# Not of typing: every import is paid once per reply.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any, NoReturn

_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
_MADE: dict[str, Callable[[Any], Any]] = {
    "complex": lambda content: complex(*content),
    "bytes": bytes,
    "range": lambda content: range(*content),
    "type": lambda content: _TYPES[content],
}


class Lost(BaseException):
    """The candidate ended or does not keep to the protocol. No `except Exception` of a test catches it."""


class Broken(BaseException):
    """The tests cannot be run, whatever the code under test does."""


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """JSON of a value: texts, numbers and None as they are, everything else as [kind, content].

    Subclasses cross as the built-in type that they extend; `handle` gives the number of any other object.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", list(value)]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind, container in _CONTAINERS.items():
        if isinstance(value, container):
            return [kind, [encode(item, handle) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, handle), encode(item, handle)] for key, item in value.items()]]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return ["object", handle(value)]


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
    """The value of an encoding; `resolve` gives the object of a number."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind, content = value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](decode(item, resolve) for item in content)
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "object":
        return resolve(content)
    return _MADE[kind](content)


class Candidate:
    """The code under test, in a process of its own, as the examiner sees it."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self._requests = requests
        self._replies = replies
        self._objects: dict[int, Object] = {}

    def ask(self, verb: str, *arguments: Any) -> Any:
        """The result of a request; what the code raises is raised here, as the built-in exception of that name."""
        encoded = [encode(argument, self._handle) for argument in arguments]
        try:
            self._requests.write(json.dumps([verb, encoded]).encode() + b"\n")
            return self._receive()
        # Whatever the candidate may send to upset the reading of it.
        except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from None

    def result(self, verb: str, *arguments: Any) -> Any:
        """`ask`, with the exceptions of the code under test raised."""
        kind, content = self.ask(verb, *arguments)
        if kind == "value":
            return content
        name, text = content
        known = _TYPES.get(name, RuntimeError)
        raise (known if issubclass(known, Exception) else RuntimeError)(text)

    def _receive(self) -> tuple[str, Any]:
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the code under test ended the process")
        kind, content = json.loads(line)
        if kind == "value":
            return kind, decode(content, self._resolve)
        name, text = content
        return "raised", (str(name), str(text))

    def _handle(self, value: Any) -> int:
        if type(value) is not Object:
            raise Broken(f"the tests give the code an object of type {type(value).__name__}, and only data can cross")
        return object.__getattribute__(value, "_number")

    def _resolve(self, number: int) -> Object:
        return self._objects.setdefault(int(number), Object(self, int(number)))


class Object:
    """Stands for an object of the candidate's that is no data: it can be called, iterated over and given back, and its
    attributes read and set. It is equal to itself alone."""

    __slots__ = ("_candidate", "_number")

    def __init__(self, candidate: Candidate, number: int) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return _candidate(self).result("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        return _candidate(self).result("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _candidate(self).result("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = _candidate(self).result("iterate", self)
        while item := _candidate(self).result("next", iterator):
            yield item[0]


def _candidate(value: Object) -> Candidate:
    return object.__getattribute__(value, "_candidate")


def examine(candidate: Candidate, preamble: str, tests: str, entry_point: str | None) -> None:
    """Loads the code and runs the tests; returns only if all of them ran and held.

    Args:
      preamble: what the tests may use and the code under test cannot change.
      entry_point: the name of the function under test, which may be that of a builtin, or None.

    Raises:
      Broken: the tests or the preamble are no Python, or the preamble does not run.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(preamble, "preamble.py", "exec"), namespace)
        tree = ast.parse(tests)
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from None
    candidate.result("load")
    for name in _borrowed(tree, set(namespace), entry_point):
        if name in sys.stdlib_module_names:
            # A test may count on an import of the code's.
            namespace[name] = importlib.import_module(name)
        else:
            namespace[name] = candidate.result("name", name)
    exec(compile(tree, "tests.py", "exec"), namespace)


def _borrowed(tree: ast.Module, known: set[str], entry_point: str | None) -> list[str]:
    """The names that tests take from the code: the entry point, and what is neither theirs nor a builtin."""
    own = known | set(dir(builtins))
    used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used += [node.id] if isinstance(node.ctx, ast.Load) else []
            own |= set() if isinstance(node.ctx, ast.Load) else {node.id}
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            own |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            own.add(node.name)
    names = sorted({name for name in used if name not in own} | ({entry_point} if entry_point else set()))
    if names:
        return names
    # The function under test has the name of a builtin, as in `assert sum(10, 15) == 6`: it is what is called first.
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if not calls:
        raise Broken("the tests call nothing of the code under test")
    return calls[:1]


def serve(code: str, requests: int, replies: int) -> None:
    """The candidate's life: runs the code, then answers requests until there are no more."""
    objects: list[Any] = []
    namespace: dict[str, Any] = {"__name__": "candidate"}

    def handle(value: Any) -> int:
        for number, known in enumerate(objects):
            if known is value:
                return number
        objects.append(value)
        return len(objects) - 1

    def following(iterator: Iterator[Any]) -> list[Any]:
        # One item, or none at the end.
        for item in iterator:
            return [item]
        return []

    verbs: dict[str, Callable[..., Any]] = {
        "load": lambda: exec(_leading(code), namespace),
        "name": lambda name: namespace[name],
        "call": lambda function, positional, named: function(*positional, **named),
        "get": getattr,
        "set": setattr,
        "iterate": iter,
        "next": following,
    }
    with open(requests, encoding="ascii") as asked, open(replies, "w", encoding="ascii") as answers:
        for line in asked:
            verb, arguments = json.loads(line)
            try:
                result = verbs[verb](*(decode(argument, objects.__getitem__) for argument in arguments))
                reply = json.dumps(["value", encode(result, handle)])
            except Exception as error:
                reply = json.dumps(["raised", [type(error).__name__, str(error)]])
            answers.write(reply + "\n")
            answers.flush()


def _leading(code: str) -> Any:
    """The code, compiled, without the trailing statements from the first on that is no Python.

    Models go on after the code, with prose or a line that their last token cuts off.
    """
    lines = code.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if number and line[0] not in " \t\r\n"]
    for end in (len(lines), *reversed(starts)):
        try:
            return compile("".join(lines[:end]), "candidate.py", "exec")
        except SyntaxError:
            continue
    raise SyntaxError("no statement of it is Python")


def main() -> None:
    # Numbers of any length cross as decimals.
    sys.set_int_max_str_digits(0)
    code = _part()["code"]
    asked, answered = os.pipe(), os.pipe()
    if os.fork() == 0:
        _become_candidate(code, asked[0], answered[1])
    os.close(asked[0])
    os.close(answered[1])
    exam = _part()
    # Without a buffer, as closing one would try again to write what a candidate that has ended did not take.
    with (
        open(asked[1], "wb", buffering=0) as requests,
        open(answered[0], "rb") as replies,
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
    ):
        answer = _verdict(Candidate(requests, replies), exam)
    print(json.dumps(answer))


def _verdict(candidate: Candidate, exam: dict[str, Any]) -> dict[str, str]:
    try:
        examine(candidate, **exam)
    except Broken as error:
        return {"verdict": "broken", "reason": str(error)[:500]}
    except BaseException as error:
        return {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    return {"verdict": "passed", "reason": ""}


def _become_candidate(code: str, requests: int, replies: int) -> NoReturn:
    """Leaves nothing of the examiner's open but the two pipes between them."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    kept = {0, 1, 2, requests, replies}
    for descriptor in range(os.sysconf("SC_OPEN_MAX")):
        if descriptor not in kept:
            os.closerange(descriptor, descriptor + 1)
    try:
        serve(code, requests, replies)
    finally:
        os._exit(1)


def _part() -> dict[str, Any]:
    """The next part of the input. Read without a buffer: the candidate must not inherit what comes after it."""
    return json.loads(_read(int.from_bytes(_read(8), "big")))


def _read(count: int) -> bytes:
    parts = []
    while count > 0:
        parts.append(os.read(0, count))
        if not parts[-1]:
            raise EOFError("The input is not complete.")
        count -= len(parts[-1])
    return b"".join(parts)


if __name__ == "__main__":
    main()
