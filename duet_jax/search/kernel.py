"""Covariance of values at mixtures: maps of the simplex, and tinygp kernels evaluated by matrix products."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tinygp
from jax import Array

Map = Literal["hellinger", "raw", "log"]
# Offset of shares under a logarithm: faces of the simplex stay at finite distance.
OFFSET = 1e-3


class Inputs(NamedTuple):
    """Points at which values are observed or asked for.

    Attributes:
      features: `[n, p]`, of which the kernel is stationary.
      trend: `[n, q]`, in which it is linear; `q` may be 0.
      mask: `[n]`, 1 for rows in use, else 0.
      against: inputs whose value is subtracted from these rows', or None.
    """

    features: Array
    trend: Array
    mask: Array
    against: Inputs | None = None


@jax.custom_jvp
def matern52(squared: Array) -> Array:
    """Matern 5/2 of a squared distance in lengthscales (Rasmussen & Williams 2006, equation 4.17)."""
    distance = jnp.sqrt(5.0 * squared)
    return (1.0 + distance + 5.0 / 3.0 * squared) * jnp.exp(-distance)


@matern52.defjvp
def _matern52_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # In the squared distance it is smooth at 0, where the square root is not.
    (squared,), (tangent,) = primals, tangents
    distance = jnp.sqrt(5.0 * squared)
    decay = jnp.exp(-distance)
    value = (1.0 + distance + 5.0 / 3.0 * squared) * decay
    return value, -5.0 / 6.0 * (1.0 + distance) * decay * tangent


class Matern52(tinygp.kernels.Kernel):
    """Matern 5/2 with a lengthscale per feature, over the Euclidean distance.

    tinygp's own evaluates pair by pair, which costs 3 to 10 times as much as one matrix product of all.
    """

    inverse_lengthscales: Array

    def evaluate(self, X1: Array, X2: Array) -> Array:
        return matern52(jnp.sum(((X1 - X2) * self.inverse_lengthscales) ** 2))

    def __call__(self, X1: Array, X2: Array | None = None) -> Array:
        first = X1 * self.inverse_lengthscales
        second = first if X2 is None else X2 * self.inverse_lengthscales
        squared = jnp.sum(first**2, 1)[:, None] + jnp.sum(second**2, 1)[None] - 2.0 * first @ second.T
        return matern52(jnp.maximum(squared, 0.0))


def transform(kind: Map, roots: Array) -> Array:
    """Features of mixtures given by the square roots of their shares, `[..., d]` to `[..., d]`.

    "hellinger" keeps the roots: random mixtures are about as far apart whatever the number of domains, and faces are
    no edges. "raw" is the shares. "log" is the centred log-ratio of Aitchison with shares offset by `OFFSET`.
    """
    if kind == "hellinger":
        return roots
    if kind == "raw":
        return roots**2
    logs = jnp.log(roots**2 + OFFSET)
    return logs - jnp.mean(logs, axis=-1, keepdims=True)


def spread_of(kind: Map, size: int) -> float:
    """Root-mean-square distance of two uniformly random mixtures of `size` domains in the map; 0.5 if there is one."""
    if size == 1:
        return 0.5
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(size), 2000)
    if kind == "hellinger":
        # E |sqrt r - sqrt s|^2 = 2 - 2 d E[sqrt r_1]^2, and shares are Beta(1, d - 1).
        mean = math.gamma(1.5) * math.exp(math.lgamma(size) - math.lgamma(size + 0.5))
        return math.sqrt(2.0 - 2.0 * size * mean**2)
    features = shares if kind == "raw" else np.log(shares + OFFSET)
    if kind == "log":
        features = features - features.mean(axis=1, keepdims=True)
    return math.sqrt(2.0 * features.var(axis=0).sum())


def covariance(kernel: tinygp.kernels.Kernel, signal: Array, slope: Array, a: Inputs, b: Inputs) -> Array:
    """Prior covariance `[n, m]` of the values at two sets of inputs; 0 in masked rows and columns.

    Args:
      kernel: of the features, 1 at distance 0.
      signal: its variance.
      slope: variance of the coefficients of the trend.
      a, b: inputs; rows with something to compare against observe a difference of two values.
    """
    if a.against is not None:
        first, second = a._replace(against=None), a.against
        return covariance(kernel, signal, slope, first, b) - covariance(kernel, signal, slope, second, b)
    if b.against is not None:
        return covariance(kernel, signal, slope, b, a).T
    total = signal * kernel(a.features, b.features)
    if a.trend.shape[1]:
        total = total + slope * a.trend @ b.trend.T
    return total * a.mask[:, None] * b.mask[None]
