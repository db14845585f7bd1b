"""The parts of a configuration of preference training: pairs, the loss, and self-play."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from duet_jax._checks import FieldError, at_least, require
from duet_jax._data_config import DataConfig, DomainConfig


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Prompts, each with a response that is preferred and one that is not.

    Attributes:
      source: .jsonl, .json or .parquet file, `datasets` folder or hub name.
      split: of a folder or a hub name.
      prompt: column; None: `chosen` and `rejected` are columns of whole conversations (lists of messages), of which the
        last reply is the response and the rest is the prompt, the same in both.
      chosen, rejected: columns of the responses. No `rejected` for self-play, which samples them.
      max_examples: a seeded subsample of `source` of this size.
      validation: another source, or None: of this one, `validation_fraction` is held out.
      validation_split: of `validation`, if it is a folder or a hub name; a file has none.
      validation_fraction: see there.
      validation_examples: at most so many pairs are held out, or drawn at random from `validation`, and measured after
        each epoch; 0: none.
      max_length: tokens of prompt and response; longer ones are cut, which is reported.
      buckets: ascending lengths that pairs are padded to, the last is `max_length`. Empty: a quarter, a half and the
        whole of it.
    """

    source: str
    split: str = "train"
    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str | None = "rejected"
    max_examples: int | None = None
    validation: str | None = None
    validation_split: str = "test"
    validation_fraction: float = 0.1
    validation_examples: int = 256
    max_length: int = 256
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected", "validation"):
            require(getattr(self, name) != "", name, "", "a text that is not empty")
        require(self.rejected != self.chosen, "rejected", self.rejected, "another column than chosen")
        default = type(self).__dataclass_fields__["validation_split"].default
        if self.validation is None and self.validation_split != default:
            raise FieldError("validation_split", "has no meaning without validation; leave it out, or give it.")
        # What is wrong with the other fields is told here: they have the same names there.
        object.__setattr__(self, "buckets", self.reading.buckets)

    @property
    def reading(self) -> DataConfig:
        """How the preferred responses are read, and examples cut to length."""
        return DataConfig(
            domains=(self.rows(self.chosen),),
            validation_fraction=self.validation_fraction,
            validation_examples=self.validation_examples,
            max_length=self.max_length,
            buckets=self.buckets,
        )

    def rows(self, column: str) -> DomainConfig:
        """How one of the two responses is read."""
        whole = DomainConfig(name="pairs", source=self.source, split=self.split, max_examples=self.max_examples)
        if self.prompt is None:
            return replace(whole, messages=column)
        return replace(whole, prompt=self.prompt, response=column)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """What training lowers, of log pi the summed log-probability of a response and log pi_ref that of the start.

    Attributes:
      kind: "dpo" (Rafailov et al. 2023, arXiv 2305.18290), -log sigmoid(beta (chosen - rejected)) of the log-ratios
        log pi - log pi_ref; "davir_dpo" (DavIR, arXiv 2310.13008), the same of log-ratios divided by |log pi_ref|;
        "ipo" (Azar et al. 2023, arXiv 2310.12036, equation 17), (chosen - rejected - 1 / (2 beta))^2.
      beta: reward of a nat of log-ratio; of "davir_dpo", of a log-ratio as large as |log pi_ref|, tens to hundreds of
        nats. As strong as DPO's is a beta that is larger by their mean, which is reported as beta_eff.
      eps: least |log pi_ref| that "davir_dpo" divides by, nats.
    """

    kind: Literal["dpo", "davir_dpo", "ipo"] = "dpo"
    beta: float = 0.1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", self.beta, "greater than 0")
        require(self.eps > 0, "eps", self.eps, "greater than 0")
        if self.kind != "davir_dpo" and self.eps != type(self).__dataclass_fields__["eps"].default:
            raise FieldError("eps", f"has no meaning for the loss {self.kind!r}; leave it out.")


@dataclass(frozen=True, kw_only=True)
class SpinConfig:
    """Self-play (SPIN, Chen et al. 2024, arXiv 2401.01335): the rejected responses are the model's own.

    In each iteration the model of the one before writes a reply to every prompt, at temperature 1, and is the
    reference. From the second on, the replies of the one before are trained on, too.

    Attributes:
      iterations: more of them may be asked for later; those that are done stay.
      max_new_tokens: of a reply.
      batch_size: replies that are written at the same time.
    """

    iterations: int = 3
    max_new_tokens: int = 256
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "iterations", "max_new_tokens", "batch_size")


@dataclass(frozen=True, kw_only=True)
class PreferenceSections:
    """What of a preference training is not its name, model or optimiser."""

    data: PairsConfig
    loss: PreferenceLoss = PreferenceLoss()
    spin: SpinConfig | None = None

    def check_pairs(self) -> None:
        """Requires rejected responses from one place."""
        if self.spin is None and self.data.rejected is None:
            raise FieldError("data.rejected", "is null; name the column, or give spin for the model's own replies.")
        if self.spin is not None and self.data.rejected is not None:
            reason = "is a column, but self-play samples the rejected responses; set it to null, or leave out spin."
            raise FieldError("data.rejected", reason)
