"""How far a model's confidence in its answers can be trusted, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from duet_jax.report import figures
from duet_jax.report.document import document


def page(told: Mapping[str, Any]) -> str:
    """The page's text; the same numbers give the same bytes.

    Args:
      told: of `curation.answers.measured`, and `metric`, the name of the score.
    """
    return document(
        "abstention.html",
        told=told,
        # Our own drawings, of numbers alone.
        reliability=Markup(figures.reliability(told["bins"])),
        selective=Markup(figures.selective(told["curve"], told["threshold"])),
    )
