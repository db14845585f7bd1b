"""How long does a proposal take (tell, fit, maximise), and how long the first one of a process?

Ours against BoTorch with the settings of DUET's code and tuned (peers/botorch_search.py), each in processes of its own
with one thread for linear algebra, interleaved, because machines are shared. Medians; ratios of CPU time, which other
processes disturb least, and of wall time. The first call is timed in a fresh process twice: with an empty persistent
compilation cache, and with the one that the first process left. Last, whole studies for many seeds as one program.

    python benchmarks/search_speed.py                         # ours alone, small
    python benchmarks/search_speed.py --peer-python PYTHON    # a Python that has torch and botorch
    python benchmarks/search_speed.py --full --peer-python PYTHON --output
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
from search_common import MISSING, SINGLE, ask_botorch, make_search, parse, write
from search_objectives import Feedback, draw

FULL = ((3, 10), (9, 10), (50, 10), (9, 50), (3, 200), (9, 200), (20, 50), (20, 200))
QUICK = ((3, 10), (9, 10), (9, 50))
FIRST_FULL = ((9, 10), (9, 50), (9, 200), (50, 10))
FIRST_QUICK = ((9, 10),)
PEERS = ("duet", "tuned")


def observations(size: int, count: int) -> tuple[np.ndarray, list[float]]:
    """What the peers see as well."""
    objective = draw("mixing-law", size, 0)
    feedback = Feedback.draw("gaussian", objective, count, 0)
    mixtures = np.random.default_rng(0).dirichlet(np.ones(size), count)
    return mixtures, [float(feedback(objective(mixture), number)[0]) for number, mixture in enumerate(mixtures)]


def child_steps(size: int, count: int, repeats: int) -> dict:
    """Milliseconds of warm steps, each of which adds the last of `count` observations and proposes."""
    import jax

    mixtures, values = observations(size, count + repeats)
    search = make_search(size)
    state = search.init()
    for mixture, value in zip(mixtures[: count - 2], values[: count - 2], strict=True):
        state = search.tell(state, mixture, value)
    state, _, _ = search.step(state, mixtures[count - 2], values[count - 2], key=jax.random.key(0))
    wall, cpu = [], []
    # The first of them may compile for a larger buffer.
    for number in range(repeats + 1):
        key = jax.random.key(number)
        began, began_cpu = time.perf_counter(), time.process_time()
        search.step(state, mixtures[count - 1 + number], values[count - 1 + number], key=key)
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - began_cpu))
    return {"wall_ms": wall[1:], "cpu_ms": cpu[1:]}


def child_first(size: int, count: int) -> dict:
    """Seconds of the first step of this process, which adds the last of `count` observations."""
    import jax

    search = make_search(size)
    mixtures, values = observations(size, count)
    state = search.init()
    for mixture, value in zip(mixtures[:-1], values[:-1], strict=True):
        state = search.tell(state, mixture, value)
    key = jax.random.key(0)
    began = time.perf_counter()
    search.step(state, mixtures[-1], values[-1], key=key)
    return {"step_s": time.perf_counter() - began}


def child_studies(size: int, rounds: int, seeds: int) -> dict:
    """Seconds of whole studies of drawn objectives, one for each seed, as one program: compiled and run, then run."""
    import jax
    import jax.numpy as jnp

    search = make_search(size, capacity=rounds)
    laws = [draw("mixing-law", size, seed) for seed in range(seeds)]
    noise = [Feedback.draw("gaussian", law, rounds, seed).noise[:, 0] for seed, law in enumerate(laws)]

    def study(drawn: tuple) -> jax.Array:
        parameters, errors, key = drawn
        law = dataclasses.replace(laws[0], parameters=parameters)

        def one_round(state: Any, inputs: tuple) -> tuple[Any, jax.Array]:
            key, error = inputs
            mixture = search.propose(state, key=key).mixture
            value = law(mixture, jnp)
            return search.insert(state, mixture, (value + error, jnp.zeros(()))), value

        _, values = jax.lax.scan(one_round, search.start(), (jax.random.split(key, rounds), errors))
        return jnp.max(values)

    with jax.enable_x64(True):
        parameters = {name: jnp.stack([law.parameters[name] for law in laws]) for name in laws[0].parameters}
        drawn = (parameters, jnp.asarray(noise), jax.random.split(jax.random.key(0), seeds))
        program = jax.jit(partial(jax.lax.map, study))
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            best = np.asarray(program(drawn))
            seconds.append(time.perf_counter() - began)
    regret = np.mean([(law.optimum - value) / law.scale for law, value in zip(laws, best, strict=True)])
    return {"first_s": seconds[0], "again_s": seconds[1], "mean_regret_of_best_tried": float(regret)}


def run_child(*arguments: object, cache: str | None = None) -> dict:
    """A measurement in a process of its own, and how long that process lived."""
    environment = os.environ | SINGLE
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    began = time.perf_counter()
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "process_s": time.perf_counter() - began}


def measure_steps(
    size: int, count: int, repeats: int, peer_repeats: int, passes: int, peer_python: str | None
) -> tuple[dict, dict]:
    """Medians by tool, and versions of the other tools."""
    runs: dict[str, list[dict]] = {}
    versions: dict[str, str] = {}
    for _ in range(passes):
        runs.setdefault("ours", []).append(run_child("steps", size, count, repeats))
        for mode in PEERS if peer_python else ():
            request = {"task": "speed", "mode": mode, "domains": size, "count": count, "repeats": peer_repeats}
            (answer,) = ask_botorch(peer_python, request)
            versions |= answer.pop("versions")
            runs.setdefault(mode, []).append(answer)
    row: dict = {"domains": size, "observations": count}
    for name, results in runs.items():
        row[name] = {
            unit: statistics.median(time_ for result in results for time_ in result[unit])
            for unit in ("wall_ms", "cpu_ms")
        }
    for mode in PEERS if peer_python else ():
        row[f"ratio_{mode}"] = {unit: row[mode][unit] / row["ours"][unit] for unit in ("wall_ms", "cpu_ms")}
    return row, versions


def measure_first(size: int, count: int) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (run_child("first", size, count, cache=cache) for _ in range(2))
    return {"domains": size, "observations": count, "empty_cache": cold, "warm_cache": warm}


def show(row: dict) -> str:
    text = f"{row['domains']:3} {row['observations']:5} {row['ours']['wall_ms']:9.1f} {row['ours']['cpu_ms']:9.1f}"
    for mode in PEERS:
        if mode in row:
            ratio = row[f"ratio_{mode}"]
            text += f" {row[mode]['wall_ms']:9.0f} {row[mode]['cpu_ms']:9.0f}"
            text += f" {ratio['wall_ms']:6.0f}x {ratio['cpu_ms']:6.0f}x"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three sizes, few repeats (the default)")
    size.add_argument("--full", action="store_true", help="all sizes, more repeats")
    parser.add_argument("--passes", type=int, help="processes of each tool and size (default 1; 2 with --full)")
    parser.add_argument("--peer-python", help="a Python with torch and botorch")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parse(parser, "search_speed")
    if options.child:
        what, *numbers = options.child
        child = {"steps": child_steps, "first": child_first, "studies": child_studies}[what]
        print(json.dumps(child(*map(int, numbers))))
        return
    if not options.peer_python:
        print(MISSING)
    repeats, peer_repeats = (15, 3) if options.full else (7, 1)
    passes = options.passes or (2 if options.full else 1)

    print(f"{'':9} {'ours':>9} {'':9}" + "".join(f" {mode:>9} {'':9} {'ratio':>7} {'':7}" for mode in PEERS))
    print(
        f"{'d':>3} {'n':>5} {'wall ms':>9} {'cpu ms':>9}" + f" {'wall ms':>9} {'cpu ms':>9} {'wall':>7} {'cpu':>7}" * 2
    )
    steps, versions = [], {}
    for place in FULL if options.full else QUICK:
        row, found = measure_steps(*place, repeats, peer_repeats, passes, options.peer_python)
        steps.append(row)
        versions |= found
        print(show(row), flush=True)

    print(f"\nfirst call   empty cache: {'step s':>8} {'process s':>9}   warm cache: {'step s':>8} {'process s':>9}")
    firsts = []
    for place in FIRST_FULL if options.full else FIRST_QUICK:
        row = measure_first(*place)
        firsts.append(row)
        cold, warm = row["empty_cache"], row["warm_cache"]
        print(
            f"{row['domains']:3} {row['observations']:5} {'':16} {cold['step_s']:8.2f} {cold['process_s']:9.2f}"
            f" {'':13} {warm['step_s']:8.2f} {warm['process_s']:9.2f}",
            flush=True,
        )
    place = {"domains": 9, "rounds": 30, "seeds": 64 if options.full else 4}
    studies = {**place, **run_child("studies", *place.values())}
    print(
        f"\n{place['seeds']} studies of {place['rounds']} rounds, d = {place['domains']}, one program:"
        f" {studies['first_s']:.1f} s, of which compiling {studies['first_s'] - studies['again_s']:.1f} s"
    )
    write(options.output, options, {"steps": steps, "first_calls": firsts, "studies": studies}, versions)


if __name__ == "__main__":
    main()
