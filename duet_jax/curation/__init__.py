"""Curation: what a model's mistakes, samples and doubts say about data, one method a module."""

from duet_jax.curation.bench import Bench, Curated

__all__ = ["Bench", "Curated"]
