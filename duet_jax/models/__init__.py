"""One decoder for the Llama family, its adapters, and the files that models come in."""

from duet_jax.models.llama import LlamaConfig
from duet_jax.models.load import Model, fingerprint, load, save
from duet_jax.models.rope import RopeScaling
from duet_jax.models.tokenizer import Tokenizer

__all__ = ["LlamaConfig", "Model", "RopeScaling", "Tokenizer", "fingerprint", "load", "save"]
