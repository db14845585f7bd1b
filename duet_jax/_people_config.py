"""The part of a task's configuration that is about people who talk to the model and rate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duet_jax._checks import at_least, require

MOST_STARS = 10


@dataclass(frozen=True, kw_only=True)
class PeopleConfig:
    """Testers chat with a trial's model on the page of `duet serve` and rate it.

    Attributes:
      stars: the best rating, the worst is 1; 2 are thumbs down and up.
      per: what is rated, each answer or the whole conversation.
      heard: how the search hears ratings: "ordinal", as counts of each number of stars, whose distances and noise it
        learns; "mean", as a number of stars with its standard error, both less what is peculiar to single raters.
      open: trials that are rated at the same time; each conversation is with one of them, drawn at random.
      instructions: what testers are asked to do, shown above the chat.
    """

    stars: int = 5
    per: Literal["answer", "conversation"] = "answer"
    heard: Literal["ordinal", "mean"] = "ordinal"
    open: int = 1
    instructions: str = ""

    def __post_init__(self) -> None:
        require(2 <= self.stars <= MOST_STARS, "stars", self.stars, f"from 2 to {MOST_STARS}")
        at_least(1, self, "open")
