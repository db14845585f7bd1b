"""The part of a configuration that says how data is curated: a section for each kind of `duet curate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from duet_jax._checks import FieldError, at_least, distinct, require
from duet_jax._confidence_config import ConfidenceConfig, check_template
from duet_jax._data_config import DataConfig, DomainConfig
from duet_jax._reward_config import RewardConfig

# Each has a section of its name.
Kind = Literal[
    "error_weights", "hard_examples", "self_guide", "grounded", "active_correction", "calibration", "clear", "answers"
]
# Those that read the whole of one domain.
_WHOLE = ("hard_examples", "self_guide", "active_correction")
# What a model says where it should write the input or the output of a task.
NOISE = (
    r"(?i)\bas an ai\b",
    r"(?i)\blanguage model\b",
    r"(?i)^\s*(sure|certainly|of course)\b\s*[,!.:]",
    r"(?i)\bi('m| am) (sorry|unable|not able)\b",
    r"(?i)\b(input|output|instruction)\s*:",
)
PREFERENCE = """{prompt}

Which of the two answers below is better? Answer with one letter, A, B or C.
First answer: {first}
Second answer: {second}
{options}"""


@dataclass(frozen=True, kw_only=True)
class AskedConfig:
    """A model is asked, greedily, and its replies are judged.

    Attributes:
      reward: how good a reply is.
      passing: the least reward of a right reply.
      max_new_tokens: of a reply.
      stop: texts that end a reply when they are complete.
      batch_size: replies that are written at the same time.
    """

    reward: RewardConfig
    passing: float = 1.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    batch_size: int = 16

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens", "batch_size")
        require("" not in self.stop, "stop", list(self.stop), "a list of texts that are not empty")


@dataclass(frozen=True, kw_only=True)
class ErrorWeightsConfig(AskedConfig):
    """Weights of domains from the model's errors on their held-out examples (arXiv 2308.13566).

    Attributes:
      similarity: of two bad cases, above which one of them is left out: shared words over all their words.
    """

    similarity: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.similarity <= 1, "similarity", self.similarity, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class HardExamplesConfig(AskedConfig):
    """Requests for examples like those that the model gets wrong (LLM2LLM, arXiv 2403.15042).

    Attributes:
      augmented: column that is true in rows which a teacher wrote; these are never asked for again.
      answers: file with the teacher's answers, rows of the request's `id`, a `prompt` and a `response`; they are added
        to the data.
      rouge_l: an answer whose ROUGE-L F with any example is above this is left out.
    """

    augmented: str = "augmented"
    answers: str | None = None
    rouge_l: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.augmented != "", "augmented", self.augmented, "the name of a column")
        require(self.answers != "", "answers", self.answers, "the name of a file")
        require(0 <= self.rouge_l <= 1, "rouge_l", self.rouge_l, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class SelfGuideConfig:
    """New examples of a task that the model writes itself (SELF-GUIDE, arXiv 2407.12874).

    Attributes:
      instruction: what the task is.
      count: inputs that are wanted.
      attempts: inputs that are written at most to find so many.
      demonstrations: examples in a prompt.
      input_temperature, output_temperature: of sampling; 0 takes the most probable tokens.
      noise: regular expressions; a text that any of them is found in is left out.
      deviations: half of the width of the window of lengths, in standard deviations.
      max_input_tokens, max_output_tokens: of what is written.
      batch_size: texts that are written at the same time.
    """

    instruction: str
    count: int = 64
    attempts: int = 256
    demonstrations: int = 3
    input_temperature: float = 1.0
    output_temperature: float = 0.3
    noise: tuple[str, ...] = NOISE
    deviations: float = 2.0
    max_input_tokens: int = 64
    max_output_tokens: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(self.instruction.strip() != "", "instruction", self.instruction, "a text that says what the task is")
        at_least(1, self, "count", "demonstrations", "max_input_tokens", "max_output_tokens", "batch_size")
        require(self.attempts >= self.count, "attempts", self.attempts, f"at least count ({self.count})")
        at_least(0, self, "input_temperature", "output_temperature")
        require(self.deviations > 0, "deviations", self.deviations, "greater than 0")
        for i, pattern in enumerate(self.noise):
            try:
                re.compile(pattern)
            except re.error as error:
                raise FieldError(f"noise.{i}", f"is {pattern!r}, no regular expression: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class GroundedConfig:
    """Which responses their documents support, sentence by sentence (MiniCheck, arXiv 2404.10774).

    Attributes:
      scorer: a language model that is asked, a function, or a sequence classifier of two or three labels. The one that
        means supported is named so in its config.json, beginning with entail or support; of two that are named LABEL_0
        and LABEL_1 it is the second.
      model: as `model.source` of a judge; the folder of a classifier.
      function: "module:callable" that is called with a document and a claim and returns a number from 0 to 1.
      document: column with the document; None: the prompt.
      chunk_words: sentences of a document are packed into chunks of at most so many words.
      threshold: an example is supported if all its sentences have a probability above it.
      dtype: of the model's matrix products.
      batch_size: texts in a forward pass.
    """

    scorer: Literal["judge", "classifier", "function"]
    model: str | None = None
    function: str | None = None
    document: str | None = None
    chunk_words: int = 300
    threshold: float = 0.5
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 8

    def __post_init__(self) -> None:
        needed, other = ("function", "model") if self.scorer == "function" else ("model", "function")
        if not getattr(self, needed):
            raise FieldError(needed, f"is missing; the scorer {self.scorer!r} needs it.")
        if getattr(self, other) is not None:
            raise FieldError(other, f"has no meaning for the scorer {self.scorer!r}; leave it out.")
        if self.function is not None:
            named = re.fullmatch(r"[\w.]+:\w+", self.function) is not None
            require(named, "function", self.function, "of the form module:callable")
        require(self.document != "", "document", self.document, "the name of a column")
        at_least(1, self, "chunk_words", "batch_size")
        require(0 <= self.threshold < 1, "threshold", self.threshold, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ActiveCorrectionConfig:
    """One round of correcting the labels of multiple-choice questions (ALC3, arXiv 2401.05467).

    Attributes:
      folds: parts of the data, each of which is judged by a model that was trained on the others.
      correct_above: a label is replaced by another choice whose probability is above this; 1 replaces none.
      budget: labels that people check.
      drop: examples that are left out.
      answers: file with all labels that people have given so far, rows of `id` and `answer_index`.
      batch_size: choices that are scored at the same time.
    """

    folds: int = 5
    correct_above: float = 0.99
    budget: int = 0
    drop: int = 0
    answers: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        at_least(2, self, "folds")
        require(0 <= self.correct_above <= 1, "correct_above", self.correct_above, "in [0, 1]")
        at_least(0, self, "budget", "drop")
        at_least(1, self, "batch_size")
        require(self.answers != "", "answers", self.answers, "the name of a file")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which examples to prune a model by (Wanda, arXiv 2306.11695; the choice of data, arXiv 2410.07461).

    Attributes:
      sparsity: share of every row of weights that is pruned.
      examples: in a candidate set.
      draws: candidate sets from each domain.
      held_out: what the pruned models are compared on; empty: the held-out examples of all domains.
      batch_size: examples in a forward pass.
    """

    sparsity: float = 0.5
    examples: int = 128
    draws: int = 1
    held_out: tuple[DomainConfig, ...] = ()
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "sparsity", self.sparsity, "in [0, 1)")
        at_least(1, self, "examples", "draws", "batch_size")
        if self.held_out:
            distinct("held_out", [domain.name for domain in self.held_out])
        for i, domain in enumerate(self.held_out):
            if domain.response is None:
                raise FieldError(f"held_out.{i}.response", "is null, but its loss is measured; name the column.")


