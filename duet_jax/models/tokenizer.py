"""Text to token ids and back, and chat templates, from the files a model comes with.

The splitting itself is the `tokenizers` library's; here are the ids that matter to training and generation (BOS,
every id that ends a reply, padding) and the rendering of chat messages.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer as Backend

from duet_jax.errors import ModelError

# Some templates print today's date into the system message. A study resumed the next day must train on the same
# tokens, so the date stands still at the one that the Llama 3 templates fall back on.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def _byte_of() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: those that can be printed stand for themselves, the
    others for the characters from 256 on, in order (Radford et al. 2019, section 2.2)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids and the chat template of its model.

    Attributes:
      backend: the compiled tokenizer.
      bos_id: id that begins a text, if there is one.
      eos_ids: every id that ends a reply; the first is the one to append to training responses.
      pad_id: id for padding; never looked at, so it may be an EOS id.
      chat_template: Jinja source, None for models without one.
      add_bos: whether the model expects `bos_id` before plain text.
    """

    backend: Backend
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None = None
    add_bos: bool = False

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def identity(self) -> str:
        """Hash of all that decides which ids texts and conversations become, hexadecimal."""
        whole = [self.backend.to_str(), self.bos_id, self.eos_ids, self.chat_template, self.add_bos]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text; with `add_special`, after BOS where the model expects it.

        Special tokens spelled out in the text become their ids, as rendered chats need.
        """
        return self._with_bos(self.backend.encode(text, add_special_tokens=False).ids, add_special)

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_bos(encoding.ids, add_special) for encoding in encodings]

    def _with_bos(self, ids: list[int], add_special: bool) -> list[int]:
        if add_special and self.add_bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids, by default without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each id adds to a text that goes on, `[vocab_size]`; special tokens add nothing.

        Joined, they are the text of a continuation as it is. `decode` is not: of SentencePiece's tokens it drops a
        space at the beginning, which a reply to a prompt may well begin with.
        """
        content = json.loads(self.backend.to_str())
        added = {token["id"]: token for token in content["added_tokens"]}
        decoder = content["decoder"] or {}
        parts = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        spelled = {i: word for word, i in self.backend.get_vocab(with_added_tokens=True).items()}
        found = []
        for i in range(self.vocab_size):
            if i in added or i not in spelled:
                plain = i in added and not added[i]["special"]
                found.append(added[i]["content"].encode() if plain else b"")
            elif "ByteLevel" in parts:
                found.append(bytes(_BYTE_OF[character] for character in spelled[i]))
            elif parts & {"ByteFallback", "Metaspace"}:
                byte = re.fullmatch(r"<0x([0-9A-F]{2})>", spelled[i])
                found.append(bytes.fromhex(byte[1]) if byte else spelled[i].replace("\u2581", " ").encode())
            else:
                found.append(self.decode([i]).encode())
        return tuple(found)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """A conversation as the text the model was trained on.

        Args:
          messages: mappings with `role` and `content`.
          add_generation_prompt: whether to end with the header of the assistant's next message.

        Returns:
          The text. It holds its own BOS if the template writes one: encode it without `add_special`.

        Raises:
          ModelError: there is no template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ModelError("This model has no chat template; use plain prompts (chat: false) or a model with one.")
        try:
            return _compile(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                bos_token=self._spelling(self.bos_id),
                eos_token=self._spelling(self.eos_ids[0] if self.eos_ids else None),
                pad_token=self._spelling(self.pad_id),
            )
        # A template is a program of strangers: besides its own refusals, any arithmetic or look-up can fail.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"The chat template cannot render these messages: {error}") from error

    def _spelling(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        eos_id = self.eos_ids[0] if self.eos_ids else None
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._spelling(self.bos_id) or None,
            "eos_token": self._spelling(eos_id) or None,
            "pad_token": self._spelling(self.pad_id) or None,
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        _write_json(folder / "tokenizer_config.json", config)
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
        }
        _write_json(folder / "generation_config.json", ids)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Special tokens come from `tokenizer_config.json`, then `special_tokens_map.json`, then the ids in
    `generation_config.json` and `config.json`; every EOS id that any of them names counts as an end.

    Raises:
      ModelError: `tokenizer.json` is missing or unreadable.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; save the model's tokenizer there in the fast format.")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is not a readable tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = {
        **read_json(folder / "special_tokens_map.json"),
        **{k: v for k, v in read_json(folder / "tokenizer_config.json").items() if v is not None},
    }
    sources = [read_json(folder / name) for name in ("generation_config.json", "config.json")]

    def ids(role: str) -> tuple[int, ...]:
        named = _token_id(backend, config.get(f"{role}_token"))
        listed = [i for source in sources for i in _as_tuple(source.get(f"{role}_token_id"))]
        return tuple(dict.fromkeys(([] if named is None else [named]) + listed))

    bos_id = next(iter(ids("bos")), None)
    eos_ids = ids("eos")
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=next(iter((*ids("pad"), *eos_ids, 0))),
        chat_template=_chat_template(folder, config),
        add_bos=bool(add_bos) and bos_id is not None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_id(backend: Backend, token: Any) -> int | None:
    """Id of a token given as text or as the dictionary of an added token."""
    if isinstance(token, dict):
        token = token.get("content")
    return backend.token_to_id(token) if isinstance(token, str) else None


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for tools that mask losses; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model has seen.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    # Templates come from strangers: the sandbox keeps them from everything but the values passed in.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment.from_string(template)
