"""Which examples of each domain a round trains on: utilities, and rules that sample by them."""

from duet_jax.selection.sampling import Rule, plan, pool_size, sample
from duet_jax.selection.utilities import load_utilities

__all__ = ["Rule", "load_utilities", "plan", "pool_size", "sample"]
