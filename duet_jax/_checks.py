"""Named validators with one style of message: PATH is VALUE; it must be RULE."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from duet_jax.errors import ConfigError


class FieldError(ConfigError):
    """One field is wrong. `path` grows from the field's own name to the full dotted path on its way out."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason

    def inside(self, path: str) -> FieldError:
        """The same error, seen from the whole of which `path` is a part."""
        return FieldError(join(path, self.path), self.reason)


def join(*parts: str) -> str:
    """A dotted path; empty parts are left out."""
    return ".".join(part for part in parts if part)


def require(holds: bool, path: str, value: Any, rule: str) -> None:
    """Raises the error 'PATH is VALUE; it must be RULE.' unless `holds`."""
    if not holds:
        raise FieldError(path, f"is {value!r}; it must be {rule}.")


def at_least(bound: int, config: Any, *names: str) -> None:
    """Requires that the named attributes of `config` are no smaller than `bound`."""
    for name in names:
        require(getattr(config, name) >= bound, name, getattr(config, name), f"at least {bound}")


def distinct(name: str, items: Sequence[Any]) -> None:
    """Requires at least one item and no item twice."""
    holds = len(items) > 0 and len(set(items)) == len(items)
    require(holds, name, list(items), "a list of at least one, without repetition")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that was most likely meant, if any is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else None
