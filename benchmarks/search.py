"""How long does a proposal take, and how good is the mixture found, on objectives whose optimum is known?

The objective is a mixing law with noise: a weighted sum of losses, each of which falls exponentially with the shares
of the domains that help it. Regret is the noise-free value of the best mixture minus that of the recommended one.
`random` tries uniform draws of the simplex and recommends with the same surrogate, so that only the choice of what to
try differs; `uniform` recommends equal shares without trying anything.

    python benchmarks/search.py
    python benchmarks/search.py --seeds 20 --rounds 40 --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from duet_jax import __version__
from duet_jax.search import Search

RESULTS = Path(__file__).parent / "results" / "search.json"


@dataclasses.dataclass(frozen=True)
class MixingLaw:
    """Minus the weighted sum over losses k of `exp(-helps[k] @ mixture)`, concave in the mixture."""

    weights: np.ndarray
    helps: np.ndarray

    @classmethod
    def draw(cls, size: int, rng: np.random.Generator) -> MixingLaw:
        """As many losses as domains; each is helped by about a third of the domains."""
        helps = rng.exponential(3.0, (size, size)) * (rng.uniform(size=(size, size)) < 0.3)
        return cls(rng.dirichlet(np.ones(size)), helps + 3.0 * np.eye(size))

    def __call__(self, mixture: np.ndarray) -> float:
        return -float(self.weights @ np.exp(-self.helps @ mixture))

    def optimum(self, tolerance: float = 1e-6) -> float:
        """The largest value, to `tolerance`: exponentiated gradient until the Frank-Wolfe gap certifies it."""
        size = self.helps.shape[1]
        mixture, rate = np.full(size, 1 / size), 1.0
        for _ in range(20_000):
            slope = self.helps.T @ (self.weights * np.exp(-self.helps @ mixture))
            if slope.max() - slope @ mixture <= tolerance:
                return self(mixture)
            moved = mixture * np.exp(rate * (slope - slope.max()))
            moved /= moved.sum()
            better = self(moved) > self(mixture)
            mixture, rate = (moved, 1.3 * rate) if better else (mixture, 0.4 * rate)
        raise RuntimeError(f"The optimum was not found to {tolerance}.")


def measure_time(size: int, count: int, repeats: int) -> dict:
    """Seconds of the first step in this process, and milliseconds of later ones with `count` observations."""
    rng = np.random.default_rng(0)
    law = MixingLaw.draw(size, rng)
    search = Search(num_domains=size, capacity=64)
    mixtures = rng.dirichlet(np.ones(size), count + repeats)
    values = [law(mixture) + 0.01 * rng.standard_normal() for mixture in mixtures]
    began = time.perf_counter()
    search.step(search.init(), mixtures[0], values[0], key=jax.random.key(0))
    first = time.perf_counter() - began
    state = search.init()
    for mixture, value in zip(mixtures[:count], values[:count], strict=True):
        state = search.tell(state, mixture, value)
    wall, cpu = [], []
    for i in range(count, count + repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        state, _, _ = search.step(state, mixtures[i], values[i], key=jax.random.key(i))
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - began_cpu))
    return {"first_step_s": first, "step_ms": float(np.median(wall)), "step_cpu_ms": float(np.median(cpu))}


def measure_regret(size: int, rounds: int, noise: float, seed: int) -> dict[str, float]:
    """Regret after `rounds` scores of one drawn objective; both ways to search see the same noise."""
    rng = np.random.default_rng(seed)
    law = MixingLaw.draw(size, rng)
    errors = noise * rng.standard_normal(rounds)
    tried = rng.dirichlet(np.ones(size), rounds)
    search = Search(num_domains=size, capacity=64)
    state, chance = search.init(), search.init()
    key = jax.random.key(seed)
    mixture, _ = search.ask(state, key=key)
    for i in range(rounds):
        state, mixture, _ = search.step(state, mixture, law(mixture) + errors[i], key=jax.random.fold_in(key, i))
        chance = search.tell(chance, tried[i], law(tried[i]) + errors[i])
    recommended = {
        "search": search.best(state)[0],
        "random": search.best(chance)[0],
        "uniform": np.full(size, 1 / size),
    }
    best = law.optimum()
    return {name: best - law(mixture) for name, mixture in recommended.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 8, 20])
    parser.add_argument("--rounds", type=int, default=25, help="scores per search (default 25)")
    parser.add_argument("--seeds", type=int, default=5, help="objectives per number of domains (default 5)")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of a score (default 0.02)")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=RESULTS, help=f"write JSON (default {RESULTS.name} in results/)"
    )
    options = parser.parse_args()

    print(f"{'domains':>7} {'first step s':>12} {'step ms':>8} {'cpu ms':>7}   mean regret: search  random  uniform")
    rows = []
    for size in options.domains:
        row = {"domains": size, **measure_time(size, count=50, repeats=10)}
        regrets = [measure_regret(size, options.rounds, options.noise, seed) for seed in range(options.seeds)]
        for name in regrets[0]:
            each = np.array([regret[name] for regret in regrets])
            row[name] = {"mean": each.mean(), "stderr": each.std() / max(len(each) - 1, 1) ** 0.5}
        rows.append(row)
        print(
            f"{size:7} {row['first_step_s']:12.1f} {row['step_ms']:8.1f} {row['step_cpu_ms']:7.1f}"
            f"   {row['search']['mean']:19.4f} {row['random']['mean']:7.4f} {row['uniform']['mean']:8.4f}",
            flush=True,
        )
    if options.output:
        about = {
            "settings": {"rounds": options.rounds, "seeds": options.seeds, "noise": options.noise},
            "rows": rows,
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "duet_jax": __version__},
        }
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
