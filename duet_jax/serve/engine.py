"""Replies that are streamed to several people at once, from the models of several trials.

One thread writes. A model has a fixed number of rows; whoever asks is given an idle one between two steps, so that
nobody waits for the replies of others to end (continuous batching). Models of trials with adapters share the base
model's parameters. Rows of one step are of one model: with k models in use a step of each reads all parameters, and a
reply takes up to k times as long as alone. Adapters that are gathered row by row would save that, but would be copied
in every step; trials open at once are few.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duet_jax.feedback import Deployed
from duet_jax.models import decoding, slots
from duet_jax.models.sampling import Sampling
from duet_jax.models.slots import Writer
from duet_jax.models.stops import stop_table

# Tokens that are written between two looks at who has come and gone: few, so that text flows.
STEPS = 4

logger = logging.getLogger(__name__)


class Busy(Exception):
    """As many wait as may."""


class Closed(Exception):
    """The trial is not open, or the engine has failed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How replies are written.

    Attributes:
      sampling: distribution of each token.
      max_new_tokens: of a reply.
      stop: strings that end a reply and are no part of it.
      longest: most tokens of a prompt.
      rows: replies of one model that are written at the same time.
      waiting: most people that wait for a row, of all models together.
    """

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    longest: int
    rows: int
    waiting: int


class Reader:
    """The text of a reply as its tokens come: whole characters, and nothing that may turn out to be a stop string.

    Args:
      words: bytes that each token adds.
      ends: ids that end a reply and are no part of it.
      stop: stop strings.
    """

    def __init__(self, words: Sequence[bytes], ends: Sequence[int], stop: Sequence[str]) -> None:
        self._words, self._ends, self._stop = words, frozenset(ends), [string.encode() for string in stop]
        self._held = b""
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, ids: Sequence[int], last: bool) -> str:
        """What more of the text is certain after further tokens; with `last`, all that is left."""
        data = self._held + b"".join(self._words[i] for i in ids if i not in self._ends)
        found = [place for place in map(data.find, self._stop) if place >= 0]
        if found:
            data, last = data[: min(found)], True
        held = 0 if last else max((_overlap(data, string) for string in self._stop), default=0)
        sure, self._held = data[: len(data) - held], data[len(data) - held :]
        return self._characters.decode(sure, last)


def _overlap(data: bytes, string: bytes) -> int:
    """Length of the longest end of `data` with which `string` begins, all of it excepted."""
    lengths = range(min(len(string) - 1, len(data)), 0, -1)
    return next((size for size in lengths if data.endswith(string[:size])), 0)


class Ticket:
    """One reply that somebody waits for. `on_text` is given (text, last) in the thread that writes, in order.

    A ticket is given up by setting `cancelled`; `failed` says that no more text will come.
    """

    def __init__(self, prompt: np.ndarray, seed: int, on_text: Callable[[str, bool], None]) -> None:
        self.prompt, self.on_text = prompt, on_text
        self.key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        self.cancelled = False
        self.failed = False


class _Lane:
    """Rows of one model. All methods but the constructor are called by the thread that writes."""

    def __init__(self, model: Deployed, decoder: decoding.Decoder, settings: Settings) -> None:
        network, tokenizer = model.engine.model, model.engine.model.tokenizer
        self.settings, self.pad_id, self.ends = settings, tokenizer.pad_id, tuple(tokenizer.eos_ids)
        dtype = jnp.dtype(model.engine.compute_dtype)
        self.writer, self.decoder = Writer(network.config, settings.sampling, self.ends, dtype), decoder
        known = tokenizer.token_bytes
        self.words = known + (b"",) * (network.config.vocab_size - len(known))
        self.table = jnp.asarray(stop_table(settings.stop, self.words))
        self.buckets = sorted({min(bucket, settings.longest) for bucket in model.engine.buckets})
        most = settings.max_new_tokens
        self.slots = slots.empty(self.writer, settings.rows, self.buckets[-1] + most, most)
        self.owners: dict[int, tuple[Ticket, Reader, int]] = {}
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.open = True

    @property
    def busy(self) -> bool:
        return bool(self.owners or self.waiting)

    def admit(self, ticket: Ticket) -> None:
        rows = self.settings.rows
        row = next(row for row in range(rows) if row not in self.owners)
        self.owners[row] = (ticket, Reader(self.words, self.ends, self.settings.stop), 0)
        prompt = ticket.prompt if len(ticket.prompt) else np.array([self.pad_id], np.int32)
        bucket = next(size for size in self.buckets if size >= len(prompt))
        tokens = np.full((1, bucket), self.pad_id, np.int32)
        tokens[0, : len(prompt)] = prompt
        lengths = np.array([len(prompt)], np.int32)
        prefilled = slots.prefill(self.writer, self.decoder, tokens, lengths)
        chosen, keys = np.full(rows, rows, np.int32), np.zeros((rows, *ticket.key.shape), np.uint32)
        chosen[0], keys[0] = row, ticket.key
        self.slots = slots.admit(self.writer, self.slots, prefilled, lengths, chosen, np.zeros(rows, np.int32), keys)

    def step(self) -> None:
        """Writes a few tokens of each reply and hands them out; rows of those who have gone become idle."""
        gone = [row for row, (ticket, *_) in self.owners.items() if ticket.cancelled]
        for row in gone:
            del self.owners[row]
        if gone:
            stays = np.ones(self.settings.rows, bool)
            stays[gone] = False
            self.slots = dataclasses.replace(self.slots, live=self.slots.live & stays)
        self.slots = slots.write(self.writer, self.decoder, self.table, self.slots, STEPS)
        live, counts, ids = jax.device_get((self.slots.live, self.slots.count, self.slots.ids))
        for row, (ticket, reader, seen) in list(self.owners.items()):
            last = not live[row]
            text = reader.read(ids[row, seen : counts[row]].tolist(), last)
            self.owners[row] = (ticket, reader, int(counts[row]))
            if last:
                del self.owners[row]
            if text or last:
                ticket.on_text(text, last)

    def warm(self) -> None:
        """Compiles whatever this model's replies need, before anybody waits for one."""
        for bucket in self.buckets:
            ticket = Ticket(np.full(bucket, self.pad_id, np.int32), 0, lambda text, last: None)
            self.admit(ticket)
            self.step()
            ticket.cancelled = True
            self.step()


