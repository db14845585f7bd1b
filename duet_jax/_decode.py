"""Strict decoding of YAML into dataclasses; every mistake is told by its full dotted path.

Three steps: `parse` a text into plain values, `override` to replace some of them, `decode` into dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import yaml

from duet_jax._checks import FieldError, join, nearest, require
from duet_jax.errors import ConfigError

_VARIABLE = re.compile(r"\$(\$\{)|\$\{(\w+)\}")
_KINDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def decode(cls: Any, value: Any, path: str = "") -> Any:
    """Decodes `value` as the type `cls`, a dataclass or what the fields of one may hold.

    Understood are str, int, float, bool, Any, Literal, `X | None`, `tuple[X, ...]`, `Mapping[str, Any]` and
    dataclasses. `${NAME}` in a text stands for an environment variable, `$${` for itself.

    Raises:
      FieldError: the first field that is unknown, missing, of a wrong type or refused by its dataclass.
    """
    origin = typing.get_origin(cls)
    if origin in (Union, types.UnionType):
        (inner,) = (kind for kind in typing.get_args(cls) if kind is not type(None))
        return None if value is None else decode(inner, value, path)
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls, value, path)
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(decode(typing.get_args(cls)[0], item, join(path, str(i))) for i, item in enumerate(value))
    if cls is Any or origin is Mapping:
        require(cls is Any or isinstance(value, Mapping), path, value, "a mapping of names to values")
        return _free(value, path)
    return _scalar(cls, value, path)


def parse(text: str) -> Any:
    """Plain values of a YAML text; unlike PyYAML alone it refuses a name that is given twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"the text is not valid YAML{place}: {problem}.") from None


def override(tree: Any, assignment: str) -> Any:
    """A copy of `tree` after "key.sub=value", the value in YAML; numbers in a key count in lists, from 0."""
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"the override {assignment!r} must be of the form key.sub=value.")
    return _replaced(tree, key.split("."), parse(value), key)


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted path; empty lists and mappings are leaves."""
    if isinstance(tree, Mapping | list) and tree:
        pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {k: v for name, item in pairs for k, v in flat(item, join(path, str(name))).items()}
    return {path: tree}


def encode(value: Any) -> Any:
    """The plain YAML value from which `decode` makes `value` again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _dataclass(cls: Any, value: Any, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(value, Mapping):
        raise FieldError(path or "the file", f"is {value!r}; it must be a mapping with {_listed(fields)}.")
    for key in value:
        if key not in fields:
            meant = nearest(str(key), list(fields))
            hint = f"did you mean {join(path, meant)}?" if meant else f"the fields here are {_listed(fields)}."
            raise FieldError(join(path, str(key)), f"is not a field; {hint}")
    hints = typing.get_type_hints(cls)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise FieldError(join(path, name), "is missing; it has no default.")
    decoded = {name: decode(hints[name], item, join(path, name)) for name, item in value.items()}
    try:
        return cls(**decoded)
    except FieldError as error:
        raise error.inside(path) from None


def _scalar(cls: Any, value: Any, path: str) -> Any:
    if isinstance(value, str):
        replaced = _substitute(value, path)
        # A number may come from the environment; and YAML 1.1 reads 1e-3, without a point, as a text.
        if cls in (int, bool) and replaced != value:
            value = yaml.safe_load(replaced)
        elif cls is float:
            value = _as_float(replaced)
        else:
            value = replaced
    if typing.get_origin(cls) is Literal:
        choices = typing.get_args(cls)
        if value not in choices:
            meant = nearest(str(value), [str(choice) for choice in choices])
            hint = f"; did you mean {meant!r}?" if meant else "."
            raise FieldError(path, f"is {value!r}; it must be one of {_listed(choices)}{hint}")
        return value
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, cls) and (cls is bool or not isinstance(value, bool))
    require(fits and (cls is not float or math.isfinite(value)), path, value, _KINDS[cls])
    return value


def _free(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        require(all(isinstance(key, str) for key in value), path, dict(value), "a mapping with texts as names")
        return {key: _free(item, join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_free(item, join(path, str(i))) for i, item in enumerate(value)]
    require(value is None or isinstance(value, str | int | float), path, value, "a text, number, list or mapping")
    return _substitute(value, path) if isinstance(value, str) else value


def _substitute(text: str, path: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return match[1]
        if match[2] not in os.environ:
            raise FieldError(path, f"is {text!r}, but the environment variable {match[2]} is not set; set it.")
        return os.environ[match[2]]

    return _VARIABLE.sub(replace, text)


def _as_float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _listed(words: typing.Iterable[Any]) -> str:
    return ", ".join(str(word) for word in words)


def _replaced(tree: Any, keys: list[str], value: Any, whole: str) -> Any:
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    if isinstance(tree, list):
        if not first.isdecimal() or int(first) >= len(tree):
            raise FieldError(whole, f"does not exist: {first!r} is no number from 0 to {len(tree) - 1}.")
        return [_replaced(item, rest, value, whole) if i == int(first) else item for i, item in enumerate(tree)]
    if tree is not None and not isinstance(tree, Mapping):
        raise FieldError(whole, f"does not exist: {tree!r} has no field {first!r}.")
    below = dict(tree or {})
    return {**below, first: _replaced(below.get(first), rest, value, whole)}


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses repeated names, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