@dataclass(frozen=True, kw_only=True)
class ClearConfig:
    """Targets are kept, corrected or dropped, by the model's confidence in them (CLEAR, arXiv 2403.12776).

    Attributes:
      confidence: how the base model's confidence in targets and in its verdicts is computed.
      quantile: an example is kept if its confidence is above this quantile; 0.5 is the median.
      threshold: a confidence in place of the quantile.
      scope: whether each domain has a quantile of its own, or all have one.
      correct: whether a model that is trained on the kept examples proposes targets.
      iterations: how often; each time the model is trained anew on what the last one left.
      eta: a proposal is taken if the confidence in the verdict that it is better is above this.
      acceptance: that confidence: of the verdict as an answer, or the mean probability of its letters.
      preference_template: which of two answers is better, with {prompt}, {first}, {second} and {options}, which are
        asked about in every order; to be answered with a letter.
      max_new_tokens: of a proposal; one that has not ended by then is none, and is not judged.
      stop: texts that end a proposal when they are complete.
    """

    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
    quantile: float = 0.5
    threshold: float | None = None
    scope: Literal["domain", "global"] = "domain"
    correct: bool = False
    iterations: int = 1
    eta: float = 0.8
    acceptance: Literal["confidence", "probability"] = "confidence"
    preference_template: str = PREFERENCE
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.quantile <= 1, "quantile", self.quantile, "in [0, 1]")
        require(self.threshold is None or 0 <= self.threshold < 1, "threshold", self.threshold, "in [0, 1)")
        at_least(1, self, "iterations", "max_new_tokens")
        if self.iterations > 1 and not self.correct:
            raise FieldError("iterations", "is of corrections; set correct to true, or leave it out.")
        require(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")
        check_template("preference_template", self.preference_template, {"prompt", "first", "second", "options"})
        require("" not in self.stop, "stop", list(self.stop), "a list of texts that are not empty")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """A model's greedy answers, each with its confidence, below a threshold of which it abstains.

    Attributes:
      confidence: how it is computed; an answer ends as its samples do, by `max_new_tokens` and `stop`.
      threshold: the least confidence of an answer that is given, above 0, which is that of an answer without any.
      reward: how right an answer is, in [0, 1]; of prompts without a response it is known where the reward needs none.
    """

    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
    threshold: float = 0.5
    reward: RewardConfig = RewardConfig(kind="exact_match")

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class CurateSections:
    """What is curated, and how: the section that `kind` names, and no other.

    Attributes:
      kind: what is made: "error_weights", weights of domains by the model's errors; "hard_examples", requests for
        examples like those it gets wrong; "self_guide", examples that it writes itself; "grounded", examples whose
        documents support them; "active_correction", corrected labels; "calibration", examples to prune a model by;
        "clear", examples in whose targets the model is confident, and corrected ones; "answers", its answers with the
        confidence in them.
      data: the domains. Of "hard_examples", "self_guide" and "active_correction" it is one, and none of it is held out;
        of "clear" and "answers" nothing is held out either. Those of "answers" may have no responses, and none of them
        is cut.
    """

    kind: Kind
    data: DataConfig
    error_weights: ErrorWeightsConfig | None = None
    hard_examples: HardExamplesConfig | None = None
    self_guide: SelfGuideConfig | None = None
    grounded: GroundedConfig | None = None
    active_correction: ActiveCorrectionConfig | None = None
    calibration: CalibrationConfig | None = None
    clear: ClearConfig | None = None
    answers: AnswersConfig | None = None

    @property
    def section(self) -> Any:
        """The settings of this kind."""
        return getattr(self, self.kind)

    def check(self, model: Any, training: Any) -> None:
        """Raises a FieldError where something that the kind needs is missing, or is there and not read."""
        for name in get_args(Kind):
            if name != self.kind and getattr(self, name) is not None:
                raise FieldError(name, f"has no meaning for a curation of kind {self.kind!r}; leave it out.")
        if self.section is None:
            raise FieldError(self.kind, f"is missing; a curation of kind {self.kind!r} needs it.")
        corrects = self.clear is not None and self.clear.correct
        trains = self.kind == "active_correction" or corrects
        needs = {"model": (model, self.kind != "grounded"), "training": (training, trains)}
        for name, (given, needed) in needs.items():
            if needed and given is None:
                raise FieldError(name, f"is missing; a curation of kind {self.kind!r} needs it.")
        if self.kind == "grounded" and (model is not None or training is not None):
            name = "training" if model is None else "model"
            raise FieldError(name, "has no meaning for a curation of kind 'grounded', whose section has its own model.")
        if self.kind == "clear" and training is not None and not corrects:
            raise FieldError("training", "has no meaning where clear.correct is false; leave it out.")
        if self.kind == "answers" and training is not None:
            reason = "has no meaning for a curation of kind 'answers', whose model is taken as it is; leave it out."
            raise FieldError("training", reason)
        self._check_data()

    def _check_data(self) -> None:
        names, fraction = [domain.name for domain in self.data.domains], self.data.validation_fraction
        require(bool(names), "data.domains", names, "a list of at least one domain")
        if self.kind in _WHOLE:
            require(len(names) == 1, "data.domains", names, f"one domain for a curation of kind {self.kind!r}")
        if self.kind != "answers":
            self.data.require_responses()
        if self.kind in (*_WHOLE, "clear", "answers"):
            reason = f"0 for a curation of kind {self.kind!r}, which reads all of its data"
            require(fraction == 0, "data.validation_fraction", fraction, reason)
        held_out = self.kind == "error_weights" or (self.kind == "calibration" and not self.section.held_out)
        reason = f"greater than 0 for a curation of kind {self.kind!r}, which looks at held-out examples"
        require(fraction > 0 or not held_out, "data.validation_fraction", fraction, reason)