class Engine:
    """Models by trial number, and the thread that writes their replies. `stop` ends it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lanes: dict[int, _Lane] = {}
        self._base: decoding.Decoder | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="duet-replies", daemon=True)
        self._thread.start()

    @property
    def open(self) -> tuple[int, ...]:
        """Numbers of the trials whose models answer."""
        with self._changed:
            return tuple(number for number, lane in self._lanes.items() if lane.open and not self._stopped)

    def add(self, number: int, model: Deployed) -> None:
        """Opens a trial, once its programs are compiled; replies of others go on meanwhile.

        Raises:
          Closed: the engine has failed or was stopped.
        """
        shape, dtype = model.engine.model.config, jnp.dtype(model.engine.compute_dtype)
        if model.lora is None:
            decoder = decoding.unstack(shape, model.params, None, dtype)
        else:
            if self._base is None:
                self._base = decoding.unstack(shape, model.params, None, dtype)
            decoder = decoding.adapted(self._base, model.lora)
        lane = _Lane(model, decoder, self.settings)
        lane.warm()
        with self._changed:
            if self._stopped:
                raise Closed("the engine that writes replies has failed")
            self._lanes[number] = lane

    def remove(self, number: int) -> None:
        """Closes a trial; replies that are waited for are still written."""
        with self._changed:
            if number in self._lanes:
                self._lanes[number].open = False
                self._changed.notify()

    def ask(self, number: int, prompt: np.ndarray, on_text: Callable[[str, bool], None]) -> Ticket:
        """Queues a reply.

        Args:
          number: of the trial.
          prompt: int32 ids, at most `settings.longest`.
          on_text: see `Ticket`.

        Raises:
          Closed: the trial is not open.
          Busy: too many wait.
        """
        ticket = Ticket(prompt, secrets.randbits(31), on_text)
        with self._changed:
            lane = self._lanes.get(number)
            if lane is None or not lane.open or self._stopped:
                raise Closed
            if sum(len(lane.waiting) for lane in self._lanes.values()) >= self.settings.waiting:
                raise Busy
            lane.waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self) -> None:
        """Ends the thread; replies that are not finished fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while lanes := self._work():
                for lane in lanes:
                    while lane.waiting and len(lane.owners) < self.settings.rows:
                        lane.admit(lane.waiting.popleft())
                    if lane.owners:
                        lane.step()
        except Exception:
            # Whatever it is, those who wait must hear of it, and nobody may be asked to wait any more.
            logger.exception("the engine that writes replies has failed; restart the server")
        finally:
            self._fail_all()

    def _work(self) -> list[_Lane]:
        """Lanes with something to write; waits until there are some. None when stopped."""
        with self._changed:
            while not self._stopped:
                for lane in self._lanes.values():
                    lane.waiting = collections.deque(ticket for ticket in lane.waiting if not ticket.cancelled)
                self._lanes = {number: lane for number, lane in self._lanes.items() if lane.open or lane.busy}
                if found := [lane for lane in self._lanes.values() if lane.busy]:
                    return found
                self._changed.wait()
        return []

    def _fail_all(self) -> None:
        with self._changed:
            self._stopped = True
            lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            for ticket in (*(ticket for ticket, *_ in lane.owners.values()), *lane.waiting):
                ticket.failed = True
                ticket.on_text("", True)


def settings_of(task: Any, longest: int, rows: int) -> Settings:
    """How a task of kind "people" wants its answers; four times as many people as rows may wait."""
    return Settings(Sampling(task.temperature), task.max_new_tokens, tuple(task.stop), longest, rows, 4 * rows)
