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
from duet_jax._confidence_config import ConfidenceConfig as ConfidenceConfig
from duet_jax._curate_config import PREFERENCE as PREFERENCE
from duet_jax._curate_config import ActiveCorrectionConfig as ActiveCorrectionConfig
from duet_jax._curate_config import AnswersConfig as AnswersConfig
from duet_jax._curate_config import AskedConfig as AskedConfig
from duet_jax._curate_config import CalibrationConfig as CalibrationConfig
from duet_jax._curate_config import ClearConfig as ClearConfig
from duet_jax._curate_config import CurateSections
from duet_jax._curate_config import ErrorWeightsConfig as ErrorWeightsConfig
from duet_jax._curate_config import GroundedConfig as GroundedConfig
from duet_jax._curate_config import HardExamplesConfig as HardExamplesConfig
from duet_jax._curate_config import SelfGuideConfig as SelfGuideConfig
from duet_jax._data_config import DataConfig
from duet_jax._data_config import DomainConfig as DomainConfig
from duet_jax._decode import decode, encode, flat, override, parse
from duet_jax._mesh_config import AXES as AXES
from duet_jax._mesh_config import MeshConfig
from duet_jax._model_config import ModelConfig
from duet_jax._model_config import ScratchConfig as ScratchConfig
from duet_jax._people_config import PeopleConfig as PeopleConfig
from duet_jax._policy_config import PolicyConfig as PolicyConfig
from duet_jax._preference_config import PairsConfig as PairsConfig
from duet_jax._preference_config import PreferenceLoss as PreferenceLoss
from duet_jax._preference_config import PreferenceSections
from duet_jax._preference_config import SpinConfig as SpinConfig
from duet_jax._reward_config import RewardConfig as RewardConfig
from duet_jax._search_config import FidelityConfig as FidelityConfig
from duet_jax._search_config import GroupConfig as GroupConfig
from duet_jax._search_config import SearchConfig
from duet_jax._search_config import SettingConfig as SettingConfig
from duet_jax._selector_config import SelectorConfig
from duet_jax._task import TaskConfig
from duet_jax._task import WeightedTask as WeightedTask
from duet_jax._tracking_config import TrackingConfig
from duet_jax.errors import ConfigError

