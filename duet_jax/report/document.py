"""How the pages of the report are made: one HTML file each, which loads nothing and runs nothing."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import jinja2

from duet_jax._files import write
from duet_jax.errors import StudyError
from duet_jax.report import words
from duet_jax.report.drawing import SCALE


def document(template: str, **values: Any) -> str:
    """The text of a page; the same values give the same bytes, and all texts among them are escaped."""
    folder = importlib.resources.files("duet_jax.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": words.number, "duration": words.duration, "to": words.to}
    environment.globals |= {"scale": ", ".join(SCALE)}
    return environment.get_template(template).render(**values)


def save(target: Path, page: str) -> Path:
    """Writes a page, and gives where. Raises StudyError if it cannot be written."""
    try:
        write(target, page)
    except OSError as error:
        raise StudyError(f"The report cannot be written to {target}: {error.strerror}.") from None
    return target
