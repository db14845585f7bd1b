"""Replies: greedy ones are those of the full forward pass, and samples are the same in any company."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from duet_jax.models import llama, lora
from duet_jax.models.generate import generate
from duet_jax.models.sampling import GREEDY, Sampling

CONFIG = llama.LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
EOS, PAD = 3, 0


@dataclasses.dataclass(frozen=True)
class Letters:
    """Token i is the i-th letter; the first four are special."""

    eos_ids: tuple[int, ...] = (EOS,)
    pad_id: int = PAD
    token_bytes: tuple[bytes, ...] = (b"",) * 4 + tuple(chr(61 + i).encode() for i in range(4, 40))


def network(scale: float = 40.0):
    params = llama.init(CONFIG, key=jax.random.key(0))
    return {**params, "embedding": params["embedding"] * scale}


def prompts(count: int, seed: int = 0, longest: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 40, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def run(params, given, **options):
    settings = dict(sampling=Sampling(), max_new_tokens=8, buckets=(4, 16), rows=4)
    vocabulary = options.pop("vocabulary", Letters())
    return generate(CONFIG, params, options.pop("lora", None), given, vocabulary, **(settings | options))


@functools.partial(jax.jit, static_argnames="config")
def scores(params, ids, config=CONFIG, adapters=None):
    """Logits after each of at most 32 tokens; one program, for padding on the right changes nothing."""
    hidden = llama.hidden_states(config, params, ids[None], lora=adapters)
    return hidden[0] @ llama.output_head(params).T


def padded(ids) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, 32 - len(ids)))


def best(params, prompt: np.ndarray, steps: int, adapters=None) -> list[int]:
    ids = prompt.tolist()
    for _ in range(steps):
        ids.append(int(jnp.argmax(scores(params, padded(ids), adapters=adapters)[len(ids) - 1])))
    return ids[len(prompt) :]


def log_probs(params, prompt, reply, temperature: float = 1.0, config=CONFIG) -> np.ndarray:
    ids = np.concatenate([prompt, reply])
    logits = np.asarray(scores(params, padded(ids), config)[len(prompt) - 1 : len(ids) - 1], np.float64) / temperature
    return logits[np.arange(len(reply)), reply] - special.logsumexp(logits, axis=1)


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_is_the_best_token_of_the_full_forward_pass(adapted):
    params, given = network(), prompts(3)
    adapters = None
    if adapted:
        adapters = lora.init(CONFIG, lora.LoraConfig(rank=2), key=jax.random.key(1))
        factors = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), adapters.factors)
        adapters = dataclasses.replace(adapters, factors=factors)
    found = run(params, given, sampling=GREEDY, vocabulary=Letters(eos_ids=()), lora=adapters)
    for row, prompt in enumerate(given):
        assert found.ids[row, 0].tolist() == best(params, prompt, 8, adapters)
    assert found.lengths.tolist() == [[8]] * 3
    assert not found.ended.any()
    assert not found.sampled_log_probs.any()


def test_samples_have_the_log_probabilities_of_a_forward_pass_and_stop_at_the_end_of_text():
    params, given, sampling = network(8.0), prompts(5), Sampling(temperature=1.7)
    found = run(params, given, samples=6, sampling=sampling, rows=7)
    assert set(found.lengths.ravel()) > {8}
    for prompt, ids, lengths, ended, model, sampled in zip(
        given, found.ids, found.lengths, found.ended, found.log_probs, found.sampled_log_probs, strict=True
    ):
        for i, length in enumerate(lengths):
            reply = ids[i, :length]
            np.testing.assert_allclose(model[i, :length], log_probs(params, prompt, reply), atol=1e-4)
            np.testing.assert_allclose(sampled[i, :length], log_probs(params, prompt, reply, 1.7), atol=1e-4)
            assert EOS not in reply[:-1]
            assert ended[i] == (reply[-1] == EOS)
            assert ended[i] or length == 8
            assert not (ids[i, length:] - PAD).any() and not model[i, length:].any() and not sampled[i, length:].any()


def test_a_reply_is_the_same_in_any_company():
    params, given = network(8.0), prompts(9)
    whole = run(params, given, samples=5, rows=6)
    for options in (dict(rows=45), dict(rows=1), dict(rows=4, samples=2), dict(buckets=(16,))):
        other = run(params, given, **{"samples": 5, **options})
        m = other.ids.shape[1]
        np.testing.assert_array_equal(other.ids, whole.ids[:, :m])
        np.testing.assert_allclose(other.log_probs, whole.log_probs[:, :m], atol=1e-5)
        assert other.texts == tuple(texts[:m] for texts in whole.texts)
    some = run(params, [given[7], given[2]], samples=5)
    np.testing.assert_array_equal(some.ids, whole.ids[[7, 2]])
    assert (run(params, given, samples=5, seed=1).ids != whole.ids).any()


def test_equal_prompts_get_samples_of_their_own():
    params = network(8.0)
    found = run(params, [np.array([5, 6, 7])] * 2, samples=4, vocabulary=Letters(eos_ids=()))
    assert len({tuple(reply) for prompt in found.ids for reply in prompt.tolist()}) == 8


def test_replies_have_the_exact_distribution_of_the_policy():
    """All replies of at most two tokens over five letters, the end of text among them, by chi-square."""
    config = dataclasses.replace(CONFIG, vocab_size=5)
    params = llama.init(config, key=jax.random.key(3))
    params = {**params, "embedding": params["embedding"] * 20}
    letters = Letters(token_bytes=(b"a", b"b", b"c", b"", b"e"))
    prompt, count = np.array([1, 4, 2], np.int32), 6000
    found = generate(
        config, params, None, [prompt], letters,
        sampling=Sampling(), max_new_tokens=2, buckets=(4,), rows=500, samples=count,
    )  # fmt: skip
    seen = collections.Counter(
        tuple(ids[:length].tolist()) for ids, length in zip(found.ids[0], found.lengths[0], strict=True)
    )
    every = [(EOS,), *((first, second) for first in (0, 1, 2, 4) for second in range(5))]
    theory = []
    for reply in every:
        theory.append(float(np.exp(log_probs(params, prompt, np.array(reply), config=config).sum())))
    assert abs(sum(theory) - 1) < 1e-5
    assert set(seen) <= set(every)
    observed = np.array([seen[reply] for reply in every])
    expected = np.array(theory) * count
    few = expected < 5
    observed = np.append(observed[~few], observed[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue > 1e-4


def test_stop_strings_end_a_reply_and_are_cut_from_its_text():
    params, given = network(), prompts(6)
    free = run(params, given, sampling=GREEDY, max_new_tokens=16, vocabulary=Letters(eos_ids=()))
    stop = free.texts[0][0][5:8]
    found = run(
        params, given, sampling=GREEDY, max_new_tokens=16, vocabulary=Letters(eos_ids=()), stop_strings=(stop, "~~")
    )
    assert found.ended[0, 0]
    for whole, cut, ids, length, ended in zip(
        free.texts, found.texts, found.ids, found.lengths, found.ended, strict=True
    ):
        place = whole[0].find(stop)
        assert cut[0] == (whole[0] if place < 0 else whole[0][:place])
        assert length[0] == (16 if place < 0 else place + len(stop))
        assert ended[0] == (place >= 0)
        assert not (ids[0, length[0] :] - PAD).any()


def test_a_steady_loop_compiles_nothing():
    params = network(8.0)
    compiled = []
    # Prompts of both buckets.
    given = [prompts(6, seed, longest=4) + prompts(6, seed) for seed in range(4)]
    run(params, given[0], samples=3, stop_strings=("abc",))

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(1, 4):
            other = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.01), params)
            run(other, given[seed], samples=3, seed=seed, stop_strings=("xyz",))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_a_model_may_have_more_rows_than_its_tokenizer_tokens():
    params, given = network(8.0), prompts(4)
    whole = run(params, given, samples=6, stop_strings=("ab",))
    few = Letters(token_bytes=Letters().token_bytes[:30])
    found = run(params, given, samples=6, stop_strings=("ab",), vocabulary=few)
    unknown = whole.ids >= 30
    assert unknown.any() and (found.ids >= 30).any()
    same = ~unknown.any(axis=2)
    np.testing.assert_array_equal(found.ids[same], whole.ids[same])
    for row, sample in np.argwhere(~same):
        kept = [i for i in found.ids[row, sample, : found.lengths[row, sample]] if i < 30]
        assert found.texts[row][sample] == b"".join(few.token_bytes[i] for i in kept).decode().split("ab")[0]


def test_progress_reaches_the_end():
    heard = []
    run(network(8.0), prompts(7), samples=2, on_progress=lambda done, of: heard.append((done, of)))
    assert heard[-1] == (14, 14)
    assert heard == sorted(heard)


def test_no_prompts_and_empty_prompts():
    params = network()
    assert run(params, []).texts == ()
    empty = run(params, [np.zeros(0, np.int32)], sampling=GREEDY)
    assert empty.ids.tolist() == run(params, [np.array([PAD])], sampling=GREEDY).ids.tolist()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="17 tokens, more than the largest bucket"):
        run(network(), [np.full(17, 5)])
    with pytest.raises(ValueError, match="rows is 0"):
        run(network(), prompts(1), rows=0)


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
import test_generate as t
mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
params, given = t.network(8.0), t.prompts(11)
one = t.run(params, given, samples=3, rows=8, stop_strings=("ab",))
many = t.run(params, given, samples=3, rows=8, stop_strings=("ab",), mesh=mesh)
np.testing.assert_array_equal(one.ids, many.ids)
np.testing.assert_array_equal(one.lengths, many.lengths)
np.testing.assert_allclose(one.log_probs, many.log_probs, atol=1e-5)
print(len(jax.devices()), "devices agree")
"""


def test_rows_spread_over_devices_write_the_same():
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, here], capture_output=True, text=True, env=environment, check=False
    )
    assert "4 devices agree" in done.stdout, done.stderr
