"""A tokenizer of single characters, for small models trained from scratch on small alphabets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from duet_jax.data.example import Example, plain_text
from duet_jax.errors import DataError

if TYPE_CHECKING:
    import tokenizers

PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class CharacterTokenizer:
    """One id per character of `alphabet`, after four special ids; other characters are unknown.

    Has the methods and fields that encoding needs of any tokenizer; there is no chat template.
    """

    alphabet: str
    bos_id: int = BOS
    eos_ids: tuple[int, ...] = (EOS,)
    pad_id: int = PAD
    add_bos: bool = True
    chat_template: None = None
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = {character: len(SPECIAL) + i for i, character in enumerate(self.alphabet)}
        if len(ids) != len(self.alphabet):
            raise DataError(f"the alphabet '{self.alphabet}' holds a character twice")
        object.__setattr__(self, "_ids", ids)

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> CharacterTokenizer:
        """Takes the alphabet of the examples' texts and the newline that joins the two parts."""
        characters = {"\n"}
        for example in examples:
            characters.update(example.response)
            characters.update(plain_text(example.prompt))
        return cls("".join(sorted(characters)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four special ones included."""
        return len(SPECIAL) + len(self.alphabet)

    @property
    def identity(self) -> str:
        """Hash of all that decides which ids a text becomes, hexadecimal."""
        return hashlib.sha256(json.dumps([self.alphabet, self.bos_id, self.eos_ids, self.add_bos]).encode()).hexdigest()

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of the characters; `add_special` puts BOS in front."""
        ids = self._ids
        encoded = [ids.get(character, UNKNOWN) for character in text]
        return [self.bos_id, *encoded] if add_special else encoded

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, without special ids."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; special ids are left out or written as <pad>, <bos>, <eos>, <unk>."""
        pieces = []
        for i in ids:
            if i >= len(SPECIAL):
                pieces.append(self.alphabet[i - len(SPECIAL)])
            elif not skip_special:
                pieces.append(SPECIAL[i])
        return "".join(pieces)

    @property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each id adds to a text, `[vocab_size]`; special ids add nothing."""
        return (*(b"" for _ in SPECIAL), *(character.encode() for character in self.alphabet))

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """There is no chat template.

        Raises:
          DataError: always.
        """
        raise DataError("a character tokenizer has no chat template; set model.chat to false")

    def backend(self) -> tokenizers.Tokenizer:
        """The same mapping as an object of the `tokenizers` library."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        vocabulary = {token: i for i, token in enumerate((*SPECIAL, *self.alphabet))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIAL))
        # transformers looks for BOS here, and not at `add_bos_token`.
        bos = SPECIAL[self.bos_id]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, self.bos_id)])
        return backend

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which the ecosystem's tools read."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.backend().save(str(target / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[PAD],
            "bos_token": SPECIAL[BOS],
            "eos_token": SPECIAL[EOS],
            "unk_token": SPECIAL[UNKNOWN],
            "add_bos_token": self.add_bos,
        }
        text = json.dumps(settings, indent=2)
        (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
