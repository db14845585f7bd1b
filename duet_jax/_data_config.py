"""The part of a configuration that says which data there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duet_jax._checks import FieldError, at_least, require
from duet_jax._reward_config import RewardConfig
from duet_jax._task import check_rows


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """A domain's rows and how they become examples.

    Attributes:
      source: .jsonl, .json or .parquet file, `datasets` folder, hub name, or "synthetic:KIND".
      prompt, response: columns; the response is the part that is trained on. None, for targets and for prompts that a
        model answers: there are no responses, or none that is to be read.
      messages: column with chat messages, in place of the two.
      max_examples: a seeded subsample of this size.
      options: of a synthetic kind.
      minimum, maximum: bounds of its share in every mixture.
      reward: of answers to its prompts, for the selector "nice"; None: the selector's.
    """

    name: str
    source: str
    split: str = "train"
    prompt: str = "prompt"
    response: str | None = "response"
    messages: str | None = None
    max_examples: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    minimum: float = 0.0
    maximum: float = 1.0
    reward: RewardConfig | None = None

    def __post_init__(self) -> None:
        require(0 <= self.minimum <= 1, "minimum", self.minimum, "a share, from 0 to 1")
        require(self.minimum <= self.maximum <= 1, "maximum", self.maximum, "from the minimum to 1")
        require(self.name.isprintable() and self.name.strip() != "", "name", self.name, "a name on one line")
        check_rows(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The domains, in the order of every mixture, and how their examples are cut to length.

    Attributes:
      validation_fraction: share of each domain that is never trained on.
      validation_examples: at most so many of them are scored after each training; 0 scores none.
      max_length: tokens; longer examples are cut, which is reported.
      buckets: ascending lengths that batches are padded to, the last is `max_length`. One program is compiled
        for each. Empty: a quarter, a half and the whole of `max_length`.
    """

    domains: tuple[DomainConfig, ...]
    validation_fraction: float = 0.1
    validation_examples: int = 16
    max_length: int = 256
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [domain.name for domain in self.domains]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise FieldError(f"domains.{i}.name", f"is {name!r} a second time; every domain needs its own.")
        require(0 <= self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "in [0, 1)")
        at_least(0, self, "validation_examples")
        at_least(2, self, "max_length")
        if not self.buckets:
            lengths = {max(2, self.max_length // 4), max(2, self.max_length // 2), self.max_length}
            object.__setattr__(self, "buckets", tuple(sorted(lengths)))
        ascending = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        require(ascending and self.buckets[0] >= 2, "buckets", list(self.buckets), "ascending lengths from 2")
        fits = self.buckets[-1] == self.max_length
        require(fits, "buckets", list(self.buckets), f"a list that ends with max_length ({self.max_length})")

    def require_responses(self) -> None:
        """Requires responses of every domain, for whoever reads them; the error is of the field `data`."""
        for i, domain in enumerate(self.domains):
            if domain.response is None:
                raise FieldError(f"data.domains.{i}.response", "is null, but responses are read here; name the column.")
