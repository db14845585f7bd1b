"""A page of the report as a browser takes it apart."""

from __future__ import annotations

import html.parser


class Seen(html.parser.HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def check_that_nothing_is_loaded_or_run(page: Seen) -> None:
    """No element or attribute that asks for anything else, or runs anything."""
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "image"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "style", "clip-path"):
                assert value is not None and "//" not in value, (tag, name, value)
