"""The one record that every source of data is mapped to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """What the model reads and what it should write.

    Attributes:
      id: unique within its domain.
      prompt: text, possibly empty (language modelling), or the chat messages before the reply.
      response: what the model should write; "" in an example without labels, which can only be asked and not trained
        on, and in no other.
      choices: the choices of a multiple-choice question, else ().
      answer_index: index of the right choice, from 0.
      answers: accepted short answers, where the response says more than the answer.
      meta: every other column of the source.
    """

    id: str
    prompt: str | tuple[dict[str, str], ...]
    response: str
    choices: tuple[str, ...] = ()
    answer_index: int | None = None
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


def plain_text(prompt: str | tuple[dict[str, str], ...]) -> str:
    """A prompt as text without a chat template: messages become lines `role: content`."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_row(example: Example, *, chat: bool) -> dict[str, Any]:
    """Columns from which `load_examples` reads the example again; with `chat` one conversation, `messages`."""
    row: dict[str, Any] = {**example.meta, "id": example.id}
    if not chat:
        return row | {"prompt": example.prompt, "response": example.response}
    prompt = example.prompt
    turns = ([{"role": "user", "content": prompt}] if prompt else []) if isinstance(prompt, str) else list(prompt)
    return row | {"messages": [*turns, {"role": "assistant", "content": example.response}]}


def any_chat(examples: Iterable[Example]) -> bool:
    """Whether a prompt is a conversation, so that a file of all of them needs the column `messages`."""
    return any(not isinstance(example.prompt, str) for example in examples)
