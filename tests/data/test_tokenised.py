from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from duet_jax.data import Example, encode, encode_prompts, gather_batch, tokenised
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.errors import DataError


def _backend():
    """Characters, the merges `\\n`+`b` and `a`+`a`, and chat markers."""
    characters = ["\n", *"abcdefghijklmnopqrstuvwxyz :"]
    vocabulary = {"<s>": 0, "</s>": 1, "<u>": 2, "<a>": 3}
    for token in [*characters, "\nb", "aa"]:
        vocabulary[token] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("\n", "b"), ("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    return backend


@dataclasses.dataclass(frozen=True)
class Fake:
    add_bos: bool = True
    bos_id: int | None = 0
    eos_ids: tuple[int, ...] = (1, 3)
    bos_in_template: bool = False
    backend: tokenizers.Tokenizer = dataclasses.field(default_factory=_backend)

    def encode_batch(self, texts):
        return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def ids(self, text):
        return self.encode_batch([text])[0]

    def render_chat(self, messages, add_generation_prompt):
        marks = {"user": "<u>", "assistant": "<a>", "system": ""}
        text = "".join(marks[m["role"]] + m["content"] for m in messages)
        return ("<s>" if self.bos_in_template else "") + text + ("<a>" if add_generation_prompt else "")


def test_plain_text_is_bos_prompt_newline_response_eos():
    t = Fake()
    encoded = encode([Example("x", "a cat", "sat")], t, chat=False, max_length=64)
    assert encoded.tokens[0].tolist() == [0, *t.ids("a cat\n"), *t.ids("sat"), 1]
    assert encoded.tokens[0].dtype == np.int32
    assert encoded.prompt_lengths.tolist() == [1 + len("a cat\n")]
    assert (encoded.ids, encoded.truncated, encoded.dropped) == (("x",), 0, 0)
    assert t.backend.decode(encoded.tokens[0].tolist()).replace(" ", "") == "acat\nsat"


def test_no_bos_and_no_eos_where_the_tokenizer_has_none():
    t = Fake(add_bos=False, eos_ids=())
    encoded = encode([Example("x", "c", "d")], t, chat=False, max_length=64)
    assert encoded.tokens[0].tolist() == t.ids("c\nd")
    without_id = encode([Example("x", "c", "d")], Fake(bos_id=None), chat=False, max_length=64)
    assert without_id.tokens[0].tolist() == [*t.ids("c\nd"), 1]


def test_no_token_straddles_the_boundary():
    t = Fake(add_bos=False)
    example = Example("x", "c", "baa")
    encoded = encode([example], t, chat=False, max_length=64)
    joint = t.ids("c\nbaa")
    assert t.backend.token_to_id("\nb") in joint and t.backend.token_to_id("\nb") not in encoded.tokens[0]
    prompts = encode_prompts([example], t, chat=False, max_length=64)
    # What the model is given to answer is the training sequence's own prompt, id for id.
    assert prompts.tokens[0].tolist() == encoded.tokens[0][: encoded.prompt_lengths[0]].tolist() == t.ids("c\n")


def test_empty_prompt_is_plain_text_with_and_without_chat():
    t = Fake()
    for chat in (False, True):
        encoded = encode([Example("x", "", "dog")], t, chat=chat, max_length=64)
        assert encoded.tokens[0].tolist() == [0, *t.ids("dog"), 1]
        assert encoded.prompt_lengths.tolist() == [1]
    # Without BOS the first token has nothing to be predicted from.
    no_bos = encode([Example("x", "", "dog")], Fake(add_bos=False), chat=False, max_length=64)
    assert no_bos.prompt_lengths.tolist() == [0]
    assert gather_batch(no_bos, np.array([0]), 4, 1, 0).loss_mask.tolist() == [[False, True, True, True]]


def test_chat_renders_text_and_messages():
    t = Fake(add_bos=False)
    turns = (
        {"role": "system", "content": "be kind "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    )
    encoded = encode([Example("x", "hi", "ho"), Example("y", turns, "so")], t, chat=True, max_length=64)
    assert encoded.tokens[0].tolist() == [2, *t.ids("hi"), 3, *t.ids("ho"), 1]
    assert encoded.tokens[1].tolist() == [
        *t.ids("be kind "),
        2,
        *t.ids("hi"),
        3,
        *t.ids("yes"),
        2,
        *t.ids("why"),
        3,
        *t.ids("so"),
        1,
    ]
    plain = encode([Example("y", turns[1:], "so")], t, chat=False, max_length=64)
    assert plain.tokens[0].tolist() == [*t.ids("user: hi\nassistant: yes\nuser: why\n"), *t.ids("so"), 1]


def test_bos_is_not_doubled_when_the_template_writes_it():
    for in_template in (False, True):
        t = Fake(bos_in_template=in_template)
        encoded = encode([Example("x", "hi", "ho")], t, chat=True, max_length=64)
        assert encoded.tokens[0].tolist() == [0, 2, *t.ids("hi"), 3, *t.ids("ho"), 1]


def test_truncation_cuts_the_end_and_is_counted():
    t = Fake()  # BOS + "cc\n" are 4 prompt tokens
    examples = [
        Example("whole", "cc", "d"),
        Example("cut", "cc", "defg"),
        Example("gone", "ccccc", "d"),
        Example("edge", "ccc", "de"),
        Example("lost", "cccc", "de"),
    ]
    encoded = encode(examples, t, chat=False, max_length=6)
    assert encoded.ids == ("whole", "cut", "edge")
    assert (encoded.truncated, encoded.dropped) == (2, 2)
    assert encoded.lengths.tolist() == [6, 6, 6]
    assert encoded.tokens[1].tolist() == [0, *t.ids("cc\nde")]
    # Every example kept predicts something.
    for row in range(len(encoded)):
        assert gather_batch(encoded, np.array([row]), 6, 1, 0).loss_mask.any()


def test_an_example_with_nothing_to_predict_is_dropped():
    t = Fake(add_bos=False, eos_ids=())
    encoded = encode([Example("one", "", "a"), Example("two", "", "ab")], t, chat=False, max_length=8)
    assert (encoded.ids, encoded.truncated, encoded.dropped) == (("two",), 0, 1)


def test_all_responses_truncated_away_is_one_clear_error():
    examples = [Example("a", "ccccc", "d"), Example("b", "cccccccc", "d")]
    with pytest.raises(
        DataError,
        match="domain 'news': no response is left of any of its 2 examples within max_length 6; "
        "the shortest prompt alone has 7 tokens",
    ):
        encode(examples, Fake(), chat=False, max_length=6, name="news")
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens, not 1"):
        encode(examples, Fake(), chat=False, max_length=1)
    empty = encode([], Fake(), chat=False, max_length=6)
    assert len(empty) == 0 and empty.lengths.shape == (0,) and empty.prompt_lengths.shape == (0,)


def test_examples_are_tokenised_a_few_at_a_time(monkeypatch):
    class Small(Fake):
        def encode_batch(self, texts):
            assert len(texts) <= 2
            return super().encode_batch(texts)

    examples = [Example(str(i), "c" * (1 + i), "def") for i in range(5)]
    whole = encode(examples, Fake(), chat=False, max_length=7)
    monkeypatch.setattr(tokenised, "TOGETHER", 2)
    parts = encode(examples, Small(), chat=False, max_length=7)
    assert parts.digest == whole.digest and (parts.ids, parts.cut.tolist(), parts.dropped) == (
        whole.ids,
        whole.cut.tolist(),
        1,
    )
    with pytest.raises(DataError, match="the shortest prompt alone has 3 tokens"):
        encode(examples, Small(), chat=False, max_length=2)


def test_long_prompts_for_generation_keep_bos_and_their_end():
    t = Fake()
    example = Example("x", "abcdefg", "z")
    cut = encode_prompts([example, Example("y", "a", "z")], t, chat=False, max_length=4)
    assert cut.tokens[0].tolist() == [0, *t.ids("fg\n")]
    assert cut.tokens[1].tolist() == [0, *t.ids("a\n")]
    assert (cut.truncated, cut.dropped, cut.prompt_lengths.tolist()) == (1, 0, [4, 3])
    chat = encode_prompts([example], Fake(add_bos=False), chat=True, max_length=3)
    assert chat.tokens[0].tolist() == [*t.ids("fg"), 3]
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        encode_prompts([example], t, chat=False, max_length=0)


def test_character_tokenizer_round_trip(tmp_path):
    examples = [Example("x", "a\tcat", "sat\n"), Example("y", ({"role": "user", "content": "Zo ë"},), "é☃")]
    t = CharacterTokenizer.from_examples(examples)
    for text in ("a cat sat", "user: Zo ë\n", "é☃\t", ""):
        assert t.decode(t.encode(text)) == text
    assert t.decode([1, *t.encode("cat"), 2, 0]) == "cat"
    assert t.decode([1, *t.encode("caX"), 2], skip_special=False) == "<bos>ca<unk><eos>"
    assert t.encode("a", add_special=True) == [t.bos_id, *t.encode("a")]
    assert max(t.encode(t.alphabet)) == t.vocab_size - 1
    t.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "user: a\tcat\nsat Zoë é☃"
    assert backend.encode(text, add_special_tokens=False).ids == t.encode(text)
    assert backend.encode(text).ids == t.encode(text, add_special=True)  # as transformers reads it
    assert backend.decode(t.encode(text)) == text
    encoded = encode(examples, t, chat=False, max_length=64)
    assert [t.decode(ids) for ids in encoded.tokens] == ["a\tcat\nsat\n", "user: Zo ë\né☃"]
    with pytest.raises(DataError, match="has no chat template"):
        encode(examples, t, chat=True, max_length=64)
    with pytest.raises(DataError, match="holds a character twice"):
        CharacterTokenizer("aa")


def test_what_has_no_response_can_be_asked_and_not_trained_on():
    t, given = Fake(), [Example("x", "a cat", "sat"), Example("y", "a dog", "")]
    assert encode_prompts(given, t, chat=False, max_length=64).lengths.tolist() == [7, 7]
    with pytest.raises(DataError, match="domain 'pets': the example 'y' has no response to train on or to score; name"):
        encode(given, t, chat=False, max_length=64, name="pets")


def test_some_of_the_examples():
    t = Fake()
    encoded = encode(
        [Example(i, "ab"[: n % 3], "abc" * n) for n, i in enumerate("uvwxyz", 1)], t, chat=False, max_length=9
    )
    some = encoded.take([2, 0])
    assert some.ids == ("w", "u") and some.cut.tolist() == [encoded.cut[2], encoded.cut[0]]
    assert [x.tolist() for x in some.tokens] == [encoded.tokens[2].tolist(), encoded.tokens[0].tolist()]
    assert some.prompt_lengths.tolist() == encoded.prompt_lengths[[2, 0]].tolist()
    assert encoded.take([]).ids == () and len(encoded.take([])) == 0
