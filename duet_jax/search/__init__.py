"""The outer search over mixtures. It knows nothing of language models."""

from duet_jax.search.search import Diagnostics, Search
from duet_jax.search.surrogate import Observations

__all__ = ["Diagnostics", "Observations", "Search"]
