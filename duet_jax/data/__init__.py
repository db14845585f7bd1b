"""Domains of prompt/response examples, tokenised and batched."""

from duet_jax.data.batches import Batch, gather_batch, plan_batches, plan_forward
from duet_jax.data.domains import Domain, load_domains, load_examples
from duet_jax.data.example import Example
from duet_jax.data.tokenised import Encoded, encode, encode_prompts, join

__all__ = [
    "Batch",
    "Domain",
    "Encoded",
    "Example",
    "encode",
    "encode_prompts",
    "gather_batch",
    "join",
    "load_domains",
    "load_examples",
    "plan_batches",
    "plan_forward",
]
