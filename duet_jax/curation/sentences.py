"""Texts cut into sentences: what claims and contradictions are looked for in."""

from __future__ import annotations

import re

_END = re.compile(r"(?<=[.!?])[\"')\]\u2019\u201d]*\s+|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of a text: each ends with a stop before white space, or with its line; no abbreviation is known."""
    ends = [0, *(found.end() for found in _END.finditer(text)), len(text)]
    parts = [text[start:end].strip() for start, end in zip(ends, ends[1:], strict=False)]
    return [part for part in parts if part]
