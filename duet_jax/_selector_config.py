"""The part of a configuration that says which examples of a domain are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, require
from duet_jax._data_config import DataConfig, DomainConfig
from duet_jax._policy_config import PolicyConfig
from duet_jax._reward_config import RewardConfig

# The fields that a kind uses besides `kind`, `rule` and `fraction`; any other must be left at its default.
_WARMUP = {"targets", "warmup_examples", "warmup_epochs"}
_SKETCHES = {"form", "k", "row_format"}
_FIELDS: dict[str, set[str]] = {
    "random": set(),
    "utilities": {"path"},
    "influence": _WARMUP | {"damping"},
    "less": _WARMUP | _SKETCHES,
    "nice": _WARMUP | _SKETCHES | {"policy", "reward"},
}


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """A utility for every example, and the rule that turns utilities and a count into a choice.

    Attributes:
      kind: "random", equal utilities; "utilities", those of a file; "influence", how much an example lowers the loss
        of the targets by EK-FAC influence functions; "less", how much its step of Adam points along their gradients
        over a short training (LESS, arXiv 2402.04333); "nice", along the gradient of the expected reward of the model's
        own replies to their prompts (NICE, Wang et al., ICML 2025).
      path: of the file with utilities.
      rule: that turns utilities and a count into examples.
      fraction: share that the rule "remove_lowest" removes.
      targets: what the examples should do well on, each with its own score: their mean counts under "influence",
        their maximum under "less" and "nice"; those of "nice" may have no responses. Empty: each domain's examples are
        for its own held-out ones, under "influence" by a model that was trained on this domain alone (DUET, arXiv
        2502.00270, section 3.2).
      warmup_examples: at most so many random training examples train the model whose gradients are looked at.
      warmup_epochs: passes over them; "less" and "nice" look at the model after each.
      damping: added to the curvature, in units of its mean in each layer.
      form: formulas of the paper, or of its published code.
      k: numbers kept of each gradient.
      row_format: that they are stored in.
      policy: of kind "nice": how replies are sampled, and what is made of their rewards; None: as by default.
      reward: of kind "nice": how good a reply is, where the target or domain has no `reward` of its own.
    """

    kind: Literal["random", "utilities", "influence", "less", "nice"] = "random"
    path: str | None = None
    rule: Literal["weighted", "top_k", "remove_lowest"] = "weighted"
    fraction: float = 0.2
    targets: tuple[DomainConfig, ...] = ()
    warmup_examples: int = 256
    warmup_epochs: int = 4
    damping: float = 0.1
    form: Literal["paper", "code"] = "paper"
    k: int = 8192
    row_format: Literal["float32", "bfloat16", "int8", "int4", "1bit"] = "int8"
    policy: PolicyConfig | None = None
    reward: RewardConfig | None = None

    def __post_init__(self) -> None:
        if self.kind == "utilities" and not self.path:
            raise FieldError("path", "is missing; a selector of kind 'utilities' needs the file with them.")
        if self.kind == "nice":
            object.__setattr__(self, "policy", self.policy or PolicyConfig())
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        used = _FIELDS[self.kind] | ({"kind"} if self.kind == "random" else {"kind", "rule", "fraction"})
        for name, default in defaults.items():
            if name not in used and getattr(self, name) != default:
                raise FieldError(name, f"has no meaning for a selector of kind '{self.kind}'; leave it out.")
        require(0 <= self.fraction < 1, "fraction", self.fraction, "in [0, 1)")
        at_least(1, self, "warmup_examples", "warmup_epochs")
        require(self.damping > 0, "damping", self.damping, "greater than 0")
        require(self.k >= 32 and self.k % 32 == 0, "k", self.k, "a positive multiple of 32")
        names = [target.name for target in self.targets]
        for i, target in enumerate(self.targets):
            if target.name in names[:i]:
                raise FieldError(f"targets.{i}.name", f"is {target.name!r} a second time; every target needs its own.")
            if (target.minimum, target.maximum) != (0.0, 1.0):
                raise FieldError(f"targets.{i}", "has a minimum or a maximum, which only domains have; leave it out.")
            if target.response is None and (needs := self._needs_labels):
                raise FieldError(f"targets.{i}.response", f"is null, but {needs} needs labels; name the column.")

    @property
    def _needs_labels(self) -> str | None:
        """What of the selector needs responses of its targets, if anything does."""
        if self.policy is None:
            return f"a selector of kind '{self.kind}'"
        return None if self.policy.labelled is None else f"policy.{self.policy.labelled}"

    @property
    def scores(self) -> bool:
        """Whether utilities come from gradients of the model."""
        return bool(_FIELDS[self.kind] & _WARMUP)

    def check(self, data: DataConfig) -> None:
        """Requires held-out examples where they are the targets, and of "nice" a reward for every set of prompts."""
        sets = self.targets or data.domains
        place = "targets" if self.targets else "data.domains"
        for i, part in enumerate(sets if self.kind == "nice" else ()):
            if part.reward is None and self.reward is None:
                reason = f"is missing, and so is {place}.{i}.reward; a selector of kind 'nice' needs to know how good a"
                raise FieldError("reward", f"{reason} reply is.")
        for i, part in enumerate((*self.targets, *data.domains)):
            if part.reward is not None and (self.kind != "nice" or part not in sets):
                owner = f"targets.{i}" if i < len(self.targets) else f"the domain '{part.name}'"
                raise FieldError("kind", f"is {self.kind!r}, which does not read the reward of {owner}; leave it out.")
        if self.scores and not self.targets and data.validation_fraction == 0:
            raise FieldError(
                "targets",
                f"is empty and data.validation_fraction is 0, but the selector '{self.kind}' needs examples to score "
                f"for; give one of them.",
            )
