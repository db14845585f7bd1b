"""A respondent that knows answers by heart, and the questions that it can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from duet_jax.curation.contradiction import OPTIONS as CONTRADICT
from duet_jax.curation.correction import OPTIONS as BETTER
from duet_jax.curation.reflection import OPTIONS as CORRECT
from duet_jax.curation.reflection import READ
from duet_jax.curation.respondent import Reply
from duet_jax.data import Example

# Of a configuration of confidences, and of a judge of two answers.
QUESTIONS: dict[str, Any] = {
    "sample_template": "{prompt}",
    "reflection_templates": ["{prompt} {answer}\n{options}"],
    "contradiction_template": "{prompt}|{first}|{second}\n{options}",
}
PREFERENCE = "{prompt}#{first}#{second}\n{options}"


def offered(text: str) -> tuple[str, dict[str, str]]:
    """A question without the options at its end, and the letters of these."""
    lines = text.splitlines()
    letters: dict[str, str] = {}
    while lines and (option := lines[-1][3:]) in (*CORRECT, *CONTRADICT, *BETTER) and option not in letters:
        letters[option] = lines.pop()[0]
    return "\n".join(lines), letters


@dataclasses.dataclass
class ByHeart:
    """Knows what is right of each prompt, and takes the better of two answers.

    Attributes:
      right: answers by their prompts.
      error: probability that it takes another of these answers for right, whenever it thinks of one.
      seed: of these errors.
      sure: probability of the option that it takes, about one answer or whether two contradict each other.
      sure_better: the same where it judges which of two is better.
      letter: as such a judge it always says this one.
      option: or it always takes this one.
      longest: characters that it reads at most.
      asked: all questions so far.
      judged: those about the better of two answers, without their options.
    """

    right: dict[str, str]
    error: float = 0.0
    seed: int = 0
    sure: float = 1.0
    sure_better: float = 1.0
    letter: str | None = None
    option: str | None = None
    longest: int = 10**6
    asked: list[str] = dataclasses.field(default_factory=list)
    judged: list[str] = dataclasses.field(default_factory=list)
    identity = "by heart"
    writing = ""

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        return [len(str(example.prompt)) for example in examples]

    def answers(
        self, examples: Sequence[Example], samples: int, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[Reply]]:
        rng = np.random.default_rng([self.seed, len(examples)])
        count = max(samples, 1)
        return [[Reply(self.says(str(example.prompt), rng), True) for _ in range(count)] for example in examples]

    def read(
        self,
        questions: Sequence[Example],
        groups: Sequence[int],
        words: Sequence[str],
        scored: Sequence[Example] = (),
        owners: Sequence[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.options(questions, words), np.tile([-1.0, 2.0], (len(scored), 1))

    def options(self, questions: Sequence[Example], words: Sequence[str]) -> np.ndarray:
        """Probabilities of the words, `[questions, words]`."""
        rng = np.random.default_rng([self.seed, len(questions), 1])
        found = np.zeros((len(questions), len(words)))
        for row, question in zip(found, questions, strict=True):
            self.asked.append(str(question.prompt))
            letter, sure = self.takes(str(question.prompt), rng)
            row[:] = (1 - sure) / (len(words) - 1)
            row[words.index(letter)] = sure
        return found

    def says(self, prompt: str, rng: np.random.Generator) -> str:
        """Its answer: to a prompt, or to a question of the judge."""
        asked, letters = offered(prompt)
        if letters:
            return self._verdict(asked, letters)
        if rng.random() < self.error:
            return str(rng.choice(sorted(set(self.right.values()) - {self.right[prompt]})))
        return self.right[prompt]

    def takes(self, text: str, rng: np.random.Generator) -> tuple[str, float]:
        """The letter that it takes, and how sure it is."""
        asked, letters = offered(text)
        if set(letters) == set(CONTRADICT):
            _, first, second = asked.rsplit("|", 2)
            return letters["No" if first == second else "Yes"], self.sure
        if set(letters) == set(CORRECT):
            prompt, said = asked.removesuffix(READ.rstrip()).rstrip().rsplit(" ", 1)
            return letters["Correct" if self.says(prompt, rng) == said else "Incorrect"], self.sure
        self.judged.append(asked)
        return self._verdict(asked, letters), self.sure_better

    def better(self, asked: str) -> str:
        """Which of the options of a judge is right."""
        prompt, first, second = asked.split("#")
        right = self.right[prompt]
        return BETTER[2] if (first == right) == (second == right) else BETTER[0] if first == right else BETTER[1]

    def _verdict(self, asked: str, letters: dict[str, str]) -> str:
        return self.letter or letters[self.option or self.better(asked)]
