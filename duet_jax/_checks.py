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


def check_truncation(sampling: Any) -> None:
    """Checks the fields by which a sampling, or the configuration of one, truncates a distribution."""
    require(sampling.top_k is None or sampling.top_k >= 1, "top_k", sampling.top_k, "at least 1, or null")
    require(0 < sampling.top_p <= 1, "top_p", sampling.top_p, "in (0, 1]")
    require(0 <= sampling.min_p <= 1, "min_p", sampling.min_p, "in [0, 1]")


def check_estimator(estimator: Any) -> None:
    """Checks the fields that an estimator of the policy gradient and its configuration have in common."""
    require(estimator.top is None or estimator.top >= 1, "top", estimator.top, "at least 1, or null")
    cap = estimator.importance_cap
    require(cap is None or cap > 0, "importance_cap", cap, "positive, or null for no importance weights")
    for name in ("top", "worst_case_protection"):
        if getattr(estimator, name) and estimator.variant == "vanilla":
            raise FieldError(name, "is of the variants of rejection; leave it out, or choose one of them.")
    if estimator.worst_case_protection and estimator.advantage == "gold":
        reason = "is 'gold', by which a label that counts as a reply counts 0; choose another with"
        raise FieldError("advantage", f"{reason} worst_case_protection.")


def distinct(name: str, items: Sequence[Any]) -> None:
    """Requires at least one item and no item twice."""
    holds = len(items) > 0 and len(set(items)) == len(items)
    require(holds, name, list(items), "a list of at least one, without repetition")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that was most likely meant, if any is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else None