Config = TypeVar("Config")
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
LARGEST_SEED = 2**31 - 1
# What sums of shares may miss 1 by: rounding of decimal fractions.
ROUNDING = 1e-12


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
class OnlineConfig:
    """Every step trains on the best `batch_size` of more candidates (Mindermann et al., ICML 2022, algorithm 1).

    An epoch still passes over all the round's examples, as candidates: it has examples / candidates steps.

    Attributes:
      rule: what the best have: "rho", the highest loss less the reference's; "davir", the highest share of their loss
        that the reference does not have (DavIR, arXiv 2310.13008, with the current model in place of the base).
      candidates: examples that a step chooses from, a multiple of batch_size.
      reference: a model that is trained already; None: one is trained as a round is, once for the study, under "rho" on
        the domains' held-out examples and under "davir" on all that are not held out.
      token_mean: of the rule "rho": whether losses are means over tokens, or sums.
    """

    rule: Literal["rho", "davir"] = "rho"
    candidates: int
    reference: str | None = None
    token_mean: bool = True

    def __post_init__(self) -> None:
        require(self.reference != "", "reference", self.reference, "a folder, a .gguf file, package:NAME or a hub name")
        if self.rule == "davir" and not self.token_mean:
            raise FieldError("token_mean", "has no meaning for the rule 'davir', whose shares are the same for sums.")


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
      online: how each step chooses its examples; None: it trains on all that it draws.
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
    online: OnlineConfig | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size", "checkpoint_every")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "greater than 0")
        micro = self.micro_batch_size
        divides = micro is None or (micro >= 1 and self.batch_size % micro == 0)
        require(divides, "micro_batch_size", micro, f"a divisor of batch_size ({self.batch_size})")
        require(0 <= self.warmup_fraction <= 1, "warmup_fraction", self.warmup_fraction, "in [0, 1]")
        at_least(0, self, "weight_decay")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "greater than 0")
        if self.online is not None:
            more = self.drawn > self.batch_size and self.drawn % self.batch_size == 0
            rule = f"a multiple of batch_size ({self.batch_size}), and greater than it"
            require(more, "online.candidates", self.drawn, rule)

    @property
    def drawn(self) -> int:
        """Examples that a step draws: those that it trains on, or the candidates for them."""
        return self.batch_size if self.online is None else self.online.candidates


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
    """A whole study. `budget` is the number of examples a round trains on, per epoch; under `training.online`, of
    candidates that it chooses from. For `mesh` see `SelectConfig`."""

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
    mesh: MeshConfig | None = None
    tracking: TrackingConfig | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        at_least(1, self, "budget", "rounds")
        names = [domain.name for domain in self.data.domains]
        enough = len(names) > 1 or bool(names and self.search.settings)
        require(enough, "data.domains", names, "a list of at least two domains, or of one with search.settings")
        self.data.require_responses()
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
        online = self.training.online
        untrained = online is not None and online.rule == "rho" and online.reference is None
        if untrained and self.data.validation_fraction == 0:
            reason = "is missing, and data.validation_fraction is 0, so that nothing is held out to train it on"
            raise FieldError("training.online.reference", f"{reason}; give one of them.")
        field, least, fidelity = "budget", self.budget, search.fidelity
        if fidelity is not None and fidelity.field == "budget":
            field, least = "search.fidelity.levels.0", fidelity.levels[0]
        if online is not None:
            rule = f"at least training.online.candidates ({online.candidates}), of which a step chooses"
            require(least >= online.candidates, field, least, rule)
        try:
            self.selector.check(self.data)
        except FieldError as error:
            raise error.inside("selector") from None


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A selection by itself: which examples of a pool to keep.

    Attributes:
      count: examples to choose, or
      share: how many they are of all that can be chosen, rounded down, as 0.05.
      mixture: share of each domain in them; empty: as the domains are large.
      pooled: whether the domains are chosen from as one.
      model: of a selector that computes its scores, and of an evaluation.
      training: of a selector that trains, and of an evaluation.
      evaluate: task that a model trained on the chosen examples is scored by; None: no model is trained on them.
      baselines: models that are scored beside it: the base as it is; one trained on as many random examples (of each
        domain, unless `pooled`); one trained on all examples, by the same `training`, as papers compare with full data:
        as many passes, so more steps.
      mesh: how the work is spread over devices; None: chosen, by their number and memory and the size of the model.
    """

    name: str
    seed: int = 0
    count: int | None = None
    share: float | None = None
    mixture: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False
    model: ModelConfig | None = None
    data: DataConfig
    training: TrainingConfig | None = None
    selector: SelectorConfig
    evaluate: TaskConfig | None = None
    baselines: tuple[Literal["none", "random", "all"], ...] = ("none", "random")
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        if (self.count is None) == (self.share is None):
            found = "neither is given" if self.count is None else "both are given"
            raise FieldError("count", f"or share must say how many examples to choose, exactly one of them; {found}.")
        require(self.count is None or self.count >= 1, "count", self.count, "at least 1")
        require(self.share is None or 0 < self.share <= 1, "share", self.share, "greater than 0, and at most 1")
        names = [domain.name for domain in self.data.domains]
        require(bool(names), "data.domains", names, "a list of at least one domain")
        self.data.require_responses()
        for name, share in self.mixture.items():
            require(name in names, "mixture", name, f"made of the domains {', '.join(names)}")
            number = isinstance(share, int | float) and not isinstance(share, bool) and share >= 0
            require(number, f"mixture.{name}", share, "a number that is not negative")
        require(not self.mixture or sum(self.mixture.values()) > 0, "mixture", dict(self.mixture), "positive somewhere")
        # These score each domain's examples for its own held-out ones. One reference serves all domains of "rho".
        apart = self.selector.kind in ("influence", "less", "nice") and not self.selector.targets
        if self.pooled and (self.mixture or apart):
            reason = "there is a mixture" if self.mixture else "each domain's utilities are for other targets"
            raise FieldError("pooled", f"is true, but {reason}; leave one of them out, or give selector.targets.")
        if self.pooled and self.selector.kind in ("log_det", "facility_location", "k_center"):
            reason = f"is true, but the selector '{self.selector.kind}' searches each domain by itself; leave it out."
            raise FieldError("pooled", reason)
        selector = f"the selector '{self.selector.kind}'"
        for part, needed in (("model", self.selector.scores), ("training", self.selector.trains)):
            if getattr(self, part) is None and (needed or self.evaluate is not None):
                raise FieldError(part, f"is missing; {selector if needed else 'an evaluation'} needs it.")
        if self.training is not None and self.training.online is not None:
            raise FieldError("training.online", "is of the rounds of a study; leave it out of a selection.")
        self._check_evaluation()
        try:
            self.selector.check(self.data)
        except FieldError as error:
            raise error.inside("selector") from None

    def _check_evaluation(self) -> None:
        if self.evaluate is not None and self.evaluate.asked_outside:
            kind = self.evaluate.kind
            reason = f"is '{kind}', but a selection asks nobody outside; choose another kind, or leave evaluate out."
            raise FieldError("evaluate.kind", reason)
        once = len(set(self.baselines)) == len(self.baselines)
        require(once, "baselines", list(self.baselines), "a list without repetition")
        if self.evaluate is None and self.baselines != type(self).__dataclass_fields__["baselines"].default:
            raise FieldError("baselines", "have no meaning without evaluate; leave them out, or give it.")


@dataclass(frozen=True, kw_only=True)
class CurateConfig(CurateSections):
    """A curation. `model` is asked, sampled or pruned; with `training` it is first trained on the domains, without it
    is taken as it is."""

    name: str
    seed: int = 0
    model: ModelConfig | None = None
    training: TrainingConfig | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        self.check(self.model, self.training)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(PreferenceSections):
    """A preference training. Of `training`, batches are of pairs, so of twice as many sequences."""

    name: str
    seed: int = 0
    model: ModelConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        _check_name(self.name, self.seed)
        if self.training.online is not None:
            raise FieldError("training.online", "is of the rounds of a study; leave it out of a preference training.")
        self.check_pairs()


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


def load_curation(path: str | Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Like `load`, of a curation."""
    return _load(CurateConfig, path, overrides)


def load_preference(path: str | Path, overrides: Sequence[str] = ()) -> PreferenceConfig:
    """Like `load`, of a preference training."""
    return _load(PreferenceConfig, path, overrides)


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


def dump(config: StudyConfig | SelectConfig | PreferenceConfig) -> str:
    """YAML text that loads back equal; environment variables are already replaced in it."""
    return yaml.safe_dump(encode(config), sort_keys=False, allow_unicode=True, width=112)


def differences(one: Config, other: Config) -> list[str]:
    """Dotted paths of the fields in which two configurations differ."""
    left, right = flat(encode(one)), flat(encode(other))
    return [path for path in {**left, **right} if left.get(path, ...) != right.get(path, ...)]
