"""From ratings to feedback: what the search is told, when, and which raters look careless."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from duet_jax.config import PeopleConfig, StudyConfig
from duet_jax.errors import FeedbackError
from duet_jax.search import mean_rating
from duet_jax.serve.panel import estimate
from duet_jax.serve.ratings import Ratings, Vote
from duet_jax.study import Study
from duet_jax.trial import Trial

# Who gives so many ratings, all the same, is shown as careless; and who rates half of so many, whose times are known,
# faster than words can be read.
SAME, TIMED = 8, 4
WORDS_PER_SECOND = 10.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a trial is told by itself: after `count` ratings, or once their mean's standard error is `stderr`."""

    count: int | None = None
    stderr: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From "count=30" or "stderr=0.2".

        Raises:
          FeedbackError: it is neither.
        """
        name, _, number = text.partition("=")
        try:
            if name == "count" and int(number) >= 1:
                return cls(count=int(number))
            if name == "stderr" and 0 < float(number) < math.inf:
                return cls(stderr=float(number))
        except ValueError:
            pass
        raise FeedbackError(f"The rule is {text!r}; it must be count=N, as count=30, or stderr=S, as stderr=0.2.")

    def met(self, given: Sequence[int], stars: int) -> bool:
        """Whether these ratings of a trial are enough."""
        if not given:
            return False
        if self.count is not None:
            return len(given) >= self.count
        return self.stderr is not None and mean_rating(given, stars)[1] <= self.stderr


@dataclasses.dataclass(frozen=True)
class Rater:
    """What is known of a rater: how many ratings, how many of them faster than reading of those with times, and what
    looks careless, in words; "" for nothing."""

    name: str
    count: int
    timed: int
    fast: int
    mean: float
    doubt: str


def people_of(config: StudyConfig) -> PeopleConfig:
    """How people rate.

    Raises:
      FeedbackError: they do not.
    """
    if config.task.people is None:
        raise FeedbackError(
            f"The study {config.name} has a task of kind '{config.task.kind}', which people do not rate; "
            f"start one with: duet run CONFIG --feedback people"
        )
    return config.task.people


def raters(votes: Sequence[Vote]) -> list[Rater]:
    """The known raters of some votes, those with the most first."""
    by_name: dict[str, list[Vote]] = collections.defaultdict(list)
    for vote in votes:
        if vote.rater is not None:
            by_name[vote.rater].append(vote)
    found = []
    for name, own in by_name.items():
        times = [(vote.seconds, vote.words) for vote in own if vote.seconds is not None and vote.words is not None]
        fast = sum(seconds < words / WORDS_PER_SECOND for seconds, words in times)
        doubts = []
        if len(own) >= SAME and len({vote.stars for vote in own}) == 1:
            doubts.append("always the same")
        if len(times) >= TIMED and 2 * fast >= len(times):
            doubts.append("faster than reading")
        mean = sum(vote.stars for vote in own) / len(own)
        found.append(Rater(name, len(own), len(times), fast, mean, " and ".join(doubts)))
    return sorted(found, key=lambda rater: (-rater.count, rater.name))


def rated(study: Study, number: int) -> Trial:
    """The trial of this number, if it may be rated now.

    Raises:
      FeedbackError: it is not there, not trained yet, or closed.
    """
    trials = study.trials()
    if not 0 <= number < len(trials):
        raise FeedbackError(f"There is no trial {number} in {study.folder}; it has {len(trials)}.")
    trial = trials[number]
    if trial.status != "pending":
        raise FeedbackError(f"Trial {number} is {trial.status} and takes no more ratings.")
    if trial.stage == "proposed":
        raise FeedbackError(f"Trial {number} is not trained yet and cannot be rated.")
    return trial


def tell(study: Study, ratings: Ratings, number: int) -> Trial:
    """Tells a trial what its ratings say, as the study's configuration wants them heard.

    Raises:
      FeedbackError: people do not rate this study, or the trial has no ratings or takes no feedback.
    """
    people = people_of(study.config)
    # A vote is heard, or refused because the trial is told: none comes in between.
    with ratings.holding():
        votes = ratings.votes()
        given = [vote.stars for vote in votes if vote.trial == number]
        if not given:
            raise FeedbackError(f"Trial {number} has no ratings that count; it needs at least one.")
        counts = np.bincount(given, minlength=people.stars + 1)[1:].tolist()
        if people.heard == "mean":
            panel = estimate(votes, people.stars)
            value, stderr = panel.of(number)[0], panel.own_error(number, len(given))
        else:
            value, stderr = mean_rating(given, people.stars)
        known = {vote.rater for vote in votes if vote.trial == number and vote.rater is not None}
        return study.tell(number, value, stderr, details={"raters": float(len(known))}, ratings=counts)
