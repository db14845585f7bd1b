"""How far sketches are from the gradients they stand for, measured on a sample of exact inner products."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class SketchError(NamedTuple):
    """Error of sketched cosines on a sample of training examples and targets.

    Attributes:
      pairs: sampled pairs.
      rmse: root mean square error of a cosine.
      low: lower end of the 95% bootstrap interval of `rmse`, over training examples.
      high: its upper end.
      expected: what `rmse` is for projections of k independent signs a coordinate, sqrt(mean (1 - cos^2)^2 / k).
        A `rmse` far above it says that few coordinates dominate the gradients, or that codes are too coarse.
      bias: mean error.
      spearman: rank correlation of sketched and exact cosines, the mean over targets; NaN below 3 examples.
    """

    pairs: int
    rmse: float
    low: float
    high: float
    expected: float
    bias: float
    spearman: float

    def __str__(self) -> str:
        return (
            f"sketch error of a cosine {self.rmse:.4f} (95% {self.low:.4f} to {self.high:.4f}, "
            f"expected {self.expected:.4f}), rank correlation {self.spearman:.3f}, {self.pairs} pairs"
        )


def sketch_error(exact: np.ndarray, sketched: np.ndarray, k: int, *, seed: int = 0) -> SketchError:
    """Compares sketched cosines with exact ones.

    Args:
      exact: cosines of the gradients, `[n, m]`, of n training examples and m targets; see `cosines`.
      sketched: cosines of their sketches, `[n, m]`.
      k: coordinates of a sketch.
      seed: of the bootstrap.

    Raises:
      ValueError: the shapes differ or are empty, or a value is not finite.
    """
    exact, sketched = np.asarray(exact, np.float64), np.asarray(sketched, np.float64)
    if exact.ndim != 2 or exact.shape != sketched.shape or not exact.size:
        raise ValueError(f"cosines have shapes {exact.shape} and {sketched.shape}; both must be [n, m]")
    if not (np.isfinite(exact).all() and np.isfinite(sketched).all()):
        raise ValueError("a sampled cosine is not finite; sample examples with finite gradients")
    errors = sketched - exact
    squares = np.mean(errors**2, axis=1)
    # Examples are drawn again, not pairs: the pairs of an example share its sketch.
    drawn = np.random.default_rng(seed).integers(len(squares), size=(1000, len(squares)))
    low, high = np.sqrt(np.quantile(squares[drawn].mean(axis=1), [0.025, 0.975]))
    ranks = [spearman(exact[:, j], sketched[:, j]) if len(exact) > 2 else np.nan for j in range(exact.shape[1])]
    return SketchError(
        exact.size,
        float(np.sqrt(squares.mean())),
        float(low),
        float(high),
        float(np.sqrt(np.mean((1 - exact**2) ** 2) / k)),
        float(errors.mean()),
        float(np.mean(ranks)),
    )


def cosines(products: np.ndarray, train_norms: np.ndarray, target_norms: np.ndarray) -> np.ndarray:
    """Cosines float64 `[n, m]` from inner products `[n, m]` and norms `[n]`, `[m]`; 0 where a norm is 0."""
    scale = np.outer(np.asarray(train_norms, np.float64), np.asarray(target_norms, np.float64))
    return np.divide(np.asarray(products, np.float64), scale, out=np.zeros_like(scale), where=scale > 0)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two arrays `[n]`; equal values share their mean rank. NaN where one is constant."""
    a, b = _ranks(np.asarray(first)), _ranks(np.asarray(second))
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def overlap(first: np.ndarray, second: np.ndarray, count: int) -> float:
    """Share of the `count` highest of `first` that are among the `count` highest of `second`.

    For utilities from two projections that differ in their seed alone, it says how much of a selection is chance.
    """
    return len(np.intersect1d(_highest(first, count), _highest(second, count))) / count


def _highest(utilities: np.ndarray, count: int) -> np.ndarray:
    if not 1 <= count <= len(utilities):
        raise ValueError(f"count is {count}; it must be at least 1 and at most the {len(utilities)} utilities")
    return np.argsort(-np.asarray(utilities), kind="stable")[:count]


class Stability(NamedTuple):
    """Share of a selection that another projection would have selected too: mean, and a 95% interval."""

    kept: float
    low: float
    high: float


def stability(utilities: np.ndarray, error: float, count: int, *, seed: int = 0, draws: int = 200) -> Stability:
    """How much of the top `count` would remain if the sketches' errors were drawn again.

    A parametric bootstrap from one store: independent Gaussian errors are added to the utilities.

    Args:
      utilities: `[N]`.
      error: standard deviation of a utility's error. For cosines at one checkpoint it is `SketchError.rmse`; for
        several, that times the norm of their weights.
      count: size of the selection.
      seed: of the draws.
      draws: how many.
    """
    rng = np.random.default_rng(seed)
    utilities = np.asarray(utilities, np.float64)
    kept = [overlap(utilities, utilities + error * rng.standard_normal(len(utilities)), count) for _ in range(draws)]
    low, high = np.quantile(kept, [0.025, 0.975])
    return Stability(float(np.mean(kept)), float(low), float(high))
