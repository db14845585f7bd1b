"""Labels, guidance and replies from a file: ids once and for all, and mistakes named with prompt and file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from duet_jax.data import Encoded, Example, encode, encode_prompts
from duet_jax.data.characters import BOS, EOS, PAD, CharacterTokenizer
from duet_jax.errors import ConfigError, DataError
from duet_jax.influence.estimator import Estimator, weights
from duet_jax.influence.given import external_samples, guided, labelled
from duet_jax.influence.policy_gradient import replies
from duet_jax.models.tokenizer import Tokenizer

TOKENIZER = CharacterTokenizer("\nabcdefgh")
EXAMPLES = [Example("1", "ab", "cdefg"), Example("2", "h", "gh")]
PROMPTS = encode_prompts(EXAMPLES, TOKENIZER, chat=False, max_length=8)
RESPONSES = [example.response for example in EXAMPLES]


def test_labels_follow_their_prompts_as_in_training() -> None:
    found = labelled(PROMPTS, RESPONSES, TOKENIZER)
    wanted = encode(EXAMPLES, TOKENIZER, chat=False, max_length=20)
    assert found.digest == wanted.digest and found.ids == PROMPTS.ids
    with pytest.raises(DataError, match="the prompt '2' has no label; give it a response"):
        labelled(PROMPTS, ["ab", ""], TOKENIZER)


def test_guidance_is_prompt_and_half_the_label() -> None:
    found = guided(PROMPTS, RESPONSES, TOKENIZER, 8)
    assert found.beginnings == ("cd", "g")
    assert [TOKENIZER.decode(row) for row in found.prompts.tokens] == ["ab\ncd", "h\ng"]
    np.testing.assert_array_equal(found.prompts.prompt_lengths, found.prompts.lengths)
    np.testing.assert_array_equal(found.prompts.cut, [False, False])
    short = guided(PROMPTS, RESPONSES, TOKENIZER, 4)
    assert [row.tolist()[:1] for row in short.prompts.tokens] == [[BOS]] * 2
    assert [TOKENIZER.decode(row) for row in short.prompts.tokens] == ["\ncd", "h\ng"]
    np.testing.assert_array_equal(short.prompts.cut, [True, False])
    with pytest.raises(DataError, match="half of the label of '1' has 2 tokens"):
        guided(PROMPTS, RESPONSES, TOKENIZER, 2)
    with pytest.raises(DataError, match="'1' has no label"):
        guided(PROMPTS, ["", "x"], TOKENIZER, 8)


@given(st.text(alphabet="aé😀", min_size=1, max_size=9))
def test_guidance_ends_with_a_whole_character(label: str) -> None:
    """Ids are bytes; the beginning and what a model writes after it are one text."""
    found = guided(Encoded((np.array([65], np.int32),), np.array([1]), ("x",)), [label], BYTES, 60)
    half = len(found.prompts.tokens[0]) - 1
    assert label.startswith(found.beginnings[0])
    assert len(label.encode()) // 2 - 4 < half <= len(label.encode()) // 2
    assert found.beginnings[0] + BYTES.decode(BYTES.encode(label)[half:]) == label


def bytes_tokenizer() -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, bos_id=None, eos_ids=(), pad_id=0)


BYTES = bytes_tokenizer()


def file_of(folder: Path, rows: list) -> Path:
    path = folder / "replies.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_replies_from_a_file_are_samples_of_unknown_origin(tmp_path: Path) -> None:
    rows = [
        {"id": "2", "replies": ["", "abcdefgh"], "model": "another"},
        {"id": "other", "replies": ["a"]},
        {"id": "1", "replies": ["cde", "cdef"]},
    ]
    found = external_samples(file_of(tmp_path, rows), PROMPTS, TOKENIZER, 4)
    assert found.ids.dtype == found.lengths.dtype == np.int32 and found.log_probs.dtype == np.float32
    assert found.texts == (("cde", "cdef"), ("", "abcd"))
    letters = {letter: TOKENIZER.encode(letter)[0] for letter in "abcdef"}
    c, d, e, f = (letters[x] for x in "cdef")
    wanted = [[c, d, e, EOS], [c, d, e, f], [EOS, PAD, PAD, PAD], [letters["a"], letters["b"], c, d]]
    np.testing.assert_array_equal(found.ids.reshape(4, 4), wanted)
    np.testing.assert_array_equal(found.lengths, [[4, 4], [1, 4]])
    np.testing.assert_array_equal(found.ended, [[True, False], [True, False]])
    np.testing.assert_array_equal(np.isnan(found.sampled_log_probs), np.arange(4) < found.lengths[..., None])
    assert TOKENIZER.decode(replies(PROMPTS, found).tokens[0]) == "ab\ncde"
    sums = {"log_probs": found.log_probs.sum(axis=2), "sampled_log_probs": found.sampled_log_probs.sum(axis=2)}
    with pytest.raises(ConfigError, match="replies from elsewhere have no importance weights"):
        weights(Estimator(), np.eye(2), **sums)
    np.testing.assert_array_equal(weights(Estimator(importance_cap=None), np.eye(2), **sums).values[0], [0.5, -0.5])


GOOD = {"id": "1", "replies": ["a", "b"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD], r"replies.jsonl has no replies to the prompt '2'; add a row"),
        ([GOOD, {"id": "2", "replies": ["a"]}], r"has 1 replies to the prompt '2' and 2 to '1'"),
        ([GOOD, GOOD], r"line 2: the prompt '1' has replies already"),
        ([GOOD, {"id": "2", "replies": []}], r"line 2: the replies to '2' must be one or more texts"),
        ([GOOD, {"id": "2", "replies": ["a", 3]}], r"the replies to '2' must be one or more texts"),
        ([GOOD, {"id": "2", "texts": ["a"]}], r"line 2: a row of replies must be"),
        ([GOOD, {"replies": ["a"]}], r"line 2: a row of replies must be"),
        (["{"], r"replies.jsonl, line 1"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        external_samples(file_of(tmp_path, rows), PROMPTS, TOKENIZER, 4)


def test_a_missing_file_and_a_reply_without_any_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file of replies .*nothing.jsonl"):
        external_samples(tmp_path / "nothing.jsonl", PROMPTS, TOKENIZER, 4)
    rows = [{"id": "x", "replies": [""]}]
    prompts = Encoded((np.array([1], np.int32),), np.array([1], np.int32), ("x",))
    with pytest.raises(DataError, match="a reply to 'x' is empty, and the model has no EOS"):
        external_samples(file_of(tmp_path, rows), prompts, BYTES, 4)
