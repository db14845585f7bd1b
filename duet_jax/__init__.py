"""Decide which data to train a language model on, from outside scores alone."""

__version__ = "0.1.0"
