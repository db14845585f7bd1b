"""The outer search over mixtures. It knows nothing of language models."""

from duet_jax.search.constraints import Constraints, Group
from duet_jax.search.likelihoods import accuracy, mean_rating
from duet_jax.search.observations import BestOf, Comparisons, Observations, Rounded, Scores, Stars
from duet_jax.search.program import Proposal
from duet_jax.search.search import Best, Diagnostics, Search
from duet_jax.search.space import Choice, Fidelity, Number, Space, Subset

__all__ = [
    "Best",
    "BestOf",
    "Choice",
    "Comparisons",
    "Constraints",
    "Diagnostics",
    "Fidelity",
    "Group",
    "Number",
    "Observations",
    "Proposal",
    "Rounded",
    "Scores",
    "Search",
    "Space",
    "Stars",
    "Subset",
    "accuracy",
    "mean_rating",
]
