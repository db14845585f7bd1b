"""The programs of a study as shapes: what `duet run` compiles, but for `Shapes.left_out`, with nothing in memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duet_jax import models
from duet_jax.config import MeshConfig, PolicyConfig, StudyConfig, TaskConfig
from duet_jax.distributed import rules
from duet_jax.distributed.mesh import make_mesh
from duet_jax.distributed.place import row_parts
from duet_jax.feedback.likelihood import scorer
from duet_jax.influence.features import Adam, moments
from duet_jax.influence.gradients import ExampleGradients
from duet_jax.influence.projections import CountSketch
from duet_jax.loading import base_dtype, mesh_of
from duet_jax.models import llama, slots
from duet_jax.models.decoding import unstack
from duet_jax.models.lora import Lora
from duet_jax.models.sampling import Sampling
from duet_jax.models.slots import Writer
from duet_jax.models.stops import stop_table
from duet_jax.recall import make_search
from duet_jax.selection.replies import sampling
from duet_jax.training.sft import Trainer

GENERATES = ("exact_match", "token_f1", "reward")
# Selectors whose programs are all here; those of the others are compiled where they run.
SELECTS = ("random", "utilities", "less", "nice", "length", "length_matched", "near_duplicates")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a study.

    Attributes:
      name: what it does.
      rows: sequences of one run, as the configuration has it; of training those of a micro-batch.
      length: tokens of each, those of the longest bucket.
      trace: traces it for so many rows.
      beside: bytes a chip of what the study keeps in memory while it runs, besides what it is given.
    """

    name: str
    rows: int
    length: int
    trace: Callable[[int], Any]
    beside: float = 0.0


