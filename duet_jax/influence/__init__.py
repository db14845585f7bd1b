"""What single training examples do: per-example gradients, sketched, kept and compared."""

from duet_jax.influence.any_loss import of_any_loss
from duet_jax.influence.estimator import PAPER_CODE, Estimator
from duet_jax.influence.features import Adam, FrozenAdam, Gradient, Moments, RankOne, Sign, moments
from duet_jax.influence.gradients import ExampleGradients, Examples
from duet_jax.influence.projections import CountSketch, Kronecker, KroneckerSketch, Rademacher
from duet_jax.influence.tap import InnerProducts, SecondMoments, Sketch, SquaredNorm

__all__ = [
    "Adam",
    "CountSketch",
    "Estimator",
    "ExampleGradients",
    "Examples",
    "FrozenAdam",
    "Gradient",
    "InnerProducts",
    "Kronecker",
    "KroneckerSketch",
    "Moments",
    "PAPER_CODE",
    "Rademacher",
    "RankOne",
    "SecondMoments",
    "Sign",
    "Sketch",
    "SquaredNorm",
    "moments",
    "of_any_loss",
]
