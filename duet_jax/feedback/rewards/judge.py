"""A language model as the judge of replies, by what it thinks of two letters rather than by what it writes.

Zheng et al. 2023 (arXiv 2306.05685), sections 3.1 and 3.4: pairwise comparison with a reference, or grading of a
reply alone; judges prefer a position whatever stands there. Here every question is put both ways round and the two
probabilities are averaged, so that a preference for a letter or a place cancels. No text is sampled: the letter's
probability is that of the first token of the verdict, among the two letters. It needs one pass and has no randomness.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax.data import Example, encode_prompts
from duet_jax.data.example import plain_text
from duet_jax.errors import ModelError
from duet_jax.feedback.rewards.readout import Readout, resident_dtype
from duet_jax.feedback.rewards.reward import Reward
from duet_jax.models import llama

LETTERS = ("A", "B")
COMPARE = """Two replies to the same request are to be compared.

[Request]
{prompt}

[Reply A]
{first}

[Reply B]
{second}

Which reply is better: more correct, more helpful and clearer? Neither their order nor their length matters. \
Answer with one letter, A or B."""
GRADE = """A reply to a request is to be judged.

[Request]
{prompt}

[Reply]
{reply}

Is the reply correct, helpful and clear?
A: {first}
B: {second}
Answer with one letter, A or B."""
GOOD, BAD = "Yes, it is a good reply.", "No, it is a bad reply."


def judge(source: str, *, reference: bool, batch_size: int = 8, dtype: str = "float32") -> Reward:
    """The probability, in [0, 1], that the reply is the better of two, or good.

    With a reference this is P(the reply's letter) / (P(A) + P(B)), averaged over both orders: 1/2 for the reference
    itself. Without one it is the probability of "yes", averaged over which letter means it. A reply is read as part of
    the question, so a policy trained hard enough for this reward may learn to talk the judge round.

    Args:
      source: a model, as of `models.load`; chat models are asked by their template.
      reference: whether the reply is compared with the example's response (or else its first accepted answer).
      batch_size: questions in a forward pass.
      dtype: of the model's matrix products.

    Raises:
      ModelError: there is no such model, or its tokenizer has no single tokens for the letters.
    """
    asked = two_letters(source, batch_size, dtype)

    def function(replies: Sequence[str], examples: Sequence[Example]) -> list[float]:
        questions = [
            Example(id=example.id, prompt=question, response="")
            for reply, example in zip(replies, examples, strict=True)
            for question in (_compare(reply, example) if reference else _grade(reply, example))
        ]
        return asked(questions).tolist()

    prompts = COMPARE if reference else "\n".join((GRADE, GOOD, BAD))
    return Reward(
        name="judge",
        low=0.0,
        high=1.0,
        needs_label=reference,
        identity=f"judge {asked.identity}, asked: {prompts}",
        function=function,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TwoLetters:
    """A model that answers questions with A or B, each question put both ways round.

    Attributes:
      readout: logits of the two letters.
      chat: whether questions go through the chat template.
    """

    readout: Readout
    chat: bool

    def __call__(self, questions: Sequence[Example]) -> np.ndarray:
        """Probabilities float64 `[n]` of what A means in the first of each two questions and B in the second.

        Args:
          questions: 2n of them, prompts alone.
        """
        # Whatever is too long for the model is refused by the readout, not cut.
        tokenizer = self.readout.model.tokenizer
        encoded = encode_prompts(questions, tokenizer, chat=self.chat, max_length=sys.maxsize)
        logits = self.readout(encoded, [length - 1 for length in encoded.lengths]).astype(float)
        # 2 P(A) / (P(A) + P(B)) - 1, which never overflows.
        leaning = np.tanh((logits[:, 0] - logits[:, 1]) / 2)
        return (2 + leaning[0::2] - leaning[1::2]) / 4

    @property
    def identity(self) -> str:
        """All that decides its answers, besides the questions."""
        return self.readout.identity


def two_letters(source: str, batch_size: int, dtype: str) -> TwoLetters:
    """The model of a judge; see `judge` for the arguments.

    Raises:
      ModelError: there is no such model, or its tokenizer has no single tokens for the letters.
    """
    model = models.load(source, dtype=resident_dtype(dtype))
    letters = _letter_ids(model)
    rows = llama.output_head(model.params)[letters].astype(jnp.float32)
    readout = Readout(model, rows, batch_size, jnp.dtype(dtype))
    return TwoLetters(readout, model.tokenizer.chat_template is not None)


def _letter_ids(model: models.Model) -> np.ndarray:
    ids = model.tokenizer.encode_batch(list(LETTERS))
    if any(len(one) != 1 for one in ids) or ids[0] == ids[1]:
        raise ModelError(
            f"{model.source} cannot judge: its tokenizer writes the letters A and B as the ids {ids}, and each must be "
            f"one token of its own."
        )
    return np.array(ids)[:, 0]


def _compare(reply: str, example: Example) -> list[str]:
    other = example.response or example.answers[0]
    prompt = plain_text(example.prompt)
    return [COMPARE.format(prompt=prompt, first=a, second=b) for a, b in ((reply, other), (other, reply))]


def _grade(reply: str, example: Example) -> list[str]:
    prompt = plain_text(example.prompt)
    return [GRADE.format(prompt=prompt, reply=reply, first=a, second=b) for a, b in ((GOOD, BAD), (BAD, GOOD))]
