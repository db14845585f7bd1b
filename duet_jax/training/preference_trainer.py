"""Training on pairs of responses (DPO, DavIR-DPO, IPO, self-play): one compiled step per length bucket.

The reference is the model at the start of the training, and its log-probabilities are numbers that are given: no second
copy of the parameters is kept, neither under LoRA nor when all of them are trained. Everything else is as in
fine-tuning: optimiser, schedules, micro-batches, checkpoints, exact resumption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax.data.preferences import Pairs, gather_pairs
from duet_jax.errors import ModelError
from duet_jax.kernels.linear_log_probs import linear_log_probs
from duet_jax.models import llama
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.optimiser import learning_rates
from duet_jax.training.preference import losses, measure
from duet_jax.training.sft import Trainer
from duet_jax.training.steps import Dials, TrainState, accumulate, drive, network, plan_epochs, update

if TYPE_CHECKING:
    from duet_jax.config import PreferenceLoss


class PairMetrics(NamedTuple):
    """Of one step: mean loss of a pair, gradient norm before clipping, and log-probabilities `[B, 2]`, nats."""

    loss: Array
    gradient_norm: Array
    log_probs: Array


@dataclasses.dataclass(frozen=True)
class PairReport:
    """One finished step, on the host; `measured` is what `preference.measure` says of its pairs before the step."""

    step: int
    steps: int
    gradient_norm: float
    learning_rate: float
    seconds: float
    measured: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A finished training.

    Attributes:
      trainable: LoRA factors or all parameters.
      steps: number of optimiser steps.
      loss: mean loss of a pair over the whole run.
      seconds: wall time in this process.
    """

    trainable: Any
    steps: int
    loss: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceTrainer:
    """Trains on pairs what a `Trainer` of sequences describes.

    Attributes:
      sequences: network, method and settings; its batches are counted in pairs here.
      loss: what is lowered.
    """

    sequences: Trainer
    loss: PreferenceLoss

    def objective(
        self,
        trainable: Any,
        base: llama.Params | None,
        dials: Dials,
        tokens: Array,
        mask: Array,
        reference: Array,
        weights: Array,
        key: Array,
    ) -> tuple[Array, Array]:
        """Weighted sum of the pairs' losses, float32 scalar, and log-probabilities of the responses, float32 `[B, 2]`.

        Args:
          trainable, base, dials, key: as of `Trainer.loss`.
          tokens: int32 `[B, 2, T]`, chosen and rejected: 2B rows of one forward pass.
          mask: bool `[B, 2, T]`, the tokens that are scored.
          reference: float32 `[B, 2]`, log-probabilities under the reference.
          weights: float32 `[B]`.
        """
        trainer, length = self.sequences, tokens.shape[-1]
        params, lora = network(trainable, base, dials)
        hidden = llama.hidden_states(
            trainer.model,
            params,
            tokens.reshape(-1, length),
            lora=lora,
            dropout_key=key if trainer.settings.lora.dropout > 0 else None,
            compute_dtype=trainer.compute_dtype,
            remat=trainer.remat,
        )
        found = linear_log_probs(
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            llama.output_head(params),
            tokens[..., 1:].reshape(-1),
            mask[..., 1:].reshape(-1),
            256,
            trainer.compute_dtype,
        )
        log_probs = jnp.sum(found.reshape(*reference.shape, -1), axis=-1)
        return jnp.sum(weights * losses(self.loss, log_probs, reference)), log_probs

    @cached_property
    def step(self) -> Callable[..., tuple[TrainState, PairMetrics]]:
        """One compiled optimiser step, of arguments as `Trainer.step` has them:
        `(state, base, dials, tokens, mask, reference, rate, key, number) -> (state, metrics)`.

        `state` is donated. Gradients of `micro_batch_size` pairs at a time are added up; rows of padding count nothing.
        """

        @partial(jax.jit, donate_argnums=(0,))
        def step(
            state: TrainState,
            base: llama.Params | None,
            dials: Dials,
            tokens: Array,
            mask: Array,
            reference: Array,
            rate: Array,
            key: Array,
            number: Array,
        ) -> tuple[TrainState, PairMetrics]:
            there = jnp.any(mask, axis=(1, 2))
            weights = there / jnp.sum(there).astype(jnp.float32)
            base = None if base is None else llama.frozen(base, self.sequences.compute_dtype)

            def differentiate(trainable: Any, *part: Array) -> tuple[Any, Any]:
                return jax.value_and_grad(self.objective, has_aux=True)(trainable, base, dials, *part)

            size = self.sequences.settings.micro_batch_size or tokens.shape[0]
            arrays, key = (tokens, mask, reference, weights), jax.random.fold_in(key, number)
            (parts, log_probs), gradient = accumulate(differentiate, state.trainable, arrays, key, size)
            state, norm = update(state, gradient, dials, rate)
            return state, PairMetrics(jnp.sum(parts), norm, log_probs.reshape(-1, 2))

        return step

    def fit(
        self,
        pairs: Pairs,
        reference: np.ndarray,
        start: TrainState,
        *,
        seed: int,
        identity: Mapping[str, str],
        folder: Path,
        on_step: Callable[[PairReport], None] = lambda report: None,
        on_epoch: Callable[[int, TrainState], None] = lambda steps, state: None,
    ) -> Tuned:
        """Trains on the pairs, or goes on from the checkpoint in `folder`.

        Args:
          pairs: every epoch passes over all of them.
          reference: float64 `[n, 2]`, log-probabilities under the reference, nats.
          start: the state before the first step, see `Trainer.start` and `restart`; it is used up.
          seed: order of the data and dropout.
          identity: names and values that tell where the training starts, kept with checkpoints.
          folder: where checkpoints go, every `checkpoint_every` steps and at the end.
          on_step: called after each step, one step late so that the device never waits for it.
          on_epoch: called with the number of steps done and the state at the end of each epoch.

        Returns:
          The trained factors or parameters. Stopped and called again, it ends with the same bits.

        Raises:
          ModelError: the checkpoint in `folder` is of another training, or the loss is not finite.
        """
        trainer, settings, began = self.sequences, self.sequences.settings, time.perf_counter()
        batches = plan_epochs(pairs.lengths, trainer.buckets, settings.batch_size, settings.epochs, seed)
        steps, given, tokens = len(batches), np.asarray(reference, np.float32), pairs.response_tokens
        rates, key, dials = learning_rates(settings, steps), jax.random.key(seed), trainer.dials
        base = None if settings.method == "full" else trainer.load_base()
        digest = hashlib.sha256(f"{pairs.digest}{seed}".encode() + given.tobytes()).hexdigest()
        identity = {**identity, "data": digest, "settings": repr((settings, self.loss))}
        epoch = steps // settings.epochs

        def advance(number: int, state: TrainState) -> tuple[TrainState, PairMetrics]:
            length, rows = batches[number]
            batch = gather_pairs(pairs, rows, length, settings.batch_size, trainer.pad_id)
            # Rows of padding, whose index is -1, get some pair's numbers and have no weight.
            chosen = given[batch.index]
            return self.step(state, base, dials, batch.tokens, batch.mask, chosen, rates[number], key, np.int32(number))

        def finish(number: int, metrics: PairMetrics) -> None:
            rows = batches[number][1]
            loss = float(metrics.loss)
            if not np.isfinite(loss):
                advice = "lower training.learning_rate or loss.beta, and give another folder"
                raise ModelError(f"The loss of step {number + 1} is {loss}; {advice}.")
            totals["loss"] += loss * len(rows)
            totals["pairs"] += len(rows)
            measured = measure(self.loss, np.asarray(metrics.log_probs)[: len(rows)], given[rows], tokens[rows])
            seconds = time.perf_counter() - began
            on_step(
                PairReport(number + 1, steps, float(metrics.gradient_norm), float(rates[number]), seconds, measured)
            )

        def after(number: int, state: TrainState) -> None:
            if number % epoch == 0:
                on_epoch(number, state)

        with Checkpoints(folder, identity) as checkpoints:
            done, state, totals = checkpoints.restore(start) or (0, start, {"loss": 0.0, "pairs": 0.0})
            state = drive(
                state,
                done,
                steps,
                settings.checkpoint_every,
                advance=advance,
                finish=finish,
                after=after,
                save=lambda number, state: checkpoints.save(number, state, totals),
            )
        return Tuned(state.trainable, steps, totals["loss"] / totals["pairs"], time.perf_counter() - began)
