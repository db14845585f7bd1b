"""How far a model's confidence in its answers can be trusted, as one HTML page that needs nothing else."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from duet_jax.report import figures


def page(told: Mapping[str, Any]) -> str:
    """The page's text; the same numbers give the same bytes.

    Args:
      told: of `curation.answers.measured`, and `metric`, the name of the score.
    """
    template = importlib.resources.files("duet_jax.report").joinpath("abstention.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        told=told,
        # Our own drawings, of numbers alone.
        reliability=Markup(figures.reliability(told["bins"])),
        selective=Markup(figures.selective(told["curve"], told["threshold"])),
    )
