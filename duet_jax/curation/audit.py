"""The record of what was decided about each example: rows for programs, and a page for people.

The page is one file that needs nothing else. Whatever data may hold, it stays text: the rows are JSON in a block that
is not run, the script of the page puts them in as text nodes, and the page allows no script but that one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import pyarrow
import pyarrow.parquet
from markupsafe import Markup

from duet_jax.curation.decisions import Action
from duet_jax.data import Example
from duet_jax.data.example import plain_text

if TYPE_CHECKING:
    from duet_jax.curation.clear import Settled

PARTS = ("similarity", "match", "reflection", "likelihood")
_VERDICTS = [f"{place}_{what}" for place in ("first", "second") for what in ("proposal", "target", "tie")]
_TEXT, _NUMBER, _YES = pyarrow.string(), pyarrow.float64(), pyarrow.bool_()
_ROUND = {"proposal": _TEXT, **dict.fromkeys(_VERDICTS, _NUMBER), "better": _YES, "acceptance": _NUMBER}
# Columns of a row and their types. `samples`, `similarities` and `matches` are of the sampled answers; `options` is of
# each question of self-reflection: correct, incorrect and not sure; `first_` and `second_` are the judge's, with the
# proposal as answer A and as answer B; `_ROUND` is of the iteration that decided, and `rounds` of all of them.
SCHEMA = pyarrow.schema(
    {
        **dict.fromkeys(("id", "domain", "action", "prompt", "target", "response"), _TEXT),
        **dict.fromkeys(("confidence", "threshold"), _NUMBER),
        "beaten": _YES,
        **dict.fromkeys((*PARTS, "log_prob", "tokens"), _NUMBER),
        "samples": pyarrow.list_(_TEXT),
        **dict.fromkeys(("similarities", "matches"), pyarrow.list_(_NUMBER)),
        "options": pyarrow.list_(pyarrow.list_(_NUMBER)),
        **_ROUND,
        "eta": _NUMBER,
        "rounds": pyarrow.list_(pyarrow.struct(_ROUND)),
    }
)
# What the page sorts by.
NUMBERS = [field.name for field in SCHEMA if field.type == _NUMBER]


def rows(examples: Sequence[Example], names: Sequence[str], found: Settled) -> list[dict[str, Any]]:
    """One row an example, with the columns of `SCHEMA`; a number that is missing is None.

    Args:
      examples: n of them.
      names: of their domains.
      found: what was decided.
    """
    sure = found.confidence
    rounds = [
        [
            {
                "proposal": decision.proposal,
                **dict(zip(_VERDICTS, (*verdicts.first[row], *verdicts.second[row]), strict=True)),
                "better": decision.better,
                "acceptance": decision.acceptance,
            }
            for decisions, verdicts in found.rounds
            for decision in (decisions[row],)
        ]
        for row in range(len(examples))
    ]
    listed = []
    for row, (example, name, decision) in enumerate(zip(examples, names, found.decisions, strict=True)):
        responses = {Action.KEEP: example.response, Action.CORRECT: decision.proposal, Action.DROP: None}
        listed.append(
            {
                "id": example.id,
                "domain": name,
                "action": str(decision.action),
                "prompt": plain_text(example.prompt),
                "target": example.response,
                "response": responses[decision.action],
                "confidence": decision.confidence,
                "threshold": decision.threshold,
                "beaten": decision.beaten,
                **{part: getattr(sure, part)[row] for part in (*PARTS, "log_prob", "tokens")},
                "samples": list(sure.samples[row]),
                **{part: getattr(sure, part)[row].tolist() for part in ("similarities", "matches", "options")},
                **(rounds[row][found.deciding[row]] if rounds[row] else dict.fromkeys(_ROUND)),
                "eta": decision.eta if rounds[row] else None,
                "rounds": rounds[row],
            }
        )
    return [_plain(row) for row in listed]


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """How many examples of each domain each action is taken on."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(row["domain"], Counter())[row["action"]] += 1
    return found


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as a Parquet file."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), SCHEMA), content)
    return content.getvalue()


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an HTML page that filters and sorts them."""
    here = importlib.resources.files("duet_jax.curation")
    script = here.joinpath("audit.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The filter `tojson` writes <, >, & and ' as escapes, and so does JSON with what is not ASCII.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template = environment.from_string(here.joinpath("audit.html").read_text(encoding="utf-8"))
    return template.render(
        counts=counts(rows),
        actions=[str(action) for action in Action],
        numbers=NUMBERS,
        data={"columns": SCHEMA.names, "rows": [[row[name] for name in SCHEMA.names] for row in rows]},
        script=Markup(script),  # ours
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _plain(value: Any) -> Any:
    """Values of JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
