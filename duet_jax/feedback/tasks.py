"""The built-in unseen tasks: a trained model in, one number and its standard error out; higher is better.

The standard errors are those of the sample of evaluation examples. Every round is scored on the same examples, so
they say how far a number is from that of the task as a whole, and much less about the difference of two rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from duet_jax.data import Encoded, Example
from duet_jax.distributed.processes import lead
from duet_jax.errors import DataError
from duet_jax.feedback import answers
from duet_jax.feedback.deployed import Deployed, Engine
from duet_jax.feedback.likelihood import response_tokens
from duet_jax.feedback.rewards import Reward, build_reward
from duet_jax.feedback.rewards.best_of import best_of
from duet_jax.models.sampling import Sampling
from duet_jax.types import Feedback

if TYPE_CHECKING:
    from duet_jax.config import TaskConfig


class Task(Protocol):
    """Anything that scores a deployed model."""

    def __call__(self, model: Deployed) -> Feedback: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseLoss:
    """Minus the mean loss per response token, in nats; with `perplexity`, minus its exponential.

    A ratio of sums over examples, so its standard error is that of a ratio estimator (Cochran, Sampling
    Techniques, 6.4); the perplexity's follows by the delta method.
    """

    encoded: Encoded
    batch_size: int
    perplexity: bool = False

    def __call__(self, model: Deployed) -> Feedback:
        losses = -model.log_probs(self.encoded, self.batch_size)
        counts = response_tokens(self.encoded)
        loss = float(losses.sum() / counts.sum())
        stderr = None
        if len(losses) > 1:
            residual = losses - loss * counts
            n = len(losses)
            stderr = float(np.sqrt((residual**2).sum() * n / (n - 1)) / counts.sum())
        if self.perplexity:
            value = float(np.exp(loss))
            return Feedback(-value, None if stderr is None else value * stderr, {"perplexity": value})
        return Feedback(-loss, stderr, {"response_loss": loss})


@dataclasses.dataclass(frozen=True, eq=False)
class MultipleChoice:
    """Share of questions whose right choice has the highest log-likelihood after the prompt.

    With `per_byte` each choice's log-likelihood is divided by its length in UTF-8 bytes, so that short choices
    have no advantage and tokenizers can be compared. Equal likelihoods go to the first choice.
    """

    encoded: Encoded
    starts: np.ndarray
    right: np.ndarray
    bytes_: np.ndarray
    batch_size: int
    per_byte: bool

    @classmethod
    def build(
        cls, engine: Engine, examples: Sequence[Example], name: str, batch_size: int, per_byte: bool
    ) -> MultipleChoice:
        for example in examples:
            if len(example.choices) < 2 or example.answer_index is None:
                raise DataError(
                    f"{name}: example {example.id} is no multiple-choice question; it needs the columns "
                    f"'choices' (two or more strings) and 'answer_index'."
                )
        rows = [
            dataclasses.replace(example, id=f"{example.id}#{i}", response=choice)
            for example in examples
            for i, choice in enumerate(example.choices)
        ]
        encoded = engine.encode(rows, name)
        if encoded.dropped or encoded.truncated:
            raise DataError(
                f"{name}: {encoded.dropped + encoded.truncated} of {len(rows)} choices do not fit in "
                f"data.max_length={engine.buckets[-1]} tokens with their prompts, so they cannot be compared; "
                f"raise data.max_length or leave the long questions out."
            )
        counts = [len(example.choices) for example in examples]
        starts = np.concatenate([[0], np.cumsum(counts)])
        right = np.array([example.answer_index for example in examples])
        sizes = np.array([max(len(row.response.encode()), 1) for row in rows])
        return cls(encoded, starts, right, sizes, batch_size, per_byte)

    def __call__(self, model: Deployed) -> Feedback:
        scores = model.log_probs(self.encoded, self.batch_size)
        if self.per_byte:
            scores = scores / self.bytes_
        parts = np.split(scores, self.starts[1:-1])
        correct = np.array([part.argmax() for part in parts]) == self.right
        return _mean(correct.astype(float), "accuracy")


@dataclasses.dataclass(frozen=True, eq=False)
class Generative:
    """Mean exact match or token F1 of greedy answers, against the accepted answers or else the response."""

    prompts: Encoded
    accepted: tuple[tuple[str, ...], ...]
    metric: str
    max_new_tokens: int
    batch_size: int

    def __call__(self, model: Deployed) -> Feedback:
        compare = {"exact_match": answers.exact_match, "token_f1": answers.token_f1}[self.metric]
        replies = model.answer(self.prompts, self.max_new_tokens, self.batch_size)
        scores = [compare(*pair) for pair in zip(replies, self.accepted, strict=True)]
        return _mean(np.array(scores), self.metric)


@dataclasses.dataclass(frozen=True, eq=False)
class Rewarded:
    """Mean reward of answers, of the expected best of so many where `best_of` is above 1 (pass@k).

    Every round draws the same random numbers for a prompt, so that rounds differ by their models.
    """

    prompts: Encoded
    examples: tuple[Example, ...]
    reward: Reward
    config: TaskConfig

    def __call__(self, model: Deployed) -> Feedback:
        config = self.config
        found = model.sample(
            self.prompts,
            Sampling(config.temperature),
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=0,
            stop_strings=config.stop,
        )
        replies = [text for texts in found.texts for text in texts]
        asked = [example for example in self.examples for _ in range(config.samples)]
        rewards = lead(self.reward, replies, asked).reshape(-1, config.samples)
        return _mean(best_of(rewards, config.best_of), self.reward.name)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedSum:
    """Sum of weighted tasks. The tasks' errors are taken as independent."""

    parts: tuple[tuple[float, Task], ...]

    def __call__(self, model: Deployed) -> Feedback:
        results = [(weight, task(model)) for weight, task in self.parts]
        value = sum(weight * result.value for weight, result in results)
        errors = [None if r.stderr is None else weight * r.stderr for weight, r in results]
        known = [error for error in errors if error is not None]
        stderr = float(np.sqrt(np.sum(np.square(known)))) if len(known) == len(errors) else None
        details = {f"task_{i}": result.value for i, (_, result) in enumerate(results)}
        return Feedback(float(value), stderr, details)


def build(config: TaskConfig, engine: Engine, examples: Sequence[Example], name: str) -> Task:
    """A built-in task of one set of examples; everything is encoded here, before anything is trained.

    Raises:
      DuetError: an example lacks what the task needs, or none fits the maximum length.
    """
    if config.kind in ("response_loss", "perplexity"):
        encoded = engine.encode(examples, name)
        return ResponseLoss(encoded, config.batch_size, config.kind == "perplexity")
    if config.kind == "multiple_choice":
        per_byte = config.normalisation == "length"
        return MultipleChoice.build(engine, examples, name, config.batch_size, per_byte)
    prompts = engine.encode_prompts(examples)
    engine.require_room(prompts, config.max_new_tokens, name)
    if config.reward is not None:
        reward = build_reward(config.reward)
        reward.check(examples)
        return Rewarded(prompts, tuple(examples), reward, config)
    accepted = tuple(example.answers or (example.response,) for example in examples)
    return Generative(prompts, accepted, config.kind, config.max_new_tokens, config.batch_size)


def _mean(scores: np.ndarray, name: str) -> Feedback:
    """Mean and its standard error; for scores of 0 and 1 that is the binomial one with n - 1."""
    stderr = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return Feedback(float(scores.mean()), stderr, {name: float(scores.mean())})
