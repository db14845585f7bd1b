"""The outer search over mixtures. It knows nothing of language models."""

from duet_jax.search.search import Diagnostics, Search

__all__ = ["Diagnostics", "Search"]
