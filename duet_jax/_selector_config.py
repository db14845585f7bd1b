"""The part of a configuration that says which examples of a domain are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, require
from duet_jax._confidence_config import ConfidenceConfig
from duet_jax._data_config import DataConfig, DomainConfig
from duet_jax._policy_config import PolicyConfig
from duet_jax._reward_config import RewardConfig

# The fields that a kind uses besides `kind`, `rule` and `fraction`; any other must be left at its default.
_WARMUP = ("warmup_examples", "warmup_epochs")
_GRADIENTS = {*_WARMUP, "targets"}
_SKETCHES = {"form", "k", "row_format"}
_DIVERSE = {"embedding", "depth"}
_FIELDS: dict[str, set[str]] = {
    "random": set(),
    "utilities": {"path"},
    "influence": _GRADIENTS | {"damping"},
    "less": _GRADIENTS | _SKETCHES,
    "nice": _GRADIENTS | _SKETCHES | {"policy", "reward"},
    "davir": {*_WARMUP, "reference", "denominator"},
    "rho": {*_GRADIENTS, "reference", "token_mean"},
    "loss_band": {"low", "high"},
    "el2n": set(_WARMUP),
    "length": set(),
    "length_matched": {"path"},
    "near_duplicates": {"threshold"},
    "log_det": _DIVERSE,
    "facility_location": _DIVERSE,
    "k_center": _DIVERSE,
    "clear": {"confidence"},
}
# Of each kind that trains, the examples it trains on where none are given; None: all of them.
_WARMUP_EXAMPLES = {"influence": 256, "less": 256, "nice": 256, "el2n": 256, "davir": None, "rho": None}


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """A utility for every example, and the rule that turns utilities and a count into a choice.

    Attributes:
      kind: "random", equal utilities; "utilities", those of a file; "influence", how much an example lowers the loss
        of the targets by EK-FAC influence functions; "less", how much its step of Adam points along their gradients
        over a short training (LESS, arXiv 2402.04333); "nice", along the gradient of the expected reward of the model's
        own replies to their prompts (NICE, Wang et al., ICML 2025); "davir", the share of its loss that training on the
        pool removes (DavIR, arXiv 2310.13008); "rho", the loss that a model trained on the targets does not have
        (RHO-loss, Mindermann et al., ICML 2022); "loss_band", those of middling loss; "el2n", the error's norm (Paul et
        al., NeurIPS 2021); "length", long responses; "length_matched", as long ones as another selection's;
        "near_duplicates", one of each group of almost equal ones; "log_det", "facility_location" and "k_center", those
        that stand for all the others, in the order in which a greedy search chooses them; "clear", those in whose
        responses the base model is confident (CLEAR, arXiv 2403.12776).
      path: of the file with utilities, or with the selection whose lengths are matched.
      rule: that turns utilities and a count into examples.
      fraction: share that the rule "remove_lowest" removes.
      targets: what the examples should do well on, each with its own score: their mean counts under "influence",
        their maximum under "less" and "nice"; those of "nice" may have no responses. Empty: each domain's examples are
        for its own held-out ones, under "influence" by a model that was trained on this domain alone (DUET, arXiv
        2502.00270, section 3.2). Under "rho" one reference is trained on all of them or, if empty, on the held-out
        examples of all domains.
      warmup_examples: at most so many random training examples train the model that is looked at; None: 256, or all
        of them for the reference of "davir" and "rho".
      warmup_epochs: passes over them; "less" and "nice" look at the model after each.
      damping: added to the curvature, in units of its mean in each layer.
      form: formulas of the paper, or of its published code.
      k: numbers kept of each gradient.
      row_format: that they are stored in.
      policy: of kind "nice": how replies are sampled, and what is made of their rewards; None: as by default.
      reward: of kind "nice": how good a reply is, where the target or domain has no `reward` of its own.
      reference: of kinds "davir" and "rho": a model that is trained already, in place of one trained here.
      denominator: of kind "davir": whose loss the reduction is divided by; the order of the examples is the same.
      token_mean: of kind "rho": whether losses are means over tokens, or sums.
      low, high: of kind "loss_band": quantiles of the mean loss per token, hence of the perplexity, between which
        examples are kept.
      threshold: of kind "near_duplicates": Jaccard similarity of token 5-grams from which two examples are one.
      embedding: of kinds that look for variety: "module:function" that turns a list of texts into an array `[n, dim]`;
        None: the model's mean hidden states.
      depth: at most so many examples of a domain are put in order; the others come after, by what they would add.
      confidence: of kind "clear": how it is computed; None: as by default.
    """

    kind: Literal[
        "random",
        "utilities",
        "influence",
        "less",
        "nice",
        "davir",
        "rho",
        "loss_band",
        "el2n",
        "length",
        "length_matched",
        "near_duplicates",
        "log_det",
        "facility_location",
        "k_center",
        "clear",
    ] = "random"
    path: str | None = None
    rule: Literal["weighted", "top_k", "remove_lowest"] = "weighted"
    fraction: float = 0.2
    targets: tuple[DomainConfig, ...] = ()
    warmup_examples: int | None = None
    warmup_epochs: int = 4
    damping: float = 0.1
    form: Literal["paper", "code"] = "paper"
    k: int = 8192
    row_format: Literal["float32", "bfloat16", "int8", "int4", "1bit"] = "int8"
    policy: PolicyConfig | None = None
    reward: RewardConfig | None = None
    reference: str | None = None
    denominator: Literal["base", "reference"] = "base"
    token_mean: bool = True
    low: float = 0.25
    high: float = 0.75
    threshold: float = 0.8
    embedding: str | None = None
    depth: int = 1024
    confidence: ConfidenceConfig | None = None

    def __post_init__(self) -> None:
        if "path" in _FIELDS[self.kind] and not self.path:
            what = "the file with them" if self.kind == "utilities" else "scores.parquet of a selection"
            raise FieldError("path", f"is missing; a selector of kind '{self.kind}' needs {what}.")
        if self.kind == "nice":
            object.__setattr__(self, "policy", self.policy or PolicyConfig())
        if self.kind == "clear":
            object.__setattr__(self, "confidence", self.confidence or ConfidenceConfig())
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        used = _FIELDS[self.kind] | ({"kind"} if self.kind == "random" else {"kind", "rule", "fraction"})
        for name, default in defaults.items():
            if name not in used and getattr(self, name) != default:
                raise FieldError(name, f"has no meaning for a selector of kind '{self.kind}'; leave it out.")
        for name in (*_WARMUP, "targets") if self.reference is not None else ():
            if getattr(self, name) != defaults[name]:
                raise FieldError(name, "has no meaning with a reference that is trained already; leave one out.")
        if self.kind == "length_matched":
            require(self.rule == "weighted", "rule", self.rule, "'weighted' for a selector of kind 'length_matched'")
        require(0 <= self.fraction < 1, "fraction", self.fraction, "in [0, 1)")
        if self.warmup_examples is None:
            object.__setattr__(self, "warmup_examples", _WARMUP_EXAMPLES.get(self.kind))
        else:
            at_least(1, self, "warmup_examples")
        at_least(1, self, "warmup_epochs", "depth")
        require(0 <= self.low < self.high <= 1, "low", self.low, f"in [0, 1] and below high ({self.high})")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "greater than 0, and at most 1")
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
        """Whether utilities are computed, from tokens or by the model."""
        return self.kind not in ("random", "utilities")

    @property
    def trains(self) -> bool:
        """Whether the scores come from a training of the base model."""
        return "warmup_epochs" in _FIELDS[self.kind] and self.reference is None

    @property
    def aims(self) -> bool:
        """Whether examples are scored for targets, or for held-out examples in their place."""
        return "targets" in _FIELDS[self.kind]

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
        given = self.targets or self.reference is not None
        if self.aims and not given and data.validation_fraction == 0:
            raise FieldError(
                "targets",
                f"is empty and data.validation_fraction is 0, but the selector '{self.kind}' needs examples to score "
                f"for; give one of them.",
            )
