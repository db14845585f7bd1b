"""Streamed replies are those that generation writes, whoever comes and goes beside them."""

from __future__ import annotations

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax.data.characters import CharacterTokenizer
from duet_jax.feedback import Deployed
from duet_jax.feedback.deployed import Engine as Compiled
from duet_jax.models import Model, llama, lora
from duet_jax.models.generate import generate
from duet_jax.models.sampling import GREEDY
from duet_jax.serve.engine import Busy, Closed, Engine, Reader, Settings

SHAPE = llama.LlamaConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=64,
)
TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxy\n")
SETTINGS = Settings(GREEDY, max_new_tokens=12, stop=("zz",), longest=16, rows=2, waiting=3)


class Listener:
    """Collects what a ticket's owner is told."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, text: str, last: bool) -> None:
        self.parts.append(text)
        self.begun.set()
        if last:
            self.ended.set()

    @property
    def text(self) -> str:
        assert self.ended.wait(120)
        return "".join(self.parts)


@pytest.fixture(scope="module")
def models() -> dict[int, Deployed]:
    params = llama.init(SHAPE, key=jax.random.key(0))
    engine = Compiled(Model(SHAPE, params, TOKENIZER, "test", ""), chat=False, buckets=(8, 16))
    found = {0: Deployed(engine, params)}
    for number in (1, 2):
        adapters = lora.init(SHAPE, lora.LoraConfig(rank=2), key=jax.random.key(number))
        grown = jax.tree.map(
            lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapters.factors
        )
        found[number] = Deployed(engine, params, dataclasses.replace(adapters, factors=grown))
    return found


@pytest.fixture
def engine(models):
    found = Engine(SETTINGS)
    for number, model in models.items():
        found.add(number, model)
    yield found
    found.stop()


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 30, rng.integers(1, 17)).astype(np.int32) for _ in range(count)]


def expected(model: Deployed, asked: list[np.ndarray]) -> list[str]:
    found = generate(
        SHAPE,
        model.params,
        model.lora,
        asked,
        TOKENIZER,
        sampling=GREEDY,
        max_new_tokens=12,
        buckets=(16,),
        rows=len(asked),
        stop_strings=("zz",),
    )
    return [texts[0] for texts in found.texts]


def test_replies_are_those_of_generation_and_rows_are_refilled(engine, models) -> None:
    asked, heard = prompts(4), {}
    for number in models:
        # Two rows and three who may wait: the others come when there is room.
        for row, prompt in enumerate(asked):
            heard[number, row] = listener = Listener()
            while True:
                try:
                    engine.ask(number, prompt, listener)
                    break
                except Busy:
                    assert heard.get((number, row - 1), heard[0, 0]).ended.wait(120)
                    time.sleep(0.01)
    found = {number: [heard[number, row].text for row in range(4)] for number in models}
    assert found == {number: expected(model, asked) for number, model in models.items()}
    # Adapters change what is said, so that nobody has been answered by another's.
    assert len({tuple(texts) for texts in found.values()}) == 3
    assert any(len([part for part in listener.parts if part]) > 1 for listener in heard.values())
    # All decoders are over one copy of the base model's kernels.
    kernels = [jax.tree.leaves(engine._lanes[number].decoder.layers[0][0]) for number in (1, 2)]
    assert all(one is other for one, other in zip(*kernels, strict=True))


def test_who_goes_makes_room_and_who_is_too_many_is_told(models) -> None:
    engine = Engine(dataclasses.replace(SETTINGS, rows=1, waiting=1, max_new_tokens=4000, stop=()))
    shape = dataclasses.replace(SHAPE, max_length=5000)
    base = models[0].engine.model
    # A model that never ends: whoever has the only row keeps it.
    endless = dataclasses.replace(base, config=shape, tokenizer=CharacterTokenizer(TOKENIZER.alphabet, eos_ids=()))
    engine.add(0, dataclasses.replace(models[0], engine=dataclasses.replace(models[0].engine, model=endless)))
    first, second = Listener(), Listener()
    ticket = engine.ask(0, prompts(1)[0], first)
    assert first.begun.wait(120)
    waiting = engine.ask(0, prompts(1)[0], second)
    with pytest.raises(Busy):
        engine.ask(0, prompts(1)[0], Listener())
    ticket.cancelled = True
    assert second.begun.wait(120)
    with pytest.raises(Closed):
        engine.ask(9, prompts(1)[0], Listener())
    engine.remove(0)
    assert engine.open == ()
    with pytest.raises(Closed):
        engine.ask(0, prompts(1)[0], Listener())
    engine.stop()
    assert second.ended.is_set() and waiting.failed and not first.ended.is_set()


def test_a_failure_is_told_to_all_who_wait(engine, models, monkeypatch, caplog) -> None:
    def fail(*arguments) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("duet_jax.serve.engine.slots.write", fail)
    listener = Listener()
    ticket = engine.ask(1, prompts(1)[0], listener)
    assert listener.ended.wait(120) and ticket.failed
    engine._thread.join(120)
    assert engine.open == () and "no memory" in caplog.text
    with pytest.raises(Closed):
        engine.ask(1, prompts(1)[0], Listener())
    # Nor does it open a trial that nobody would answer for.
    monkeypatch.undo()
    with pytest.raises(Closed, match="has failed"):
        engine.add(1, models[1])
    assert engine.open == ()


def test_a_reader_shows_whole_characters_and_no_stop_string() -> None:
    words = [b"", b"a", b"\xc3", b"\xa9", b"st", b"op", b"o", b"!"]
    reader = Reader(words, (0,), ("stop",))
    shown = [
        reader.read(ids, last)
        for ids, last in (([1], False), ([2], False), ([3], False), ([4], False), ([6], False), ([7], False))
    ]
    # "sto" might have become "stop", and did not.
    assert shown == ["a", "", "é", "", "", "sto!"]
    assert reader.read([4], False) == "" and reader.read([5], True) == ""
    other = Reader(words, (0,), ())
    assert other.read([1, 2], False) == "a" and other.read([0], True) == "\ufffd"
