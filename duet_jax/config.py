"""What a study is made of: frozen dataclasses, read from YAML, strictly.

A field that is unknown, missing, of a wrong type or out of range is one `ConfigError`, with the field's dotted
path, its value and what would be right. Nothing heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from duet_jax._checks import FieldError, at_least, distinct, require
from duet_jax._data_config import DataConfig
from duet_jax._data_config import DomainConfig as DomainConfig
from duet_jax._decode import decode, encode, flat, override, parse
from duet_jax._policy_config import PolicyConfig as PolicyConfig
from duet_jax._reward_config import RewardConfig as RewardConfig
from duet_jax._search_config import FidelityConfig as FidelityConfig
from duet_jax._search_config import GroupConfig as GroupConfig
from duet_jax._search_config import SearchConfig
from duet_jax._search_config import SettingConfig as SettingConfig
from duet_jax._selector_config import SelectorConfig
from duet_jax._task import TaskConfig
from duet_jax._task import WeightedTask as WeightedTask
from duet_jax.errors import ConfigError

Config = TypeVar("Config")
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
LARGEST_SEED = 2**31 - 1
# What sums of shares may miss 1 by: rounding of decimal fractions.
ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A small decoder with random weights; its tokens are the characters of the data."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        whole = self.hidden_size % (2 * self.num_heads) == 0
        require(whole, "hidden_size", self.hidden_size, f"a multiple of 2 x num_heads ({2 * self.num_heads})")
        shared = self.num_heads % self.num_kv_heads == 0
        require(shared, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: exactly one of `source` and `scratch`.

    Attributes:
      source: Hugging Face folder, .gguf file, "package:NAME" or a hub name.
      scratch: shape of a model that starts from random weights.
      dtype: of matrix products.
      chat: whether prompts go through the chat template; None: where the model has one.
      remat: what the backward pass computes again: all but the matrix products ("products", the fastest), whole layers
        ("full", needs the least memory), or nothing ("none").
    """

    source: str | None = None
    scratch: ScratchConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: bool | None = None
    remat: Literal["none", "products", "full"] = "products"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.scratch is None):
            found = "neither is given" if self.source is None else "both are given"
            raise FieldError("source", f"or scratch must describe the model, exactly one of them; {found}.")
        require(self.source != "", "source", self.source, "a folder, a .gguf file, package:NAME or a hub name")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters. `layers` counts from 0; None: all."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[Target, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "rank")
        require(self.alpha > 0, "alpha", self.alpha, "greater than 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        distinct("targets", self.targets)
        if self.layers is not None:
            distinct("layers", self.layers)
            require(min(self.layers) >= 0, "layers", list(self.layers), "a list of layer numbers from 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one round trains.

    Attributes:
      method: adapters only, or all parameters.
      learning_rate: of AdamW, at its peak.
      epochs: passes over the round's examples.
      batch_size, micro_batch_size: examples in a step and in a forward pass (None: all of the step's).
      schedule: from the peak down to zero, or constant.
      warmup_fraction: share of the steps over which the rate rises from zero.
      weight_decay: decoupled, on matrices.
      clip_norm: largest norm of the gradient.
      checkpoint_every: steps between checkpoints.
    """

    method: Literal["lora", "full"] = "lora"
    learning_rate: float
    epochs: int = 1
    batch_size: int = 8
    micro_batch_size: int | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    lora: LoraSettings = LoraSettings()
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size", "checkpoint_every")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "greater than 0")
        micro = self.micro_batch_size
        divides = micro is None or (micro >= 1 and self.batch_size % micro == 0)
        require(divides, "micro_batch_size", micro, f"a divisor of batch_size ({self.batch_size})")
        require(0 <= self.warmup_fraction <= 1, "warmup_fraction", self.warmup_fraction, "in [0, 1]")
        at_least(0, self, "weight_decay")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Makes feedback worse on purpose: Gaussian `noise` of this standard deviation is added to the score, and
    it is rounded to a scale of `stars`, one star at `low` and the most at `high`."""

    stars: int | None = None
    low: float = 0.0
    high: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, self, "noise")
        require(self.stars is None or self.stars >= 2, "stars", self.stars, "at least 2")
        require(self.low < self.high, "high", self.high, f"greater than low ({self.low})")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study. `budget` is the number of examples a round trains on, per epoch."""

    name: str
    seed: int = 0
    budget: int
    rounds: int
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    task: TaskConfig
    feedback: FeedbackConfig = FeedbackConfig()
    search: SearchConfig = SearchConfig()
    selector: SelectorConfig = SelectorConfig()

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        at_least(1, self, "budget", "rounds")
        names = [domain.name for domain in self.data.domains]
        enough = len(names) > 1 or bool(names and self.search.settings)
        require(enough, "data.domains", names, "a list of at least two domains, or of one with search.settings")
        even = 1 / len(names)
        rule = f"below {even:.3g}, the share of each of {len(names)} domains in the uniform mixture"
        require(self.search.floor < even, "search.floor", self.search.floor, rule)
        least, largest = (sum(getattr(domain, x) for domain in self.data.domains) for x in ("minimum", "maximum"))
        require(
            least <= 1 + ROUNDING, "data.domains", f"minima that sum to {least:.4g}", "minima that sum to at most 1"
        )
        enough = largest >= 1 - ROUNDING
        require(enough, "data.domains", f"maxima that sum to {largest:.4g}", "maxima that sum to at least 1")
        try:
            search = self.search.resolved(names, self.budget, self.training)
        except FieldError as error:
            raise error.inside("search") from None
        object.__setattr__(self, "search", search)
        try:
            self.selector.check(self.data)
        except FieldError as error:
            raise error.inside("selector") from None


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A selection by itself: which examples of a pool to keep.

    Attributes:
      count: examples to choose.
      mixture: share of each domain in them; empty: as the domains are large.
      pooled: whether the domains are chosen from as one.
      model, training: of a selector that looks at gradients.
    """

    name: str
    seed: int = 0
    count: int
    mixture: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False
    model: ModelConfig | None = None
    data: DataConfig
    training: TrainingConfig | None = None
    selector: SelectorConfig

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        at_least(1, self, "count")
        names = [domain.name for domain in self.data.domains]
        require(bool(names), "data.domains", names, "a list of at least one domain")
        for name, share in self.mixture.items():
            require(name in names, "mixture", name, f"made of the domains {', '.join(names)}")
            number = isinstance(share, int | float) and not isinstance(share, bool) and share >= 0
            require(number, f"mixture.{name}", share, "a number that is not negative")
        require(not self.mixture or sum(self.mixture.values()) > 0, "mixture", dict(self.mixture), "positive somewhere")
        if self.pooled and (self.mixture or (self.selector.scores and not self.selector.targets)):
            reason = "there is a mixture" if self.mixture else "each domain's utilities are for other targets"
            raise FieldError("pooled", f"is true, but {reason}; leave one of them out, or give selector.targets.")
        for part in ("model", "training") if self.selector.scores else ():
            if getattr(self, part) is None:
                raise FieldError(part, f"is missing; the selector '{self.selector.kind}' looks at gradients of it.")
        try:
            self.selector.check(self.data)
        except FieldError as error:
            raise error.inside("selector") from None


def _check_name(name: str, seed: int) -> None:
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) is not None
    require(plain, "name", name, "letters, digits, points, dashes and underscores")
    require(0 <= seed <= LARGEST_SEED, "seed", seed, f"from 0 to {LARGEST_SEED}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads a YAML file; `overrides` such as "training.epochs=2" or "data.domains.0.name=x" replace values.

    Raises:
      ConfigError: one sentence that begins with the file's path.
    """
    return _load(StudyConfig, path, overrides)


def load_selection(path: str | Path, overrides: Sequence[str] = ()) -> SelectConfig:
    """Like `load`, of a selection by itself."""
    return _load(SelectConfig, path, overrides)


def _load(kind: type[Config], path: str | Path, overrides: Sequence[str]) -> Config:
    try:
        return decode(kind, reduce(override, overrides, parse(Path(path).read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def loads(text: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Like `load`, from the text of a file."""
    return from_dict(reduce(override, overrides, parse(text)))


def from_dict(tree: Any) -> StudyConfig:
    """Decodes what a YAML file holds. Raises ConfigError."""
    return decode(StudyConfig, tree)


def dump(config: StudyConfig | SelectConfig) -> str:
    """YAML text that loads back equal; environment variables are already replaced in it."""
    return yaml.safe_dump(encode(config), sort_keys=False, allow_unicode=True, width=112)


def differences(one: StudyConfig, other: StudyConfig) -> list[str]:
    """Dotted paths of the fields in which two configurations differ."""
    left, right = flat(encode(one)), flat(encode(other))
    return [path for path in {**left, **right} if left.get(path, ...) != right.get(path, ...)]
