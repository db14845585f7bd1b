"""The part of a configuration that says how replies are sampled and what their rewards make of them (NICE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, check_estimator, check_truncation, require


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Replies of the model to the targets' prompts, and the estimator of the policy gradient.

    Attributes:
      samples: replies to each prompt at each checkpoint.
      max_new_tokens: of a reply.
      temperature, top_k, top_p, min_p: of sampling; the defaults are the model's own distribution.
      stop: texts that end a reply when they are complete.
      batch_size: replies that are written at the same time.
      advantage: what is subtracted from the rewards of a prompt's replies: the mean of its other replies, nothing, the
        mean of all, the constant of least variance, or the label's reward.
      variant: which replies count: all; those with a positive reward; those no worse than the label.
      top: the variants of rejection look at so many highest rewards alone; None: at all.
      worst_case_protection: where a rejection leaves no reply of a prompt, its label counts as the one reply.
      token_mean: a reply's loss is the mean over its tokens, not their sum.
      importance_cap: replies count min(cap, probability under the model / under the sampling distribution); None: all
        count the same.
      guidance: the first half of the label is appended to the prompt; the reward sees it and the reply as one text.
      external: file of replies that are used in place of sampled ones, at every checkpoint and without importance
        weights: JSON lines {"id": ..., "replies": [texts]}, the same number for all prompts.
      compat: the estimator and sampler of the published code: advantage "none", no importance weights, top-k 50 and
        top-p 0.95. With `selector.form: code`, the steps of Adam and the scores are its own, too.
    """

    samples: int = 20
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    batch_size: int = 32
    advantage: Literal["leave_one_out", "none", "mean", "optimal", "gold"] = "leave_one_out"
    variant: Literal["vanilla", "rejection", "hard_rejection"] = "vanilla"
    top: int | None = None
    worst_case_protection: bool = False
    token_mean: bool = False
    importance_cap: float | None = 10.0
    guidance: bool = False
    external: str | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "max_new_tokens", "batch_size")
        require(self.temperature > 0, "temperature", self.temperature, "greater than 0")
        check_truncation(self)
        require("" not in self.stop, "stop", list(self.stop), "a list of texts that are not empty")
        require(self.external != "", "external", self.external, "the name of a file")
        if self.compat:
            self._only_defaults("compat", "is set by compat", "advantage", "top_k", "top_p", "min_p", "importance_cap")
        if self.external is not None:
            sampling = ("samples", "temperature", "top_k", "top_p", "min_p", "stop", "importance_cap", "guidance")
            self._only_defaults("external", "has no meaning for replies from a file", *sampling)
        check_estimator(self)
        rule = f"at least 2 for the advantage {self.advantage!r}, which compares replies with each other"
        require(self.samples >= 2 or not self.compares, "samples", self.samples, rule)

    def _only_defaults(self, field: str, reason: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise FieldError(name, f"is {getattr(self, name)!r}, but {reason}; leave out {name} or {field}.")

    @property
    def compares(self) -> bool:
        """Whether a prompt's replies are compared with each other, so that one is not enough."""
        return self.advantage in ("leave_one_out", "mean", "optimal") and not self.compat

    @property
    def labelled(self) -> str | None:
        """The field that needs the prompts' labels, if any does."""
        needs = {
            "variant": self.variant == "hard_rejection",
            "worst_case_protection": self.worst_case_protection,
            "advantage": self.advantage == "gold",
            "guidance": self.guidance,
        }
        return next((name for name, needed in needs.items() if needed), None)
