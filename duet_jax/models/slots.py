"""A fixed number of rows that write replies, and what is compiled for them: prefill, admission, and a loop of steps.

A row that has finished its reply is given another prompt, so that the long replies of a batch do not leave the other
rows idle. All shapes stay the same, and everything but finished replies stays on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from duet_jax.distributed import rules
from duet_jax.distributed.place import place_copied, place_rows, put, row_parts, spread
from duet_jax.models import decoding
from duet_jax.models.decoding import Cache, Decoder
from duet_jax.models.llama import LlamaConfig
from duet_jax.models.sampling import Sampling, draw


@dataclasses.dataclass(frozen=True)
class Writer:
    """What the compiled functions of this module depend on besides shapes. Hashable.

    Attributes:
      config: shape of the network.
      sampling: distribution of the next token.
      eos_ids: ids that end a reply.
      compute_dtype: dtype of matrix products.
      mesh: rows are spread over its axes `data` and `fsdp`, of which every device has all that its steps read of the
        parameters: gathered once, not in every step. Features and heads are split over `tensor`, by the compiler. None
        for one device.
    """

    config: LlamaConfig
    sampling: Sampling
    eos_ids: tuple[int, ...]
    compute_dtype: Any = jnp.float32
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Devices that rows are spread over; their number must be a multiple of it."""
        return row_parts(self.mesh)

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the mesh, those that rows are spread over; `mesh` is not None."""
        assert self.mesh is not None
        return rules.axes_for(self.mesh, self.devices, rules.ROWS)

    @property
    def rows(self) -> P:
        """Where arrays with their rows on the first axis lie."""
        return P() if self.mesh is None else rules.row_spec(self.mesh, self.devices)

    def spread(self, tree: Any) -> Any:
        """Arrays with their rows on the devices of the mesh."""
        return place_rows(self.mesh, tree)

    def copied(self, tree: Any) -> Any:
        """Arrays that every device of the mesh has whole."""
        return place_copied(self.mesh, tree)

    def gathered(self, decoder: Decoder) -> Decoder:
        """A decoder as steps read it."""
        if self.mesh is None:
            return decoder
        return put(decoder, rules.shardings(self.mesh, decoder, gathered=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of all rows; R of them, N the most tokens of a reply, S slots of the cache.

    Attributes:
      cache: keys and values, S slots.
      hidden: float32 `[R, D]`, what the next token is drawn from.
      position: int32 `[R]`, tokens in the cache.
      live: bool `[R]`, whether the row writes.
      keys: uint32 `[R, ...]`, data of the PRNG key of each reply.
      state: int32 `[R]`, of the search for stop strings.
      count: int32 `[R]`, tokens written.
      ids: int32 `[R, N]`.
      log_probs: float32 `[R, N]`, under the model.
      sampled_log_probs: float32 `[R, N]`, under the distribution drawn from.
      ended: bool `[R]`, whether the reply ended by itself.
    """

    cache: Cache
    hidden: Array
    position: Array
    live: Array
    keys: Array
    state: Array
    count: Array
    ids: Array
    log_probs: Array
    sampled_log_probs: Array
    ended: Array


def _on_mesh(writer: Writer, run: Callable, given: tuple[P, ...], returned: P) -> Callable:
    """`run` on every device of the mesh, for its own rows."""
    if writer.mesh is None:
        return run
    own = {axis for axis, size in writer.mesh.shape.items() if axis in rules.ROWS or size == 1}
    return jax.shard_map(run, mesh=writer.mesh, in_specs=given, out_specs=returned, axis_names=own, check_vma=False)


def _laid(writer: Writer, slots: Slots) -> Slots:
    """Rows where every function here takes and gives them: elsewhere, the next one would be compiled again."""
    if writer.mesh is None:
        return slots
    rows, heads = slots.cache.keys[0].shape[:2]
    where = NamedSharding(writer.mesh, rules.cache_spec(writer.mesh, rows, heads))
    cache = jax.lax.with_sharding_constraint(slots.cache, where)
    return dataclasses.replace(spread(writer.mesh, slots), cache=cache)


@partial(jax.jit, static_argnames=("writer", "rows", "slots", "most"))
def empty(writer: Writer, rows: int, slots: int, most: int) -> Slots:
    """Rows that do not write; `slots` is S and `most` is N."""
    config = writer.config
    dtype, head = decoding.cache_dtype(writer.compute_dtype), (rows, config.num_kv_heads)
    keys, values = (
        tuple(jnp.zeros(head + shape, dtype) for _ in range(config.num_layers))
        for shape in ((config.head_dim, slots), (slots, config.head_dim))
    )
    numbers, flags = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    key = jax.random.key_data(jax.random.key(0))
    found = Slots(
        cache=Cache(keys, values),
        hidden=jnp.zeros((rows, config.hidden_size)),
        position=numbers,
        live=flags,
        keys=jnp.broadcast_to(key, (rows, *key.shape)),
        state=numbers,
        count=numbers,
        ids=jnp.zeros((rows, most), jnp.int32),
        log_probs=jnp.zeros((rows, most)),
        sampled_log_probs=jnp.zeros((rows, most)),
        ended=flags,
    )
    return _laid(writer, found)


@partial(jax.jit, static_argnames="writer")
def prefill(writer: Writer, decoder: Decoder, tokens: Array, lengths: Array) -> tuple[Array, Cache]:
    """`decoding.prefill` of prompts, int32 `[P, T]`; each device computes its part of them and gets the others'."""

    def run(decoder: Decoder, tokens: Array, lengths: Array) -> tuple[Array, Cache]:
        found = decoding.prefill(writer.config, decoder, tokens, lengths, writer.compute_dtype)
        return found if writer.mesh is None else jax.lax.all_gather(found, writer.axes, tiled=True)

    return _on_mesh(writer, run, (P(), writer.rows, writer.rows), P())(decoder, tokens, lengths)


