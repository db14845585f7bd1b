"""Replies to many prompts: several samples of each, stop strings, and rows that are refilled as they finish."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from duet_jax.distributed.place import readable
from duet_jax.distributed.processes import stop_if_told
from duet_jax.models import slots as rows_
from duet_jax.models.decoding import Decoder, unstack
from duet_jax.models.llama import LlamaConfig, Params
from duet_jax.models.lora import Lora
from duet_jax.models.sampling import Sampling
from duet_jax.models.slots import Writer
from duet_jax.models.stops import stop_table, text


class Vocabulary(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def token_bytes(self) -> tuple[bytes, ...]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Replies, M to each of P prompts, of at most N tokens.

    Attributes:
      ids: int32 `[P, M, N]`, the pad id after the end.
      lengths: int32 `[P, M]`, ids that count: with the end of text where the model wrote one, and through the token
        that completes a stop string. At least 1.
      ended: bool `[P, M]`, whether the reply ended so, rather than after N tokens.
      log_probs: float32 `[P, M, N]`, log-probability of each id under the model, nats; 0 after the end.
      sampled_log_probs: float32 `[P, M, N]`, the same under the truncated, tempered distribution it was drawn from.
      texts: `[P][M]`, without special tokens, cut before the first stop string.
    """

    ids: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray
    texts: tuple[tuple[str, ...], ...]


