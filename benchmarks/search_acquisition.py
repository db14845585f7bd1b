"""Is what we propose the maximum of the acquisition function?

Draws random posteriors (random objectives, 5 to 40 random observations, a tenth of them at vertices and on faces) and
compares the upper confidence bound of our proposal with the best of SciPy's SLSQP from 20 starts (10 random ones and
the 10 best draws, gradients from JAX, on the sphere of Hellinger coordinates, where slopes are finite) and 100,000
Dirichlet draws. Values are in units of the standardised feedback.

    python benchmarks/search_acquisition.py
    python benchmarks/search_acquisition.py --posteriors 500 --output
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from search_common import make_search, parse, write
from search_objectives import NAMES, Feedback, draw

from duet_jax.search import Observations, Search

STARTS, DRAWS, CHUNK = 20, 100_000, 10_000


@partial(jax.jit, static_argnums=0)
def fitted(search: Search, state: Observations) -> Any:
    return search.condition(search.fit(state), jnp.zeros((0, search.num_domains)), jnp.zeros(0, bool))


@partial(jax.jit, static_argnums=0)
def bounds(search: Search, posteriors: Any, roots: jax.Array) -> jax.Array:
    """Upper confidence bound, standardised, `[m]`, of Hellinger coordinates `[m, d]`."""
    mean, deviation = search.moments(posteriors, roots)
    return mean + search.beta * deviation


@partial(jax.jit, static_argnums=0)
def bound_and_slope(search: Search, posteriors: Any, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda root: bounds(search, posteriors, root[None])[0])(root)


def random_state(search: Search, rng: np.random.Generator) -> Any:
    size = search.num_domains
    objective = draw(str(rng.choice(NAMES)), size, int(rng.integers(1_000_000)))
    count = int(rng.integers(5, 41))
    alphas = np.where(rng.uniform(size=count) < 0.9, 1.0, 0.1)
    feedback = Feedback.draw("gaussian", objective, count, int(rng.integers(1_000_000)), float(rng.uniform(0, 0.5)))
    state = search.init()
    for number, alpha in enumerate(alphas):
        mixture = rng.dirichlet(np.full(size, alpha))
        state = search.tell(state, mixture, float(feedback(objective(mixture), number)[0]))
    return state


def climb(score: Callable[[np.ndarray], tuple[Any, Any]], start: np.ndarray) -> float:
    """The value that SLSQP reaches from a start, at a point of the sphere."""

    def negative(roots: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = score(roots)
        return -float(value), -np.asarray(slope)

    found = minimize(
        negative,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(start),
        constraints={"type": "eq", "fun": lambda x: x @ x - 1, "jac": lambda x: 2 * x},
        options={"maxiter": 200, "ftol": 1e-12},
    )
    roots = np.maximum(found.x, 0.0)
    return float(score(roots / np.linalg.norm(roots))[0])


def compare(search: Search, seed: int) -> dict[str, float]:
    """What the proposal has, and the best of each rival."""
    size = search.num_domains
    rng = np.random.default_rng([seed, size])
    state = random_state(search, rng)
    mixture, _ = search.ask(state, key=jax.random.key(seed))
    with jax.enable_x64(True):
        posteriors = fitted(search, state)
        ours = float(bounds(search, posteriors, jnp.sqrt(jnp.asarray(mixture))[None])[0])
        best, points = [], []
        for _ in range(DRAWS // CHUNK):
            chunk = np.sqrt(rng.dirichlet(np.ones(size), CHUNK))
            scores = np.asarray(bounds(search, posteriors, jnp.asarray(chunk)))
            top = np.argsort(-scores)[:STARTS]
            best.append(scores[top])
            points.append(chunk[top])
        order = np.argsort(-np.concatenate(best))[: STARTS // 2]
        starts = [*np.concatenate(points)[order], *np.sqrt(rng.dirichlet(np.ones(size), STARTS - STARTS // 2))]
        climbed = [climb(lambda x: bound_and_slope(search, posteriors, jnp.asarray(x)), x) for x in starts]
    return {"ours": ours, "slsqp": max(climbed), "draws": float(np.max(best))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 9, 20])
    parser.add_argument("--posteriors", type=int, default=15, help="in all, dealt to the numbers of domains")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    options = parse(parser, "search_acquisition")

    print(f"{'d':>3} {'posteriors':>10} {'within':>7} {'above':>7} {'worst gap':>10} {'draws alone, median gap':>24}")
    rows = []
    for position, size in enumerate(options.domains):
        # A proposal comes from the acquisition function from the second on.
        search = make_search(size, initial=1)
        count = len(range(position, options.posteriors, len(options.domains)))
        results = [compare(search, seed) for seed in range(count)]
        gaps = np.array([max(result["slsqp"], result["draws"]) - result["ours"] for result in results])
        behind = np.array([result["ours"] - result["draws"] for result in results])
        row = {
            "domains": size,
            "posteriors": count,
            "within": float(np.mean(gaps <= options.tolerance)),
            "above": float(np.mean(gaps < -options.tolerance)),
            "worst_gap": float(gaps.max()),
            "draws_gap": float(np.median(behind)),
            "gaps": gaps.tolist(),
        }
        rows.append(row)
        print(
            f"{size:3} {count:10} {row['within']:7.3f} {row['above']:7.3f} {row['worst_gap']:10.1e}"
            f" {row['draws_gap']:24.4f}",
            flush=True,
        )
    share = float(np.average([row["within"] for row in rows], weights=[row["posteriors"] for row in rows]))
    print(f"all: {share:.3f} of the proposals are within {options.tolerance} of the best or above it")
    write(options.output, options, {"rows": rows, "within": share})


if __name__ == "__main__":
    main()