@partial(jax.jit, static_argnames="writer", donate_argnames="slots")
def admit(
    writer: Writer,
    slots: Slots,
    prefilled: tuple[Array, Cache],
    lengths: Array,
    rows: Array,
    prompts: Array,
    keys: Array,
) -> Slots:
    """Gives prompts to rows.

    Args:
      writer: see `Writer`.
      slots: the rows; the argument is consumed.
      prefilled: of `prefill`, P prompts and T slots.
      lengths: int32 `[P]` of the prompts.
      rows: int32 `[R]`, rows that get a prompt; R stands for none.
      prompts: int32 `[R]`, which prompt each of `rows` gets.
      keys: data of a PRNG key for each of `rows`.
    """
    run = _on_mesh(writer, partial(_admit, writer), (writer.rows, P(), P(), P(), P(), P()), writer.rows)
    return _laid(writer, run(slots, prefilled, lengths, rows, prompts, keys))


def _admit(
    writer: Writer,
    slots: Slots,
    prefilled: tuple[Array, Cache],
    lengths: Array,
    rows: Array,
    prompts: Array,
    keys: Array,
) -> Slots:
    hidden, cache = prefilled
    own = len(slots.live)
    if writer.mesh is not None:
        rows = rows - own * jax.lax.axis_index(writer.axes)
    # A negative number would count from the end.
    rows = jnp.where((rows >= 0) & (rows < own), rows, own)

    def fill(old: Array, new: Array) -> Array:
        # The prompts' slots are the first ones, of keys on the last axis and of values on the one before.
        return old.at[rows, :, : new.shape[2], : new.shape[3]].set(new[prompts], mode="drop")

    def put(old: Array, new: Any) -> Array:
        return old.at[rows].set(new, mode="drop")

    return dataclasses.replace(
        slots,
        cache=jax.tree.map(fill, slots.cache, cache),
        hidden=put(slots.hidden, hidden[prompts]),
        position=put(slots.position, lengths[prompts]),
        live=put(slots.live, True),
        keys=put(slots.keys, keys),
        state=put(slots.state, 0),
        count=put(slots.count, 0),
        ended=put(slots.ended, False),
    )


@partial(jax.jit, static_argnames="writer", donate_argnames="slots")
def advance(writer: Writer, decoder: Decoder, table: Array, slots: Slots, least: Array) -> Slots:
    """Writes until at most `least` rows of a device still do.

    Every device runs its own loop: no row needs another, and none waits for those of other devices, unless features
    are split over `tensor`: then all take as many steps.

    Args:
      writer: see `Writer`.
      decoder: parameters.
      table: int32 `[states, vocab]`, see `stops.stop_table`.
      slots: the rows; the argument is consumed.
      least: int32; 0 goes on until all replies are finished.
    """
    run = _on_mesh(writer, partial(_advance, writer), (P(), P(), writer.rows, P()), writer.rows)
    return _laid(writer, run(decoder, table, slots, least))


@partial(jax.jit, static_argnames=("writer", "steps"), donate_argnames="slots")
def write(writer: Writer, decoder: Decoder, table: Array, slots: Slots, steps: int) -> Slots:
    """`advance`, but for at most so many steps: for replies that are shown while they are written."""
    run = _on_mesh(writer, partial(_advance, writer, steps=steps), (P(), P(), writer.rows, P()), writer.rows)
    return _laid(writer, run(decoder, table, slots, jnp.int32(0)))


def _advance(
    writer: Writer, decoder: Decoder, table: Array, slots: Slots, least: Array, steps: int | None = None
) -> Slots:
    eos = jnp.asarray(writer.eos_ids, jnp.int32)
    rows = jnp.arange(len(slots.live))
    most = slots.ids.shape[1]

    def step(slots: Slots) -> Slots:
        live = slots.live
        # A number for each token, whatever else is in the batch.
        uniforms = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count)))(
            jax.random.wrap_key_data(slots.keys), slots.count
        )
        token, log_prob, sampled_log_prob = draw(decoding.logits(decoder, slots.hidden), uniforms, writer.sampling)
        place = jnp.where(live, slots.count, most)
        state = jnp.where(live, table[slots.state, token], slots.state)
        ended = jnp.any(token[:, None] == eos, axis=1) | (state == len(table) - 1)
        count = slots.count + live
        hidden, cache = decoding.step(writer.config, decoder, token, slots.position, slots.cache, writer.compute_dtype)
        return Slots(
            cache=cache,
            hidden=hidden,
            position=slots.position + live,
            live=live & ~ended & (count < most),
            keys=slots.keys,
            state=state,
            count=count,
            ids=slots.ids.at[rows, place].set(token, mode="drop"),
            log_probs=slots.log_probs.at[rows, place].set(log_prob, mode="drop"),
            sampled_log_probs=slots.sampled_log_probs.at[rows, place].set(sampled_log_prob, mode="drop"),
            ended=jnp.where(live, ended, slots.ended),
        )

    def more(slots: Slots) -> Array:
        excess = jnp.sum(slots.live) - least
        if writer.mesh is not None and writer.axes and writer.mesh.shape.get("tensor", 1) > 1:
            # Devices that share a layer's features meet in every step, in programs of all devices.
            excess = jax.lax.pmax(excess, writer.axes)
        return excess > 0

    if steps is None:
        return jax.lax.while_loop(more, step, slots)

    def unfinished(state: tuple[Array, Slots]) -> Array:
        return (state[0] < steps) & more(state[1])

    return jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, step(state[1])), (jnp.int32(0), slots))[1]
