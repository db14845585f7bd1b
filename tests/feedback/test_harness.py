"""Requests of the lm-evaluation-harness: the numbers and texts of the definition."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from duet_jax.errors import ConfigError
from duet_jax.feedback import Deployed
from duet_jax.feedback.harness.decoding import Decoding
from duet_jax.models.sampling import GREEDY, Sampling
from tests.feedback.benchmarks import CONFIG, TOKENIZER, harness_model, log_probs, needs_harness, next_log_probs


def greedy_reply(model: Deployed, ids: list[int], most: int) -> list[int]:
    """Ids that greedy decoding writes, the end of text included."""
    new: list[int] = []
    while len(new) < most and (not new or new[-1] != TOKENIZER.eos_ids[0]):
        new.append(int(next_log_probs(model, ids + new)[-1].argmax()))
    return new


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@needs_harness
def test_log_likelihoods_are_those_of_the_definition(tiny):
    encode = TOKENIZER.encode
    replies = {letter: greedy_reply(tiny, [TOKENIZER.bos_id, *encode(letter)], 3) for letter in "abcdefghij"}
    letter, greedy = next(pair for pair in replies.items() if min(pair[1]) > 3)  # without special ids
    long = "abc " * 60
    cases = [
        (("Who?", " Tom"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tom")),
        (("Who?", " Tim"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tim")),
        (("Who? ", "Tom"), [TOKENIZER.bos_id, *encode("Who?")], encode(" Tom")),  # the space belongs to the answer
        (("Who?", "A"), [TOKENIZER.bos_id, *encode("Who?")], encode("A")),
        (("Who?", "B"), [TOKENIZER.bos_id, *encode("Who?")], encode("B")),
        (("", "Tom"), [TOKENIZER.bos_id], encode("Tom")),
        ((long + "a", "bc"), encode(long + "a")[-95:], encode("bc")),
        ((letter, TOKENIZER.decode(greedy)), [TOKENIZER.bos_id, *encode(letter)], greedy),
    ]
    found = harness_model(tiny, batch_size=4).loglikelihood(instances("loglikelihood", [case[0] for case in cases]))
    expected = [log_probs(tiny, context, continuation) for _, context, continuation in cases]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and not all(greedy for _, greedy in found)


@needs_harness
def test_rolling_windows_predict_every_token_once(tiny):
    text = "the cat sat. " * 20
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]  # the model expects BOS, and the harness puts one more before
    expected, start = log_probs(tiny, [TOKENIZER.bos_id], ids[:96])[0], 96
    while start < len(ids):
        end = min(start + 96, len(ids))
        expected += log_probs(tiny, ids[end - 97 : start], ids[start:end])[0]
        start = end
    found = harness_model(tiny, batch_size=4).loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,), ("a",)])
    )
    assert found[0] == pytest.approx(expected, abs=1e-2, rel=1e-5)


@needs_harness
def test_choices_of_one_token_share_a_row_and_rounds_compile_nothing(tiny):
    from duet_jax.feedback.harness import scoring

    compiled, rows = scoring.make_score(CONFIG, tiny.engine.compute_dtype, None), []
    pairs = [([1, 5 + i], [7, choice]) for i in range(4) for choice in (8, 9, 10, 11)]
    scoring.score_continuations(tiny, pairs, 4)
    before = compiled._cache_size()
    assert before
    original = scoring.gather_batch

    def counted(encoded, chosen, *rest):
        rows.extend(chosen)
        return original(encoded, chosen, *rest)

    scoring.gather_batch = counted
    try:
        changed = Deployed(tiny.engine, jax.tree.map(lambda x: x * 0.9, tiny.params))
        assert scoring.score_continuations(changed, pairs, 4) != scoring.score_continuations(tiny, pairs, 4)
    finally:
        scoring.gather_batch = original
    assert sorted(rows) == sorted([*range(4)] * 2)
    assert compiled._cache_size() == before


@needs_harness
def test_requests_are_answered_in_their_order_and_stop_where_told(tiny):
    asked = [
        ("Who?", {"until": ["a", "e"], "max_gen_toks": 12}),
        ("Where is it?", {"max_gen_toks": 12}),
        ("Why?", {"until": ["a", "e"], "max_gen_toks": 12}),
        ("x" * 200, {"max_gen_toks": 12}),
        ("Who?", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}),
    ]
    model = harness_model(tiny, batch_size=2)
    found = model.generate_until(instances("generate_until", asked))
    for (text, arguments), reply in zip(asked[:4], found, strict=False):
        most = arguments["max_gen_toks"]
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)][-(96 - most) :]
        expected = TOKENIZER.decode(greedy_reply(tiny, ids, most))
        assert reply == (re.split("[ae]", expected)[0] if "until" in arguments else expected)
    assert found == model.generate_until(instances("generate_until", asked))
    assert found[4] != found[0]


def test_generation_arguments_are_read_as_the_harness_does():
    read = Decoding.read
    assert read({}, "</s>", 512) == Decoding(GREEDY, 256, ("</s>",))
    assert read({"until": "\n", "max_new_tokens": 9, "num_beams": 1}, "</s>", 10) == Decoding(GREEDY, 9, ("\n", "</s>"))
    sampled = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "max_gen_toks": 4, "max_tokens": 7, "until": ["a", ""]}
    assert read(sampled, "", 10) == Decoding(Sampling(temperature=0.5, top_p=0.9), 4, ("a",))
    assert read({**sampled, "do_sample": False}, "", 10).sampling == GREEDY
    with pytest.raises(ConfigError, match="has repetition_penalty, which we cannot do"):
        read({"repetition_penalty": 1.2}, "", 512)
    with pytest.raises(ConfigError, match="asks for 256 new tokens .* together may have 96"):
        read({}, "", 96)
    with pytest.raises(ConfigError, match="temperature 0.0; it must be above 0"):
        read({"do_sample": True}, "", 512)
    with pytest.raises(ConfigError, match="top_p is 3"):
        read({"temperature": 1.0, "top_p": 3}, "", 512)
