"""The outer search over mixtures. It knows nothing of language models."""

from duet_jax.search.constraints import Constraints, Group
from duet_jax.search.likelihoods import accuracy, mean_rating
from duet_jax.search.observations import BestOf, Comparisons, Observations, Rounded, Scores, Stars
from duet_jax.search.program import Proposal
from duet_jax.search.search import Diagnostics, Search

__all__ = [
    "BestOf",
    "Comparisons",
    "Constraints",
    "Diagnostics",
    "Group",
    "Observations",
    "Proposal",
    "Rounded",
    "Scores",
    "Search",
    "Stars",
    "accuracy",
    "mean_rating",
]
