"""What the methods of curation share: the domains, the model that is asked, and files that hold what it said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from duet_jax.config import AskedConfig
from duet_jax.curation.parts import PART, hash_of, in_parts
from duet_jax.data import Domain, Encoded, Example, join
from duet_jax.data.sources import Row, read_rows
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed, Engine
from duet_jax.feedback.rewards import build_reward
from duet_jax.models.sampling import GREEDY, Sampling
from duet_jax.training.sft import Trainer

# How often a part of replies fills all rows of a batch, so that few stand idle at its end.
FILLS = 4


class Curated(NamedTuple):
    """What a curation ends with.

    Attributes:
      files: their contents, by name.
      summary: one line for people.
    """

    files: Mapping[str, str | bytes]
    summary: str


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """The model that is asked.

    Attributes:
      engine: compiled functions and the tokenizer.
      trainer: compiled training of it.
      train: the domains' training examples, as tokens.
      fingerprint: of the base model.
      trains: whether it is trained on them before it is asked.
    """

    engine: Engine
    trainer: Trainer
    train: tuple[Encoded, ...]
    fingerprint: str
    trains: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
    """An example with the model's reply, and whether the reply is right."""

    example: Example
    reply: str
    reward: float
    right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What a method works with.

    Attributes:
      domains: as they were read.
      seed: of everything random.
      folder: for unfinished work, which is found by hashes of all that it depends on.
      held_out: examples that methods compare on: all domains' own, or those of the configuration.
      say: is given one line of news at a time.
      on_progress: is given what is done, how much of it is done, and of how much.
      given: the model, of methods that have one.
    """

    domains: Sequence[Domain]
    seed: int
    folder: Path
    held_out: tuple[Example, ...] = ()
    say: Callable[[str], None] = lambda line: None
    on_progress: Callable[[str, int, int], None] = lambda name, done, of: None
    given: Student | None = None

    @property
    def student(self) -> Student:
        """The model; only for methods that have one."""
        assert self.given is not None
        return self.given

    @cached_property
    def model(self) -> Deployed:
        """The base model, or what is trained of it on all training examples."""
        student = self.student
        if student.trains:
            return self.trained(join(student.train), "training")
        return Deployed(student.engine, student.trainer.load_base())

    def trained(self, data: Encoded, name: str) -> Deployed:
        """The model after training on all of some examples; a training that was killed goes on."""
        trainer = self.student.trainer
        found = trainer.fit(
            data,
            np.arange(len(data)),
            seed=self.seed,
            start_seed=self.seed,
            fingerprint=self.student.fingerprint,
            folder=self.folder / f"training-{hash_of([data.digest, self._settings])[:16]}",
            on_step=lambda report: self.on_progress(name, report.step, report.steps),
        )
        return Deployed(self.student.engine, *trainer.deployable(found.trainable))

    @property
    def identity(self) -> list[str]:
        """What `model` is trained on, as digests; the rest of what decides it is in all that is `kept`."""
        return [part.digest for part in self.student.train] if self.student.trains else []

    def kept(
        self,
        name: str,
        identity: Any,
        sizes: Sequence[int],
        compute: Callable[[list[int]], list[Any]],
        part: int = PART,
    ) -> list[Any]:
        """`in_parts` of values that depend on `identity`, the model and its training settings."""
        whole = [identity, self._settings]
        return in_parts(self.folder, name, whole, sizes, compute, self.on_progress, part)

    @property
    def _settings(self) -> list[Any]:
        if self.given is None:
            return []
        trainer = self.given.trainer
        dtype = str(jnp.dtype(trainer.compute_dtype))
        return [self.given.fingerprint, repr(trainer.settings), list(trainer.buckets), dtype, self.seed]

    def replies(
        self,
        prompts: Encoded,
        sampling: Sampling,
        name: str,
        *,
        max_new_tokens: int,
        batch_size: int,
        stop: Sequence[str],
        seed: int = 0,
    ) -> list[str]:
        """One reply of the model to each encoded prompt, kept in parts.

        Raises:
          DataError: a prompt and its reply are longer than the model's context.
        """
        self.student.engine.require_room(prompts, max_new_tokens, name)

        def some(rows: list[int]) -> list[str]:
            found = self.model.sample(
                prompts.take(rows),
                sampling,
                samples=1,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed,
                stop_strings=stop,
            )
            return [texts[0] for texts in found.texts]

        identity = [self.identity, prompts.digest, repr(sampling), max_new_tokens, list(stop), seed]
        return self.kept("replies", identity, prompts.lengths.tolist(), some, FILLS * batch_size)

    def marked(self, examples: Sequence[Example], asked: AskedConfig, name: str) -> list[Marked]:
        """The model's greedy replies to the examples' prompts, and whether they are right.

        Raises:
          FeedbackError: a reply cannot be rewarded.
          DataError: a prompt and its reply are longer than the model's context.
        """
        reward = build_reward(asked.reward, self.folder / "rewards")
        reward.check(examples)
        prompts = self.student.engine.encode_prompts(examples)
        if prompts.truncated:
            self.say(f"{name}: {prompts.truncated} of {len(examples)} prompts lose their beginning to data.max_length")
        replies = self.replies(
            prompts,
            GREEDY,
            name,
            max_new_tokens=asked.max_new_tokens,
            batch_size=asked.batch_size,
            stop=asked.stop,
        )
        values = reward(replies, examples).tolist()
        return [
            Marked(example, reply, value, value >= asked.passing)
            for example, reply, value in zip(examples, replies, values, strict=True)
        ]


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def read_answers(path: str, known: Mapping[str, Any], field: str) -> Iterator[tuple[str, Row]]:
    """Rows that came back, each with the `id` of what was asked.

    Args:
      path: the file.
      known: what was asked, by id.
      field: that names the file in the configuration.

    Raises:
      DataError: the file cannot be read, or a row has no id, an unknown one, or one for the second time.
    """
    seen = set()
    for row in read_rows(path, split="train", name=field):
        identifier = str(row.columns.get("id", ""))
        if identifier not in known or identifier in seen:
            problem = "for the second time" if identifier in seen else "which is unknown"
            raise DataError(
                f"{field}: {row.where} has the id {identifier!r} {problem}; each answer needs the id of its question."
            )
        seen.add(identifier)
        yield identifier, row
