"""What is decided on examples, some of whose targets are wrong, by a respondent that knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet_jax.config import ClearConfig, ConfidenceConfig
from duet_jax.curation.clear import Settled, settle
from duet_jax.data import Example
from tests.curation.respondents import PREFERENCE, QUESTIONS, ByHeart


def clear_config(**changes: Any) -> ClearConfig:
    confidence = ConfidenceConfig(samples=changes.pop("samples", 2), **QUESTIONS)
    return ClearConfig(
        **{
            "correct": True,
            "threshold": 0.5,
            "preference_template": PREFERENCE,
            "confidence": confidence,
        }
        | changes
    )


RIGHT = {f"x{i}": f"w{i}" for i in range(20)}
# Every fifth target is wrong.
NOISY = [Example(f"e{i}", f"x{i}", "odd" if i % 5 == 0 else f"w{i}") for i in range(20)]


def settled(
    folder: Path,
    respondent: ByHeart,
    proposals: list[list[str]],
    examples: Sequence[Example] = NOISY,
    **changes: Any,
) -> tuple[Settled, list[list[Example]]]:
    """What is decided, and what the proposing models were trained on; each iteration's `proposals` are given."""
    trained: list[list[Example]] = []

    def propose(kept: list[Example]) -> list[str]:
        trained.append(kept)
        return proposals[len(trained) - 1]

    names = ["a"] * len(examples)
    return settle(lambda: respondent, examples, names, clear_config(**changes), folder, propose), trained
