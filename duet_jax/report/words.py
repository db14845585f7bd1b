"""Numbers in words: what a study has found, how sure that is, and what a task's scores are."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from duet_jax.config import TaskConfig

# Half of the central 95 % of a normal distribution, in standard deviations.
WIDE = statistics.NormalDist().inv_cdf(0.975)
_SCORES = {
    "response_loss": "minus the mean loss of the task's responses, in nats per token",
    "perplexity": "minus the perplexity of the task's responses",
    "multiple_choice": "the share of questions answered rightly",
    "exact_match": "the share of answers that are exactly right",
    "token_f1": "the mean overlap of answers with the right ones (F1 of words, from 0 to 1)",
    "reward": "the mean reward of the model's answers",
    "harness": "a metric of a benchmark",
    "sum": "a weighted sum of several tasks",
    "python": "what a function of yours made of the trained model",
    "command": "what a program of yours made of the trained model",
    "external": "what was told from outside (duet tell)",
}
# What an example's utility is, by the kind of selector.
UTILITIES = {
    "random": "no utility: all are equal",
    "utilities": "a number from a file",
    "influence": "how much it lowers the targets' loss (influence functions)",
    "less": "how much its training step points along the targets' gradients (LESS)",
    "nice": "how much its training step raises the expected reward of the model's answers (NICE)",
    "davir": "the share of its loss that training on the pool takes away (DavIR)",
    "rho": "the loss on it that a model trained on the targets does not have (RHO-loss)",
    "loss_band": "whether its loss is a middling one",
    "el2n": "the norm of the model's error on it (EL2N)",
    "length": "the length of its response",
    "length_matched": "how well its length matches another selection's",
    "near_duplicates": "whether no other example is almost equal to it",
    "log_det": "how early a greedy search for variety takes it (log-determinant)",
    "facility_location": "how early a greedy search for those that stand for all others takes it",
    "k_center": "how early a greedy search for those far from each other takes it",
    "clear": "the base model's confidence in its response (CLEAR)",
}
RULES = {
    "weighted": "drawn at random, the more often the higher the utility",
    "top_k": "those of the highest utility",
    "remove_lowest": "drawn at random from all but those of the lowest utility",
}


def score(task: TaskConfig) -> str:
    """What a score of the task is, as the end of a sentence."""
    if task.people is not None:
        return f"how people rated the model's answers, from 1 to {task.people.stars} stars"
    return _SCORES[task.kind]


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def to(value: float, stderr: float) -> str:
    """A number with as many digits as its standard error leaves of it: two of the error's own."""
    places = 4 if stderr <= 0 else min(max(1 - math.floor(math.log10(stderr)), 0), 9)
    return f"{value:.{places}f}"


def interval(mean: float, stderr: float) -> str:
    """The central 95 % of a normal distribution."""
    return f"{to(mean - WIDE * stderr, stderr)} to {to(mean + WIDE * stderr, stderr)}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for name, size, below, rest in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            left = whole % size // rest
            return f"{whole // size} {name}" + (f" {left} {below}" if left else "")
    raise AssertionError("A minute is the smallest of these units.")


def percent(share: float) -> str:
    """A share as whole per cent, which no line ends within."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def verdict(gain: tuple[float, float]) -> str:
    """Whether a mixture is better than equal shares, from the posterior mean and standard deviation of its gain."""
    mean, stderr = gain
    if stderr <= 0:
        return "Equal shares of all domains are the best that was tried."
    better = 1.0 - statistics.NormalDist(mean, stderr).cdf(0.0)
    if better > 0.975:
        return (
            f"It is better than equal shares of all domains: all of the gain's {percent(0.95)} interval is above zero."
        )
    return (
        f"It is not shown to be better than equal shares of all domains: that it is, has a chance of "
        f"{percent(better)}. More rounds would tell."
    )


def direction(shares: np.ndarray, mean: np.ndarray, stderr: np.ndarray) -> str:
    """What more of a domain does to the score, from its main effect.

    Args:
      shares: `[g]`, ascending.
      mean, stderr: `[g]`, posterior of the average score at each.
    """
    top, bottom = int(np.argmax(mean)), int(np.argmin(mean))
    if mean[top] - mean[bottom] <= WIDE * math.hypot(stderr[top], stderr[bottom]):
        return "no clear effect"
    if top == len(shares) - 1:
        return "more is better"
    return "less is better" if top == 0 else f"best near {percent(shares[top])}"
