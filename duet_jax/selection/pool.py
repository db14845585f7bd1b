"""What selectors score: the training examples of all domains, what they should be good for, and the model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax import models
from duet_jax._decode import encode as plain
from duet_jax.config import SelectorConfig
from duet_jax.curation.contradiction import outside
from duet_jax.data import Encoded, Example
from duet_jax.data.example import plain_text
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback import Engine
from duet_jax.feedback.outside import load_function, source_of
from duet_jax.feedback.rewards import Reward
from duet_jax.feedback.rewards.cache import as_json
from duet_jax.influence.build import Batching, Point, Progress
from duet_jax.influence.features import Moments
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.models.generate import Samples
from duet_jax.training.sft import Trained, Trainer, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What a selector needs that has the model answer, of the prompts of `Pool.sets`.

    Attributes:
      engine: makes samplers of checkpoints.
      examples: of all sets, one after the other.
      reward: how good a reply to an example is.
      external: replies that are there already, or None.
    """

    engine: Engine
    examples: tuple[Example, ...]
    reward: Reward
    external: Samples | None = None

    @property
    def identity(self) -> list[Any]:
        """What of it decides scores besides the prompts, as values of JSON."""
        read = [dataclasses.astuple(example) for example in self.examples]
        digest = hashlib.sha256(json.dumps(read, sort_keys=True, default=as_json).encode()).hexdigest()
        tokenizer = self.engine.model.tokenizer
        vocabulary = hashlib.sha256(repr((tokenizer.eos_ids, tokenizer.token_bytes)).encode()).hexdigest()
        return [self.reward.identity, digest, vocabulary, None if self.external is None else self.external.texts]


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Examples to score, and what scoring them needs.

    Attributes:
      names: of the domains.
      train: training examples of each.
      validation: held-out examples of each.
      targets: named sets that all examples are scored for; none: each domain's examples for its own `validation`.
        Held-out examples and targets are prompts alone where the model is `asked`.
      trainer: compiled training.
      fingerprint: of the base model.
      seed: of samples and of training.
      say: is given one line of news at a time.
      on_progress: is given what is done, how much of it is done, and of how much.
      asked: of selectors that have the model answer.
      examples: those of `train`, as texts, of selectors that read them.
      engine: makes samplers of the base model, of selectors that ask it about them.
    """

    names: tuple[str, ...]
    train: tuple[Encoded, ...]
    validation: tuple[Encoded, ...]
    targets: tuple[tuple[str, Encoded], ...]
    trainer: Trainer
    fingerprint: str
    seed: int
    say: Callable[[str], None] = lambda line: None
    on_progress: Callable[[str, int, int], None] = lambda name, done, of: None
    asked: Asked | None = None
    examples: tuple[Sequence[Example], ...] = ()
    engine: Engine | None = None

    def digest(self, selector: SelectorConfig) -> str:
        """A hash of everything that decides the scores, hexadecimal.

        Raises:
          ConfigError, DataError, ModelError: a function, a file or a model that the selector names is not there, or is
            not of use here.
        """
        chosen = plain(selector)
        # The files behind the targets are known by their examples, and the rule comes after the scores.
        for name in ("targets", "rule", "fraction", "path", "reward"):
            del chosen[name]
        policy = chosen.pop("policy")
        parts = [*self.train, *self.validation, *(examples for _, examples in self.targets)]
        whole = self.training_identity(self.trainer) | {
            "selector": chosen,
            "examples": [part.digest for part in parts],
            "targets": [name for name, _ in self.targets],
        }
        if not selector.trains:
            del whole["training"]
        if selector.kind == "length_matched":
            whole["selection"] = _content(selector.path or "")
        if selector.reference is not None:
            whole["reference"] = self.reference(selector.reference, "selector.reference").fingerprint
        if selector.embedding is not None:
            whole["embedding"] = self.embedding_digest(selector)
        if selector.confidence is not None:
            whole["confidence"] = [self.texts, outside(selector.confidence)]
        if self.asked is not None:
            del policy["external"]
            whole |= {"policy": policy, "asked": self.asked.identity}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def embedding_digest(self, selector: SelectorConfig) -> str:
        """A hash of everything that decides the embeddings of the training examples, hexadecimal."""
        if selector.embedding is None:
            whole = [self.fingerprint, str(jnp.dtype(self.trainer.compute_dtype)), [part.digest for part in self.train]]
        else:
            source = source_of(load_function(selector.embedding, "selector.embedding"))
            whole = [selector.embedding, source, self.texts]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def texts(self) -> list[str]:
        """Prompt and response of each training example, without a chat template; all domains, in order."""
        every = [example for part in self.examples for example in part]
        return [f"{plain_text(e.prompt)}\n{e.response}" if e.prompt else e.response for e in every]

    def reference(self, source: str, field: str) -> models.Model:
        """A trained model to compare the base model with, of any shape.

        Args:
          source: see `models.load`.
          field: of the configuration that names it, for messages.

        Raises:
          ModelError: it cannot be loaded, or has other tokens or a shorter context than the examples need.
        """
        assert self.engine is not None, "a given reference needs the base model's tokenizer"
        # What many devices hold together may be more than one of them can: it is read on the host.
        host = None if self.trainer.mesh is None else jax.local_devices(backend="cpu")[0]
        with contextlib.nullcontext() if host is None else jax.default_device(host):
            found, problem = models.load(source, dtype=self.trainer.compute_dtype), None
        if found.tokenizer.token_bytes != self.engine.model.tokenizer.token_bytes:
            problem = "other tokens than the base model; give one with the same vocabulary"
        elif found.config.max_length < self.trainer.buckets[-1]:
            problem = f"a context of {found.config.max_length} tokens; lower data.max_length and data.buckets to it"
        if problem is not None:
            raise ModelError(f"{field}: {source} has {problem}.")
        return found

    def training_identity(self, trainer: Trainer) -> dict[str, Any]:
        """What decides a training besides its examples, as values of JSON."""
        return {
            "model": self.fingerprint,
            "training": repr(trainer.settings),
            "dtype": str(jnp.dtype(trainer.compute_dtype)),
            "buckets": trainer.buckets,
            "seed": self.seed,
        }

    @property
    def sets(self) -> tuple[tuple[str, Encoded], ...]:
        """Named examples that are scored for: the targets, or each domain's own."""
        return self.targets or tuple(zip(self.names, self.validation, strict=True))

    @property
    def batching(self) -> Batching:
        """Batches of as many examples as a micro-batch of training."""
        settings = self.trainer.settings
        return Batching(self.trainer.buckets, settings.micro_batch_size or settings.batch_size, self.trainer.pad_id)

    def warm_up_trainer(self, epochs: int) -> Trainer:
        """Training as in the rounds, with that many epochs."""
        return self.trainer.retuned(dataclasses.replace(self.trainer.settings, epochs=epochs))

    def sample(self, count: int, most: int | None, number: int) -> np.ndarray:
        """Rows int64 of `count` for a warm-up, at most so many of them, in order."""
        rng = np.random.default_rng([self.seed, 7, number])
        return np.sort(rng.permutation(count)[:most])

    def point(self, trainer: Trainer, trainable: object, moments: Moments | None = None) -> Point:
        """The gradients that selectors look at, where a training stands."""
        params, lora = trainer.deployable(trainable)
        gradients = ExampleGradients(
            trainer.model,
            target=trainer.settings.method,
            compute_dtype=trainer.compute_dtype,
            remat=trainer.remat,
            mesh=trainer.mesh,
        )
        return Point(gradients, params, lora, moments, self.fingerprint)

    def progress(self, name: str) -> Progress:
        """Progress of one part of the work."""
        return lambda done, of: self.on_progress(name, done, of)

    def warm_up(
        self,
        trainer: Trainer,
        data: Encoded,
        rows: np.ndarray,
        folder: Path,
        name: str,
        on_epoch: Callable[[int, TrainState], None] | None = None,
    ) -> Trained:
        """Trains on some rows, or goes on from the checkpoint in `folder`."""
        return trainer.fit(
            data,
            rows,
            seed=self.seed,
            start_seed=self.seed,
            fingerprint=self.fingerprint,
            folder=folder,
            on_step=lambda report: self.on_progress(name, report.step, report.steps),
            on_epoch=on_epoch,
        )


def _content(path: str) -> str:
    """SHA-256 of a file of a selection, hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"selector.path: '{path}' cannot be read ({error.strerror}); give scores.parquet or selected.jsonl of a "
            f"selection"
        ) from None
