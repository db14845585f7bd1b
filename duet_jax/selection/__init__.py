"""Which examples of each domain a round trains on: utilities, and rules that sample by them."""

from duet_jax.selection.pool import Asked, Pool
from duet_jax.selection.sampling import Rule, choose, floor_share, plan, pool_size, sample
from duet_jax.selection.scoring import Scores, score, score_with_details
from duet_jax.selection.utilities import load_utilities

__all__ = [
    "Asked",
    "Pool",
    "Rule",
    "Scores",
    "choose",
    "floor_share",
    "load_utilities",
    "plan",
    "pool_size",
    "sample",
    "score",
    "score_with_details",
]
