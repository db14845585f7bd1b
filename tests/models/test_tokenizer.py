"""Tokenizers of folders: which file names which special token, BOS, and chat templates that misbehave."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors

from duet_jax.errors import ModelError
from duet_jax.models.tokenizer import Tokenizer, read_tokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<|end|>")
WORDS = ("hello", "you", ",")


def backend() -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS, "<unk>"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    made.add_special_tokens(list(SPECIAL))
    return made


def folder(path, **files):
    path.mkdir(exist_ok=True)
    backend().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_special_tokens_come_from_every_file(tmp_path):
    found = read_tokenizer(
        folder(
            tmp_path,
            special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
            tokenizer_config={"eos_token": {"content": "<|end|>"}, "bos_token": None, "add_bos_token": True},
            generation_config={"eos_token_id": [3, 2], "pad_token_id": 0},
        )
    )
    assert (found.bos_id, found.eos_ids, found.pad_id, found.add_bos) == (1, (3, 2), 0, True)


def test_without_padding_an_end_pads(tmp_path):
    found = read_tokenizer(folder(tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert (found.bos_id, found.eos_ids, found.pad_id, found.add_bos) == (None, (2,), 2, False)


def test_bos_follows_what_the_tokenizer_does_where_no_flag_is(tmp_path):
    path = folder(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert not read_tokenizer(path).add_bos
    made = backend()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(path / "tokenizer.json"))
    found = read_tokenizer(path)
    assert found.add_bos
    assert found.encode("hello", add_special=True) == [1, 4]
    assert found.encode_batch(["hello", "you"], add_special=True) == [[1, 4], [1, 5]]
    assert found.encode("hello") == [4]


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    path, made = folder(tmp_path), backend()
    made.enable_truncation(1)
    made.enable_padding(length=9)
    made.save(str(path / "tokenizer.json"))
    assert read_tokenizer(path).encode("hello , you") == [4, 6, 5]


def test_what_is_saved_is_read_back(tmp_path):
    one = Tokenizer(backend(), 1, (3, 2), 0, "{{ messages[0].content }}", True)
    one.save(tmp_path / "t")
    two = read_tokenizer(tmp_path / "t")
    for field in dataclasses.fields(one):
        if field.name != "backend":
            assert getattr(two, field.name) == getattr(one, field.name), field.name
    assert two.backend.to_str() == one.backend.to_str()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "is not a readable tokenizer"),
        (lambda path: (path / "tokenizer_config.json").write_text("[1]"), "must hold a JSON object, not a list"),
    ],
)
def test_unreadable_files(tmp_path, change, sentence):
    change(folder(tmp_path))
    with pytest.raises(ModelError, match=sentence):
        read_tokenizer(tmp_path)


def test_templates_are_found_where_they_may_lie(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "list"}]
    path = folder(tmp_path, tokenizer_config={"chat_template": named})
    assert read_tokenizer(path).chat_template == "list"
    (path / "chat_template.jinja").write_text("file")
    assert read_tokenizer(path).chat_template == "file"


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(backend(), 1, (2,), 0, template)


MESSAGES = [{"role": "user", "content": "a<b & é"}]


def test_templates_see_messages_and_special_tokens():
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {%- generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{%- endfor %}{{ eos_token }}{% if add_generation_prompt %}:{% endif %}{{ strftime_now('%Y') }}"
    )
    rendered = with_template(template).render_chat(MESSAGES, True)
    assert rendered == '<s>"a<b & é"</s>:2024'
    assert with_template(template).render_chat(MESSAGES) == '<s>"a<b & é"</s>2024'


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{% if %}", "cannot render"),
        ("{{ messages[3].role }}", "cannot render"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% set _ = messages.append(1) %}", "is not safely callable|unsafe"),
    ],
)
def test_templates_that_fail_are_one_kind_of_error(template, sentence):
    with pytest.raises(ModelError, match=sentence):
        with_template(template).render_chat(MESSAGES)