def generate(
    config: LlamaConfig,
    params: Params,
    lora: Lora | None,
    prompts: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    buckets: Sequence[int],
    rows: int,
    samples: int = 1,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    compute_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Samples:
    """Writes replies.

    The samples of a prompt share its prefill. A reply's random numbers depend on `seed`, the prompt's ids and the
    sample's number alone (and on how often the prompt came before), so that it is the same in any company, up to
    rounding.

    Args:
      config: shape of the network.
      params: its parameters.
      lora: adapters, or None.
      prompts: int32 `[length]` each; one without ids is given the pad id.
      vocabulary: the tokenizer.
      sampling: distribution of each token.
      max_new_tokens: N.
      buckets: lengths that prompts are padded to. For each that is needed, four functions are compiled, once in a
        process; prompts that would not fill the rows go to the next larger one.
      rows: replies that are written at the same time.
      samples: M, replies to a prompt.
      stop_strings: texts that end a reply when they are complete.
      seed: of all random numbers.
      compute_dtype: dtype of matrix products.
      mesh: spreads the rows, see `Writer`.
      on_progress: is given how many replies are finished, and of how many.

    Raises:
      ValueError: a prompt is longer than the largest bucket, a stop string is empty, or a number is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("rows", rows), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    prompts = [np.asarray(prompt, np.int32) if len(prompt) else np.array([vocabulary.pad_id]) for prompt in prompts]
    longest = max(map(len, prompts), default=0)
    if longest > max(buckets):
        raise ValueError(f"a prompt has {longest} tokens, more than the largest bucket holds ({max(buckets)}).")
    writer = Writer(config, sampling, tuple(vocabulary.eos_ids), jnp.dtype(compute_dtype), mesh)
    rows = -(-rows // writer.devices) * writer.devices
    decoder = writer.gathered(unstack(config, params, lora, writer.compute_dtype))
    # Models often have more rows than their tokenizer has tokens; these can be drawn, and add nothing to a text.
    known = vocabulary.token_bytes
    words = known + (b"",) * (config.vocab_size - len(known))
    table = writer.copied(jnp.asarray(stop_table(tuple(stop_strings), words)))
    keys = np.asarray(_keys(seed, _origins(prompts), np.arange(samples, dtype=np.uint32)))
    shape = (len(prompts), samples, max_new_tokens)
    found = Samples(
        np.full(shape, vocabulary.pad_id, np.int32),
        np.zeros(shape[:2], np.int32),
        np.zeros(shape[:2], bool),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        (),
    )
    done = 0
    for bucket, chosen in _plan([len(prompt) for prompt in prompts], buckets, -(-rows // samples)):
        session = _Session(writer, decoder, table, bucket, rows, max_new_tokens, vocabulary.pad_id)
        for replies in session.run(prompts, chosen, samples, keys):
            for (prompt, sample), count, ended, *arrays in replies:
                found.lengths[prompt, sample], found.ended[prompt, sample] = count, ended
                for whole, array in zip((found.ids, found.log_probs, found.sampled_log_probs), arrays, strict=True):
                    whole[prompt, sample, :count] = array[:count]
            done += len(replies)
            on_progress(done, len(prompts) * samples)
    return dataclasses.replace(found, texts=_texts(found, vocabulary.eos_ids, words, tuple(stop_strings)))


def _texts(
    found: Samples, eos_ids: Sequence[int], words: Sequence[bytes], stop_strings: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    def of(ids: np.ndarray, length: int) -> str:
        # Not every model's end of text is marked as special.
        end = length - 1 if ids[length - 1] in eos_ids else length
        return text(ids[:end].tolist(), words, stop_strings)

    return tuple(
        tuple(of(ids, length) for ids, length in zip(*prompt, strict=True))
        for prompt in zip(found.ids, found.lengths, strict=True)
    )


def _plan(lengths: Sequence[int], buckets: Sequence[int], enough: int) -> Iterator[tuple[int, list[int]]]:
    """Prompts by bucket; fewer than `enough` go on to the next bucket that has any, if there is one."""
    sizes = sorted(set(buckets))
    place = np.searchsorted(sizes, lengths)
    waiting: list[int] = []
    for number, size in enumerate(sizes):
        waiting += np.flatnonzero(place == number).tolist()
        if waiting and (len(waiting) >= enough or not (place > number).any()):
            yield size, waiting
            waiting = []


def _origins(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """What tells a prompt from others, uint32 `[>= P, 3]`: a hash of its ids, and how often it came before.

    The number of rows is a power of two, so that few programs are compiled.
    """
    seen: collections.Counter[bytes] = collections.Counter()
    origins = np.zeros((1 << max(len(prompts) - 1, 0).bit_length(), 3), np.uint32)
    for row, prompt in enumerate(prompts):
        digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
        origins[row] = (*np.frombuffer(digest, np.uint32), seen[digest])
        seen[digest] += 1
    return origins


@jax.jit
def _keys(seed: int, origins: Array, samples: Array) -> Array:
    """Data of a PRNG key for each reply, uint32 `[rows of origins, M, ...]`."""

    def key(origin: Array, sample: Array) -> Array:
        found = jax.random.key(seed)
        for number in (*origin, sample):
            found = jax.random.fold_in(found, number)
        return jax.random.key_data(found)

    return jax.vmap(jax.vmap(key, (None, 0)), (0, None))(origins, samples)


class _Session:
    """Rows at work on the prompts of one bucket."""

    def __init__(
        self, writer: Writer, decoder: Decoder, table: Array, bucket: int, rows: int, most: int, pad_id: int
    ) -> None:
        self.writer, self.decoder, self.table = writer, decoder, table
        self.bucket, self.rows, self.pad_id = bucket, rows, pad_id
        self.slots = rows_.empty(writer, rows, bucket + most, most)
        self.owners: dict[int, tuple[int, int]] = {}

    def run(
        self, prompts: Sequence[np.ndarray], chosen: list[int], samples: int, keys: np.ndarray
    ) -> Iterator[list[tuple]]:
        """Replies as they finish: prompt and sample, count, whether it ended, ids, and both log-probabilities."""
        size = -(-self.rows // samples)
        size = -(-size // self.writer.devices) * self.writer.devices
        groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        waiting: list[tuple[int, int, int]] = []
        while True:
            idle = [row for row in range(self.rows) if row not in self.owners]
            while idle and (waiting or groups):
                if not waiting:
                    group = groups.pop(0)
                    prefilled, lengths = self._prefill([prompts[prompt] for prompt in group], size)
                    waiting = [(place, prompt, i) for place, prompt in enumerate(group) for i in range(samples)]
                taken, waiting = waiting[: len(idle)], waiting[len(idle) :]
                self._admit(prefilled, lengths, idle[: len(taken)], taken, keys)
                idle = idle[len(taken) :]
            if not self.owners:
                return
            # With others waiting, rows are refilled when an eighth of them is idle: that costs a copy into the cache.
            per_device = self.rows // self.writer.devices
            least = per_device - max(per_device // 8, 1) if waiting or groups else 0
            self.slots = rows_.advance(self.writer, self.decoder, self.table, self.slots, np.int32(least))
            yield self._harvest()

    def _prefill(self, prompts: list[np.ndarray], size: int) -> tuple[Any, np.ndarray]:
        tokens, lengths = np.full((size, self.bucket), self.pad_id, np.int32), np.ones(size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        return rows_.prefill(self.writer, self.decoder, *self.writer.spread((tokens, lengths))), lengths

    def _admit(
        self, prefilled: Any, lengths: np.ndarray, idle: list[int], taken: list[tuple[int, int, int]], keys: np.ndarray
    ) -> None:
        rows, places = np.full(self.rows, self.rows, np.int32), np.zeros(self.rows, np.int32)
        given = np.zeros((self.rows, keys.shape[2]), np.uint32)
        for number, (row, (place, prompt, sample)) in enumerate(zip(idle, taken, strict=True)):
            rows[number], places[number], given[number] = row, place, keys[prompt, sample]
            self.owners[row] = prompt, sample
        self.slots = rows_.admit(self.writer, self.slots, prefilled, lengths, rows, places, given)

    def _harvest(self) -> list[tuple]:
        stop_if_told()
        live = np.asarray(readable(self.slots.live))
        finished = [row for row in self.owners if not live[row]]
        slots = self.slots
        arrays = jax.device_get(
            readable((slots.count, slots.ended, slots.ids, slots.log_probs, slots.sampled_log_probs))
        )
        return [(self.owners.pop(row), *(array[row] for array in arrays)) for row in finished]
