"""The page of an audit: texts stay texts whatever they hold, and it needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet

from duet_jax.curation import audit
from duet_jax.data import Example
from tests.curation.respondents import ByHeart
from tests.curation.settling import RIGHT, settled

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"'><svg onload='alert(1)'>&lt;b&gt; &amp;",
    "line\u2028separator\u2029and\u0085 \u202eright to left\u202c \x00\x1f",
    "{{ 7 * 7 }} {% raw %}",
    "\\u003c ${alert(1)} `",
]


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and what stands in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def test_the_page_holds_hostile_texts_as_texts(tmp_path: Path) -> None:
    right = {text: f"right {i}" for i, text in enumerate(HOSTILE)}
    examples = [Example(text, text, text) for text in HOSTILE]

    class Calm(ByHeart):
        def takes(self, text: str, rng: np.random.Generator) -> tuple[str, float]:
            return "A", 1.0

    found, _ = settled(tmp_path, Calm(right), [HOSTILE[::-1]], examples, threshold=0.0, acceptance="probability")
    rows = audit.rows(examples, HOSTILE, found)
    page = audit.page(rows)
    parsed = Tags()
    parsed.feed(page)
    assert len(parsed.scripts) == 3 and {tag for tag, _ in parsed.tags} & {"img", "svg"} == set()
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    # Nothing but the two blocks of JSON and our own script, which the page allows by its hash.
    read = json.loads(parsed.scripts[0])
    assert [dict(zip(read["columns"], row, strict=True)) for row in read["rows"]] == rows
    assert json.loads(parsed.scripts[1])["domains"] == HOSTILE
    (policy,) = [a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[2].encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    # In the blocks no character that could end one, or a line of a script.
    for block in re.findall(r'type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        assert not re.search("[<>&\u2028\u2029]", block)
    # Nothing is fetched, and texts enter the page as nodes of text.
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=", page.split("<main>")[0])
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import", parsed.scripts[2]
    )


def test_numbers_that_are_missing_are_null_everywhere(tmp_path: Path) -> None:
    examples = [Example("e", "x0", "w0"), Example("f", "x1", "w1")]
    found, _ = settled(tmp_path, ByHeart(RIGHT), [], examples, samples=0, correct=False)
    rows = audit.rows(examples, ["a", "b"], found)
    assert rows[0]["similarity"] is None and rows[0]["samples"] == [] and rows[0]["rounds"] == []
    assert pyarrow.parquet.read_table(io.BytesIO(audit.parquet(rows))).to_pylist() == rows
    assert "NaN" not in audit.page(rows).split('id="data"')[1].split("</script>")[0]
