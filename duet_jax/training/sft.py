"""Supervised fine-tuning on responses: LoRA factors or all parameters, one compiled step per length bucket.

The step is compiled once for the life of a `Trainer`. What differs between rounds (the data, the number of steps,
the learning rates, the start, and every setting that is but a number) comes in as arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from duet_jax.data import Batch, Encoded, gather_batch
from duet_jax.distributed import rules
from duet_jax.distributed.place import held_rows, map_rows, own_rows, place
from duet_jax.kernels.linear_cross_entropy import linear_cross_entropy
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.models.flops import training_flops
from duet_jax.storage import Shelf
from duet_jax.training import online
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.training.optimiser import adam, learning_rates
from duet_jax.training.reports import StepReport as StepReport
from duet_jax.training.reports import Trained as Trained
from duet_jax.training.steps import Dials, TrainState, accumulate, drive, network, plan_epochs, update

if TYPE_CHECKING:
    from duet_jax.config import TrainingConfig


class Metrics(NamedTuple):
    """Scalars of one step: mean loss per response token in nats, gradient norm before clipping, tokens.

    `choice` says what of the step's candidates was trained on; None where it is all that was drawn.
    """

    loss: Array
    gradient_norm: Array
    response_tokens: Array
    choice: online.Choice | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trains the same base model again and again, each time from the start, without compiling anew.

    Attributes:
      model: shape of the network.
      load_base: gives its parameters. Under LoRA it is called for each use and gives the same arrays, of any
        float dtype. Otherwise it is called once a training, which takes over the arrays it gives and changes
        them in place, so that the base need not be kept beside them.
      settings: method, optimiser, schedule.
      buckets: lengths that batches are padded to, ascending.
      pad_id: id of padding.
      compute_dtype: dtype of matrix products.
      remat: what the backward pass computes again, see `llama.hidden_states`.
      mesh: parameters, state and batches lie on it by `distributed.rules`; None for one device.
    """

    model: llama.LlamaConfig
    load_base: Callable[[], llama.Params]
    settings: TrainingConfig
    buckets: tuple[int, ...]
    pad_id: int
    compute_dtype: Any = jnp.float32
    remat: llama.Remat = "products"
    mesh: Mesh | None = None

    @property
    def _lora_config(self) -> adapters.LoraConfig:
        chosen = self.settings.lora
        return adapters.LoraConfig(chosen.rank, chosen.alpha, chosen.dropout, tuple(chosen.targets), chosen.layers)

    @property
    def _adapter(self) -> adapters.Lora | None:
        """The adapters without their factors; None when all parameters are trained."""
        if self.settings.method == "full":
            return None
        return adapters.without_factors(self.model, self._lora_config)

    @property
    def dials(self) -> Dials:
        """What `step` takes of the settings."""
        settings, adapter = self.settings, self._adapter
        scale, dropout = (None, 0.0) if adapter is None else (adapter.scale, adapter.dropout)
        return Dials(settings.clip_norm, settings.weight_decay, scale, dropout)

    def retuned(self, settings: TrainingConfig) -> Trainer:
        """The same compiled programs under other settings, whose `optimiser.program_of` must be the same."""
        for program in ("_new_factors", "_new_moments", "step"):
            getattr(self, program)
        other = copy.copy(self)
        object.__setattr__(other, "settings", settings)
        return other

    def start(self, key: Array) -> TrainState:
        """The state before the first step."""
        if self._adapter is None:
            trainable = jax.tree.map(lambda x: x.astype(jnp.float32), self._base())
        else:
            trainable = self._new_factors(key)
        return self.restart(trainable)

    def restart(self, trainable: Any) -> TrainState:
        """The state before the first step of a training that begins at factors or parameters that are there."""
        return TrainState(trainable, self._new_moments(trainable))

    def _base(self) -> llama.Params:
        return place(self.mesh, self.load_base())

    @cached_property
    def _layout(self) -> TrainState | None:
        """Where each array of the state lies: without being told, zeros would lie everywhere. None on one device."""
        if self.mesh is None:
            return None
        trainable = llama.shapes(self.model)
        if self._adapter is not None:
            new = partial(adapters.init, self.model, self._lora_config)
            trainable = jax.eval_shape(lambda: new(key=jax.random.key(0)).factors)
        moments = jax.eval_shape(adam(1.0, 0.0).init, trainable)
        return rules.shardings(self.mesh, TrainState(trainable, moments))

    @cached_property
    def _new_factors(self) -> Callable[[Array], Any]:
        where = None if self._layout is None else self._layout.trainable
        return jax.jit(lambda key: adapters.init(self.model, self._lora_config, key=key).factors, out_shardings=where)

    @cached_property
    def _new_moments(self) -> Callable[[Any], optax.OptState]:
        where = None if self._layout is None else self._layout.optimiser
        return jax.jit(adam(1.0, 0.0).init, out_shardings=where)

    def deployable(self, trainable: Any) -> tuple[llama.Params, adapters.Lora | None]:
        """Parameters and adapters (or None) of the trained model, ready for `llama.hidden_states`."""
        if self._adapter is None:
            return trainable, None
        return self._base(), dataclasses.replace(self._adapter, factors=trainable)

    def loss(
        self, trainable: Any, base: llama.Params | None, dials: Dials, tokens: Array, weights: Array, key: Array
    ) -> Array:
        """Weighted sum of the tokens' losses, float32 scalar.

        Args:
          trainable: LoRA factors or all parameters.
          base: frozen parameters under LoRA, else None.
          dials: scale and dropout of the adapters.
          tokens: int32 `[B, T]`.
          weights: float32 `[B, T]`: what the prediction of each token counts, 0 at `t = 0`.
          key: key of LoRA dropout.
        """
        params, lora = network(trainable, base, dials)
        hidden = llama.hidden_states(
            self.model,
            params,
            tokens,
            lora=lora,
            dropout_key=key if self.settings.lora.dropout > 0 else None,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            mesh=self.mesh,
        )

        def of_rows(hidden: Array, tokens: Array, weights: Array, head: Array) -> Array:
            flat = hidden.reshape(-1, hidden.shape[-1])
            total = linear_cross_entropy(flat, head, tokens.reshape(-1), weights.reshape(-1), 256, self.compute_dtype)
            return total[None]

        rows = hidden[:, :-1], tokens[:, 1:], weights[:, 1:]
        return jnp.sum(map_rows(self.mesh, of_rows, rows, (llama.output_head(params),)))

    @cached_property
    def step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """One compiled optimiser step: `(state, base, dials, tokens, mask, rate, key, number) -> (state, metrics)`.

        `state` is donated. Gradients of `micro_batch_size` rows at a time are added up; each response token of
        the whole batch counts the same. Under online selection the rows are candidates, and one more argument is the
        float32 `[candidates]` summed losses of their responses under the reference.
        """

        # Where the state lies it comes back, so that the next step finds it as this one did.
        where = None if self.mesh is None else (self._layout, rules.copied(self.mesh))

        @partial(jax.jit, donate_argnums=(0,), out_shardings=where)
        def step(
            state: TrainState,
            base: llama.Params | None,
            dials: Dials,
            tokens: Array,
            mask: Array,
            rate: Array,
            key: Array,
            number: Array,
            reference: Array | None = None,
        ) -> tuple[TrainState, Metrics]:
            choice = None
            if reference is not None:
                params, lora = network(state.trainable, base, dials)
                choice = online.choose(
                    self.settings, self.model, params, lora, tokens, mask, reference, self.compute_dtype, self.mesh
                )
                tokens, mask = tokens[choice.rows], mask[choice.rows] & choice.kept[:, None]
            response_tokens = jnp.sum(mask)
            weights = mask / jnp.maximum(response_tokens, 1).astype(jnp.float32)
            key = jax.random.fold_in(key, number)
            loss, gradient = self._gradient(state.trainable, base, dials, tokens, weights, key)
            state, norm = update(state, gradient, dials, rate)
            return state, Metrics(loss, norm, response_tokens, choice)

        return step

    def _gradient(
        self, trainable: Any, base: llama.Params | None, dials: Dials, tokens: Array, weights: Array, key: Array
    ) -> tuple[Array, Any]:
        base = None if base is None else llama.frozen(base, self.compute_dtype)

        def differentiate(trainable: Any, tokens: Array, weights: Array, key: Array) -> tuple[Array, Any]:
            return jax.value_and_grad(self.loss)(trainable, base, dials, tokens, weights, key)

        size = self.settings.micro_batch_size or tokens.shape[0]
        losses, gradient = accumulate(differentiate, trainable, (tokens, weights), key, size, self.mesh)
        return jnp.sum(losses), gradient

    def plan(self, data: Encoded, rows: np.ndarray, seed: int) -> list[tuple[int, np.ndarray]]:
        """The batches of all epochs in order, as (bucket length, rows of `data`); a pure function of its input."""
        lengths = data.lengths[rows]
        settings = self.settings
        batches = plan_epochs(lengths, self.buckets, settings.drawn, settings.epochs, seed)
        return [(length, rows[chosen]) for length, chosen in batches]

    def fit(
        self,
        data: Encoded,
        rows: np.ndarray,
        *,
        seed: int,
        start_seed: int,
        fingerprint: str = "",
        folder: Path | Shelf | None = None,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_epoch: Callable[[int, TrainState], None] | None = None,
        reference: np.ndarray | None = None,
    ) -> Trained:
        """Trains from the base model on the given rows, or goes on from the checkpoint in `folder`.

        Args:
          data: encoded examples, of which
          rows: int64 `[n]` are trained on in every epoch; a row may appear several times.
          seed: order of the data and dropout.
          start_seed: first values of the adapters. Kept the same over rounds, it makes their comparison
            fairer (common random numbers).
          fingerprint: of the base model, kept with checkpoints.
          folder: where checkpoints go, every `checkpoint_every` steps and at the end, or the shelf; None for none.
          on_step: called after each step, one step late so that the device never waits for it.
          on_epoch: called with the number of steps done and the state at the end of each epoch, before a checkpoint
            is written there; the next step takes the state's arrays over. An epoch's end may come by a second time
            after a crash, with the same bits.
          reference: of online selection, and of nothing else: float32 `[len(data)]`, summed loss of each response of
            `data` under the reference, nats.

        Returns:
          The trained factors or parameters. Stopped and called again, it ends with the same bits.

        Raises:
          ModelError: the checkpoint in `folder` is of another model or of other data.
          ValueError: a reference is missing, or nobody asked for it.
        """
        if (reference is None) != (self.settings.online is None):
            raise ValueError("a reference is needed for settings with online selection, and for no others")
        batches = self.plan(data, rows, seed)
        state = self.start(jax.random.key(start_seed))
        if folder is None:
            return self._run(data, batches, state, seed, None, {}, 0, on_step, on_epoch, reference)
        identity = {"model": fingerprint, "data": _digest(data, batches), "settings": repr(self.settings)}
        if reference is not None:
            identity["reference"] = hashlib.sha256(reference.tobytes()).hexdigest()
        with Checkpoints(folder, identity) as checkpoints:
            found = checkpoints.restore(state)
            done, progress = 0, {"loss": 0.0, "response_tokens": 0.0, "tokens": 0.0}
            if found is not None:
                done, state, progress = found
            return self._run(data, batches, state, seed, checkpoints, progress, done, on_step, on_epoch, reference)

    def _run(
        self,
        data: Encoded,
        batches: list[tuple[int, np.ndarray]],
        state: TrainState,
        seed: int,
        checkpoints: Checkpoints | None,
        progress: dict[str, float],
        done: int,
        on_step: Callable[[StepReport], None],
        on_epoch: Callable[[int, TrainState], None] | None,
        reference: np.ndarray | None,
    ) -> Trained:
        began, steps = time.perf_counter(), len(batches)
        epoch = steps // self.settings.epochs
        totals = {"loss": 0.0, "response_tokens": 0.0, "tokens": 0.0} | progress
        rates = learning_rates(self.settings, steps)
        key, base, dials = jax.random.key(seed), None if self._adapter is None else self._base(), self.dials
        lora, finished = None if self._adapter is None else self._lora_config, 0.0

        def advance(number: int, state: TrainState) -> tuple[TrainState, Metrics]:
            length, rows = batches[number]
            size = self.settings.drawn
            batch: Batch = gather_batch(data, rows, length, size, self.pad_id, held_rows(self.mesh, size))
            # Rows of padding, whose index is -1, get some loss; that they have no scored token tells them apart.
            extra = () if reference is None else (reference[batch.index],)
            tokens, mask = own_rows((batch.tokens, batch.loss_mask), self.mesh)
            return self.step(state, base, dials, tokens, mask, rates[number], key, np.int32(number), *extra)

        def finish(number: int, metrics: Metrics) -> None:
            nonlocal finished
            rows = batches[number][1]
            loss, norm, response_tokens = (float(x) for x in metrics[:3])
            score = None
            if metrics.choice is not None:
                rows = rows[np.asarray(metrics.choice.rows)[np.asarray(metrics.choice.kept)]]
                score = float(metrics.choice.score)
            lengths = data.lengths[rows].astype(np.int64)
            tokens, seconds = int(lengths.sum()), time.perf_counter() - began
            totals["loss"] += loss * response_tokens
            totals["response_tokens"] += response_tokens
            totals["tokens"] += tokens
            report = StepReport(
                step=number + 1,
                steps=steps,
                loss=loss,
                gradient_norm=norm,
                learning_rate=float(rates[number]),
                tokens=tokens,
                seconds=seconds,
                step_seconds=seconds - finished,
                flops=training_flops(self.model, lora, lengths),
                devices=len(metrics.loss.sharding.device_set),
                score=score,
            )
            finished = seconds
            on_step(report)

        def after(number: int, state: TrainState) -> None:
            if on_epoch is not None and number % epoch == 0:
                on_epoch(number, state)

        save = None if checkpoints is None else lambda number, state: checkpoints.save(number, state, totals)
        every = self.settings.checkpoint_every
        state = drive(state, done, steps, every, advance=advance, finish=finish, after=after, save=save)
        mean_loss = totals["loss"] / max(totals["response_tokens"], 1.0)
        return Trained(state.trainable, steps, int(totals["tokens"]), mean_loss, time.perf_counter() - began)


def _digest(data: Encoded, batches: list[tuple[int, np.ndarray]]) -> str:
    """Hash of every token that will be trained on, in order."""
    digest = hashlib.sha256()
    for length, rows in batches:
        digest.update(f"{length}:{len(rows)}".encode())
        for row in rows:
            digest.update(np.int64(data.prompt_lengths[row]).tobytes())
            digest.update(np.asarray(data.tokens[row], np.int32).tobytes())
    return digest.hexdigest()
