"""The part of a configuration that says how confidence in a target is computed (CLEAR, BSDetector)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import FieldError, at_least, require

SAMPLE = """{prompt}

Answer in this form.
explanation: your reasons, in a sentence or two
answer: the answer alone"""
REFLECTIONS = (
    """{prompt}

Proposed answer: {answer}

Is the proposed answer correct?
{options}""",
    """{prompt}

Proposed answer: {answer}

Are you really sure that the proposed answer is correct? Choose again.
{options}""",
)
CONTRADICTION = """{prompt}

Do the two answers below contradict each other? Answer with one letter, A or B.
First answer: {first}
Second answer: {second}
{options}"""
PREMISE = "premise: {first}\nhypothesis: {second}"


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig:
    """How sure the model is that a target answers its prompt (BSDetector, arXiv 2308.16175), in [0, 1].

    The confidence is beta * (alpha * similarity + (1 - alpha) * match) + (1 - beta) * reflection, where similarity is
    how little the target and sampled answers contradict each other, match how many of these are the same, and
    reflection what the model says when it is asked. A part that is missing or has no weight is left out, and the
    weights of the others are divided by their sum. In the templates {prompt} is the prompt as text, and {options} are
    lines with a letter each. The questions about an example go through the network together and share what they begin
    with: so let the prompt stand at the beginning, with the same words before it, and the options at the end, which
    are asked about in every order.

    An example with a question, or a sample, that does not fit the model's context has no confidence.

    Attributes:
      samples: answers to each prompt; 0: reflection alone.
      max_new_tokens: of an answer.
      temperature: of the answers.
      stop: texts that end an answer when they are complete.
      batch_size: answers that are written at the same time.
      batch_tokens: tokens of a pass that reads questions.
      alpha, beta: see above.
      likelihood: weight of the target's geometric mean probability a token, beside the others, whose weights have the
        sum 1.
      contradiction: who says whether two answers contradict each other: the model itself ("judge"), a classifier of
        three labels ("nli"), or a Python function.
      model: folder of the classifier.
      function: "module:callable" that gets a list of premises and one of hypotheses and returns the probability that
        each pair is a contradiction.
      reflection: whether the probabilities of the options' letters are read, averaged over which letter stands for
        what, or a text is written and searched for the option it takes; one that takes none counts 1/2.
      reflection_max_new_tokens: of such a text, which no `stop` ends.
      sample_template: around the prompt where answers are sampled; "{prompt}" leaves it as it is.
      reflection_templates: the questions of self-reflection, each with {prompt}, {answer} and {options}.
      contradiction_template: with {first} and {second}, of "judge" a question with {prompt} and {options}, which are
        Yes and No, and of "nli" the form of premise and hypothesis that the classifier was trained on, which may have
        {prompt}; None: `CONTRADICTION` or `PREMISE`. A function has none.
    """

    samples: int = 5
    max_new_tokens: int = 128
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int = 32
    batch_tokens: int = 4096
    alpha: float = 0.8
    beta: float = 0.7
    likelihood: float = 0.0
    contradiction: Literal["judge", "nli", "python"] = "judge"
    model: str | None = None
    function: str | None = None
    reflection: Literal["probabilities", "text"] = "probabilities"
    reflection_max_new_tokens: int = 128
    sample_template: str = SAMPLE
    reflection_templates: tuple[str, ...] = REFLECTIONS
    contradiction_template: str | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "samples")
        at_least(1, self, "max_new_tokens", "reflection_max_new_tokens", "batch_size", "batch_tokens")
        require(0 < self.temperature < float("inf"), "temperature", self.temperature, "greater than 0 and finite")
        require("" not in self.stop, "stop", list(self.stop), "a list of texts that are not empty")
        for name in ("alpha", "beta"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        require(0 <= self.likelihood < float("inf"), "likelihood", self.likelihood, "at least 0 and finite")
        if not any(self.weights.values()):
            raise FieldError("samples", "is 0, but beta is 1 and likelihood 0, so that no part is left; change one.")
        for name, kind in (("model", "nli"), ("function", "python")):
            if (getattr(self, name) is not None) != (self.contradiction == kind):
                needed = "is missing; it is needed" if self.contradiction == kind else "has no meaning; leave it out"
                raise FieldError(name, f"{needed} where contradiction is {self.contradiction!r}.")
        if self.function is not None:
            named = re.fullmatch(r"[\w.]+:\w+", self.function) is not None
            require(named, "function", self.function, "of the form module:callable")
        self._check_templates()

    def _check_templates(self) -> None:
        check_template("sample_template", self.sample_template, {"prompt"})
        require(bool(self.reflection_templates), "reflection_templates", [], "a list of at least one template")
        for number, template in enumerate(self.reflection_templates):
            check_template(f"reflection_templates.{number}", template, {"prompt", "answer", "options"})
        if self.contradiction == "python" and self.contradiction_template is not None:
            raise FieldError("contradiction_template", "has no meaning; leave it out where contradiction is 'python'.")
        needed = {"first", "second"} | ({"prompt", "options"} if self.contradiction == "judge" else set())
        check_template("contradiction_template", self.pair_template, needed, {"prompt"})

    @property
    def pair_template(self) -> str:
        """Around two answers: `contradiction_template`, or what stands for it where there is none."""
        return self.contradiction_template or (CONTRADICTION if self.contradiction == "judge" else PREMISE)

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each part; 0 where it is not computed."""
        sampled = float(self.samples > 0)
        return {
            "similarity": sampled * self.beta * self.alpha,
            "match": sampled * self.beta * (1 - self.alpha),
            "reflection": 1 - self.beta,
            "likelihood": self.likelihood,
        }


def check_template(name: str, template: str, needed: Set[str], allowed: Set[str] = frozenset()) -> None:
    """Requires that a template has the fields `needed`, and no others but those `allowed`."""
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise FieldError(name, f"is {template!r}, no template: {error}.") from None
    if not needed <= fields <= needed | allowed:
        names = ", ".join(f"{{{field}}}" for field in sorted(needed))
        require(False, name, template, f"a text with {names} and no other fields; write {{{{ and }}}} for braces")