def host_programs(config: StudyConfig) -> list[dict[str, Any]]:
    """What a study compiles for the host's CPU, whatever else there is: name, bytes of memory, seconds to compile."""
    began = time.perf_counter()
    memory = make_search(config).compiled().memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return [{"program": "search step", "memory": needed, "seconds": time.perf_counter() - began}]


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
    """A study's model and training as shapes; made and used under `target.tracing_for`.

    Attributes:
      config: of the study.
      model: shape of the network.
      devices: that the programs are compiled for; they may be those of a topology, which nobody has.
      device_bytes: memory of each.
    """

    config: StudyConfig
    model: llama.LlamaConfig
    devices: Sequence[Any]
    device_bytes: int

    def programs(self) -> Iterator[Program]:
        """Those that the study runs on the devices, but for `left_out`. Raises ConfigError if the mesh does not fit."""
        yield self.train_step()
        if self.config.selector.kind in ("less", "nice"):
            yield self.sketch_step()
        policy = self.config.selector.policy
        if self.config.selector.kind == "nice" and policy is not None and policy.external is None:
            yield self.prefill(policy, sampling(policy), "prefill of nice")
            yield self.decoding(policy, sampling(policy), "decoding of nice")
        yield self.scoring()
        if self.config.task.kind in GENERATES:
            yield self.prefill(self.config.task, Sampling(self.config.task.temperature), "prefill")
            yield self.decoding(self.config.task, Sampling(self.config.task.temperature), "decoding")

    @property
    def left_out(self) -> list[str]:
        """Fields whose values need programs that are not among these, or the same ones in shapes of their own."""
        selector, task = self.config.selector.kind, self.config.task.kind
        found = [] if selector in SELECTS else [f"selector.kind {selector}"]
        # A benchmark scores and writes in batches of its own; people talk to `duet serve`.
        return [*found, f"task.kind {task}"] if task in ("harness", "sum", "people") else found

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh that the study would make."""
        config, given = self.config, self.base_shapes
        model = models.Model(self.model, given, None, str(config.model.source), "")
        found = mesh_of(config.mesh, self.devices, model, config.training, self.device_bytes)
        return make_mesh(MeshConfig(), self.devices[:1], 0) if found is None else found

    @property
    def base_shapes(self) -> llama.Params:
        return llama.shapes(self.model, base_dtype(self.config.model, self.config.training))

    @property
    def fewest_rows(self) -> int:
        """Rows of a batch of which every device has its own."""
        return row_parts(self.mesh)

    def shares(self, rows: int) -> int:
        """Parts that the work on so many rows is split into."""
        return rules.row_count(self.mesh, rows) * self.mesh.shape["tensor"]

    @cached_property
    def trainer(self) -> Trainer:
        """The study's own, whose parameters are made up where somebody asks for them."""
        config = self.config
        dtype = base_dtype(config.model, config.training)
        return Trainer(
            model=self.model,
            load_base=lambda: llama.init(self.model, key=jax.random.key(0), dtype=dtype),
            settings=config.training,
            buckets=tuple(config.data.buckets),
            pad_id=0,
            compute_dtype=self.compute_dtype,
            remat=config.model.remat,
            mesh=self.mesh,
        )

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def length(self) -> int:
        """Tokens of the longest batches."""
        return self.config.data.buckets[-1]

    @cached_property
    def base(self) -> Any:
        """Parameters of the base model on the mesh."""
        return self._spread(self.base_shapes)

    @cached_property
    def state(self) -> Any:
        """What a training step changes."""
        return self._spread(jax.eval_shape(self.trainer.start, jax.random.key(0)))

    @cached_property
    def deployed(self) -> tuple[Any, Lora | None]:
        """Parameters and adapters of a trained model."""
        if self.config.training.method == "full":
            return self.state.trainable, None
        dials = self.trainer.dials
        return self.base, Lora(self.state.trainable, dials.scale, dials.dropout)

    def train_step(self) -> Program:
        settings = self.config.training
        size = settings.micro_batch_size or settings.batch_size
        count = settings.batch_size // size

        def trace(rows: int) -> Any:
            micro = rows if count > 1 else None
            drawn, online = settings.drawn // size * rows, settings.online
            if online is not None:
                online = dataclasses.replace(online, candidates=drawn)
            chosen = dataclasses.replace(settings, batch_size=rows * count, micro_batch_size=micro, online=online)
            trainer = dataclasses.replace(self.trainer, settings=chosen)
            base = None if settings.method == "full" else self.base
            shape = drawn, self.length
            tokens, mask = self._rows(shape, jnp.int32), self._rows(shape, bool)
            numbers = self._copied((), jnp.float32), self._key, self._copied((), jnp.int32)
            # Losses of the candidates under the reference.
            extra = () if online is None else (self._copied((drawn,), jnp.float32),)
            step: Any = trainer.step
            return step.trace(self.state, base, trainer.dials, tokens, mask, *numbers, *extra)

        return Program("train step", size, self.length, trace)

    def sketch_step(self) -> Program:
        """Of selectors that compare sketched gradients: Adam's steps of training examples."""
        selector, settings = self.config.selector, self.config.training
        gradients = ExampleGradients(
            self.model,
            target=settings.method,
            compute_dtype=self.compute_dtype,
            remat=self.config.model.remat,
            mesh=self.mesh,
        )
        feature = Adam("paper" if selector.form == "paper" else "less_code")
        program = jax.jit(gradients.sketch(CountSketch(selector.k, self.config.seed), feature))

        def trace(rows: int) -> Any:
            tokens, weights = self._rows((rows, self.length), jnp.int32), self._rows((rows, self.length), jnp.float32)
            return program.trace(*self.deployed, tokens, weights, moments=moments(self.state.optimiser))

        return Program("sketch step", settings.micro_batch_size or settings.batch_size, self.length, trace)

    def scoring(self) -> Program:
        """Log-probabilities of responses."""
        score: Any = scorer(self.model, self.compute_dtype, self.mesh)

        def trace(rows: int) -> Any:
            tokens, mask = self._rows((rows, self.length), jnp.int32), self._rows((rows, self.length), bool)
            return score.trace(*self.deployed, tokens, mask)

        return Program("scoring", self.config.task.batch_size, self.length, trace)

    def prefill(self, asked: TaskConfig | PolicyConfig, drawn: Sampling, name: str) -> Program:
        """Prompts that replies are `asked` to, of the task or the selector, into a cache."""
        writer = self._writer(drawn)

        def trace(rows: int) -> Any:
            tokens, lengths = self._rows((rows, self.length), jnp.int32), self._rows((rows,), jnp.int32)
            return slots.prefill.trace(writer, self._decoder, tokens, lengths)

        return Program(name, self._whole(-(-asked.batch_size // asked.samples)), self.length, trace, self._kept)

    def decoding(self, asked: TaskConfig | PolicyConfig, drawn: Sampling, name: str) -> Program:
        """One token more for each reply; the loop over them counts as if it ran once."""
        writer = self._writer(drawn)
        states = len(stop_table(tuple(asked.stop), (b"",)))

        def trace(rows: int) -> Any:
            most = asked.max_new_tokens
            state = jax.eval_shape(lambda: slots.empty(writer, rows, self.length + most, most))
            cache = rules.cache_spec(self.mesh, rows, self.model.num_kv_heads)
            placed = dataclasses.replace(
                jax.tree.map(lambda leaf: self._rows(leaf.shape, leaf.dtype), state),
                cache=jax.tree.map(lambda leaf: self._at(leaf, cache), state.cache),
            )
            table = self._copied((states, self.model.vocab_size), jnp.int32)
            return slots.advance.trace(writer, self._decoder, table, placed, self._copied((), jnp.int32))

        return Program(name, self._whole(asked.batch_size), self.length, trace, self._kept)

    def _writer(self, drawn: Sampling) -> Writer:
        return Writer(self.model, drawn, (0,), self.compute_dtype, self.mesh)

    @cached_property
    def _decoder(self) -> Any:
        found = jax.eval_shape(partial(unstack, self.model, compute_dtype=self.compute_dtype), *self.deployed)
        return jax.tree.map(self._at, found, rules.shardings(self.mesh, found, gathered=True))

    @property
    def _kept(self) -> float:
        """Bytes a chip of the deployed parameters, of which generation reads a copy."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.deployed[0])
        )

    def _whole(self, rows: int) -> int:
        """So many rows and those that make all devices have as many, as `models.generate` rounds them."""
        return -(-rows // self.fewest_rows) * self.fewest_rows

    def _at(self, leaf: Any, where: PartitionSpec | NamedSharding) -> ShapeDtypeStruct:
        sharding = where if isinstance(where, NamedSharding) else NamedSharding(self.mesh, where)
        return ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _spread(self, tree: Any) -> Any:
        """Parameters, factors or optimiser state on the mesh."""
        return jax.tree.map(self._at, tree, rules.shardings(self.mesh, tree))

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> ShapeDtypeStruct:
        """`[rows, ...]` of a batch."""
        spec = rules.row_spec(self.mesh, shape[0])
        return ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _copied(self, shape: tuple[int, ...], dtype: Any) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(shape, dtype, sharding=rules.copied(self.mesh))

    @property
    def _key(self) -> ShapeDtypeStruct:
        key: Array = jax.eval_shape(lambda: jax.random.key(0))
        return self._copied(key.shape, key.dtype)
