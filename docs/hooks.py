"""Formulas of the pages as MathML, which browsers draw by themselves: no script is loaded from anywhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As `pymdownx.arithmatex` leaves them.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **about: Any) -> str:
    """Replaces formulas in the HTML of a page."""
    del about
    content = _BLOCK.sub(lambda found: f'<div class="formula">{_drawn(found, "block")}</div>', content)
    return _INLINE.sub(lambda found: _drawn(found, "inline"), content)


def _drawn(found: re.Match[str], display: str) -> str:
    return convert(html.unescape(found[1]).strip(), display=display)
