"""Several processes, real ones that meet over the loopback, compute and decide what one does.

They share a batch, so that sums are added up in another order: values agree to the tolerances of `test_spread.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from duet_jax.distributed import processes
from duet_jax.errors import ConfigError
from duet_jax.storage import at
from duet_jax.study import Study
from duet_jax.training.checkpoint import Checkpoints

HERE = Path(__file__).parent
MODEL = HERE.parents[2] / "shared" / "models" / "stories260K"
# Seconds after which a process that should have ended hangs.
PATIENCE = 400
STOPPED = 143
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
Found = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("auto", 2, None), "--processes goes with --cluster HOST:PORT"),
        ((None, None, 0), "--process goes with --cluster HOST:PORT"),
        (("here", 2, 0), "--cluster is 'here'; it must be auto, or HOST:PORT"),
        (("here:70000", 2, 0), "it must be auto, or HOST:PORT"),
        (("here:1234", None, 0), "--cluster here:1234 needs --processes"),
        (("here:1234", 2, None), "--cluster here:1234 needs --process;"),
        (("here:1234", 2, 2), "--process is 2; it must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        processes.start(*given)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="this process cannot listen at port"):
            processes.start(f"localhost:{taken.getsockname()[1]}", 2, 0)


def test_no_cluster_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from duet_jax.distributed.processes import start; start('auto')"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "ConfigError: --cluster auto: the processes cannot be joined" in done.stderr


def test_processes_that_do_not_meet_end() -> None:
    code = f"from duet_jax.distributed import processes as p; p.MEET = 2; p.start('localhost:{free_port()}', 2, 1)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == processes.LOST
    assert "error: the processes of this run did not all meet at localhost:" in done.stderr


@pytest.fixture
def terminable() -> Iterator[None]:
    with processes.joined():
        yield


def test_sigterm_ends_one_process_at_once_or_after_its_step(terminable: None) -> None:
    with pytest.raises(processes.Stopped):
        signal.raise_signal(signal.SIGTERM)
    processes.start()
    reached = []
    with pytest.raises(processes.Stopped), processes.deferring():
        assert not processes.stopping()
        signal.raise_signal(signal.SIGTERM)
        assert processes.stopping()
        reached.append("the end of the step")
    assert reached


def test_sigterm_is_whose_it_was_after_a_run_and_forgotten() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(processes.Stopped), processes.joined():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before and not processes.stopping()


def test_a_second_sigterm_does_not_cut_off_the_end(terminable: None) -> None:
    ended = []
    with pytest.raises(processes.Stopped):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            ended.append(True)
    assert ended


def test_sigterm_lets_a_checkpoint_be_finished(
    terminable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"x": jnp.ones(8)}
    with pytest.raises(processes.Stopped), Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, state, {"loss": 2.0})
        wait = checkpoints._manager.wait_until_finished
        told = lambda: signal.raise_signal(signal.SIGTERM) or wait()  # noqa: E731
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", told)
    processes.start()
    with Checkpoints(tmp_path, {}) as checkpoints:
        found = checkpoints.restore(state)
    assert found is not None and (found[0], found[2]) == (1, {"loss": 2.0})


def test_one_process_of_a_cluster_hears_sigterm() -> None:
    code = (
        f"import signal; from duet_jax.distributed import processes as p; p.start('localhost:{free_port()}', 1, 0)\n"
        "try: signal.raise_signal(signal.SIGTERM)\nexcept p.Stopped: print('heard')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert "heard" in done.stdout, done.stderr


def test_one_process_leads_itself() -> None:
    assert processes.first() and not processes.several()
    assert processes.lead(int, "7", base=8) == 7
    with processes.led(lambda: nullcontext("entered")) as value:
        assert value == "entered"
    with pytest.raises(ZeroDivisionError):
        processes.lead(lambda: 1 // 0)


def environment() -> dict[str, str]:
    hidden = ("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_COORDINATOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"JAX_PLATFORMS": "cpu"}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("", 0))
        return tried.getsockname()[1]


@contextmanager
def started(commands: Sequence[Sequence[str]], folder: Path, **variables: Sequence[str]) -> Iterator[list[Any]]:
    """Processes, each with its output in a file of the folder; none outlives the block."""
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    try:
        for number, command in enumerate(commands):
            own = {name: values[number] for name, values in variables.items()}
            with (folder / f"{number}.txt").open("w") as out:
                running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment() | own))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def end(running: list[Any], folder: Path) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs."""
    deadline = time.monotonic() + PATIENCE
    codes = [process.wait(max(deadline - time.monotonic(), 1)) for process in running]
    return codes, [(folder / f"{number}.txt").read_text() for number in range(len(running))]


@pytest.fixture(scope="module")
def compute(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Found]:
    """Gives what parts of `spread_programs` find, from so many processes of one device each."""

    @cache
    def run(count: int, *runs: str, trained: str = "") -> Found:
        folder = tmp_path_factory.mktemp("processes")
        command = [sys.executable, str(HERE / "spread_programs.py"), str(folder / "found.npz"), *runs]
        address = f"localhost:{free_port()}"
        variables = {"DUET_TRAINED": [trained] * count}
        if count > 1:
            variables["DUET_CLUSTER"] = [f"{address},{count},{i}" for i in range(count)]
        with started([command] * count, folder, **variables) as running:
            codes, said = end(running, folder)
        assert codes == [0] * count, "\n".join(said)[-5000:]
        with np.load(folder / "found.npz") as found:
            return {**found, "folder": np.array(str(folder / "found"))}

    return run


def alike(one: Found, many: Found, run: str, key: str, **tolerance: float) -> None:
    single = f"one:{run.split(':')[1]}"
    names = [name.removeprefix(single) for name in one if name.startswith(f"{single} {key}")]
    assert names
    for name in names:
        np.testing.assert_allclose(many[run + name], one[single + name], **tolerance)


def check_training(compute: Callable[..., Found], count: int, mesh: str, *further: str) -> Found:
    one, run = compute(1, "one:lora"), f"{mesh}:lora"
    many = compute(count, f"{mesh}:told", run, *further)
    for key in ("losses", "trained"):
        alike(one, many, run, key, atol=2e-4, rtol=2e-3)
    assert many[f"{run} programs"] == 1
    told = {name.split()[1]: value for name, value in many.items() if name.startswith(f"{mesh}:told")}
    assert (told["long"], told["last"], told["nested"], told["entered"]) == (20_001, "0", 1, 0)
    assert "at least 1" in str(told["said"]) and "is not seen by all processes" in str(told["missed"])
    assert told["failed"] == f"Process 1 of {count} of this run could not read it; it says why."
    np.testing.assert_array_equal(told["whole"], 2 * np.arange(4 * count))
    return many


def test_two_processes_train_and_read_alike(compute: Callable[..., Found]) -> None:
    many = check_training(compute, 2, "2,1,1", "2,1,1:reads")
    found = {name.partition("reads ")[2]: value for name, value in many.items() if "reads" in name}
    assert {str(found[f"{name} tokens"]) for name in ("shared", "again", "own")} == {"as in memory"}
    # Of 30 examples in eight files the first process has four files, and the last file is of two examples.
    assert found["shared parsed"].tolist() == [1, 0] and found["shared given"].tolist() == [32, 28]
    assert not found["again parsed"].any() and not found["again given"].any()
    assert found["own parsed"].tolist() == [1, 1] and found["own given"].tolist() == [60, 60]
    assert found["refused"].tolist() == [False, True]
    assert found["failed"] == "Process 1 of 2 of this run could not tokenise its share of the examples; it says why."


@pytest.mark.slow
def test_two_processes_select_and_write_alike(compute: Callable[..., Found]) -> None:
    parts = ("less", "ekfac", "rho", "deployed")
    one = compute(1, *(f"one:{part}" for part in parts))
    many = compute(2, *(f"1,2,1:{part}" for part in parts))
    for part in ("less", "ekfac"):
        np.testing.assert_array_equal(many[f"1,2,1:{part} selected"], one[f"one:{part} selected"])
        alike(one, many, f"1,2,1:{part}", "utility", atol=2e-3 * np.abs(one[f"one:{part} utility"]).max())
    np.testing.assert_array_equal(many["1,2,1:rho tokens"], one["one:rho tokens"])
    alike(one, many, "1,2,1:rho", "losses", atol=2e-4, rtol=2e-3)
    alike(one, many, "1,2,1:deployed", "scores", rtol=1e-5)
    np.testing.assert_array_equal(many["1,2,1:deployed ids"], one["one:deployed ids"])


@pytest.mark.slow
def test_four_processes_train_and_sketch_alike(compute: Callable[..., Found]) -> None:
    many = check_training(compute, 4, "2,2,1", "2,2,1:sketches")
    one, run = compute(1, "one:sketches"), "2,2,1:sketches"
    # Sketches that differed in one hash would have whole entries of gradients elsewhere.
    for key in ("sketches", "losses"):
        alike(one, many, run, key, atol=2e-5 * np.abs(one[f"one:sketches {key}"]).max())
    assert many[f"{run} share"] == 1 / 4, "each process has its part alone"
    for count, mesh in ((1, "one"), (2, "1,2,1")):
        found = compute(count, f"{mesh}:restored", trained=f"{many['folder']}/2,2,1-lora")
        names = [name.removeprefix(f"{mesh}:restored ") for name in found if "trained" in name]
        assert names and found[f"{mesh}:restored step"] == 3
        for name in names:
            np.testing.assert_array_equal(found[f"{mesh}:restored {name}"], many[f"2,2,1:lora {name}"])


# Steps last long enough for a signal to be heard in the middle of a training; a name is free soon after a kill.
SLOWLY = """
import sys, time
from duet_jax import cli, leases, metering
leases.BEAT = 2.0
read = metering.Meter.read
metering.Meter.read = lambda self, report: (time.sleep(0.1), read(self, report))[1]
sys.exit(cli.main(sys.argv[1:]))
"""
STEPS = 40


def write_config(folder: Path) -> Path:
    walk = {"letters": 5, "length": 8, "examples": 40}
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**walk, "tags": tag}} for tag in "AB"]
    tree = {
        "name": "tiny",
        "budget": 16,
        "rounds": 2,
        "model": {"source": str(MODEL), "chat": False},
        "data": {"max_length": 48, "buckets": [48], "validation_fraction": 0.1, "domains": domains},
        "training": {"learning_rate": 0.001, "batch_size": 8, "epochs": STEPS // 2, "checkpoint_every": 15},
        "task": {"kind": "response_loss", "source": "synthetic:walk", "options": {**walk, "tags": "B"}},
    }
    tree["training"]["lora"] = {"rank": 2}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def study(folder: Path, count: int, bucket: str | None = None) -> Iterator[list[Any]]:
    """The study of `folder`, or in a bucket, run by so many processes, which then have no folder in common."""
    command = [sys.executable, "-c", SLOWLY, "run", str(folder / "config.yaml")]
    command += ["--study", str(folder / "study")] if bucket is None else ["--study", bucket, "--worker", "one"]
    address = f"localhost:{free_port()}"
    together = [["--cluster", address, "--processes", str(count), "--process", str(i)] for i in range(count)]
    caches = {} if bucket is None else {"XDG_CACHE_HOME": [str(folder / f"{count}-{i}") for i in range(count)]}
    with started([[*command, *flags] for flags in (together if count > 1 else [[]])], folder, **caches) as running:
        yield running


def whole(folder: Path, count: int, bucket: str | None = None) -> list[dict[str, Any]]:
    """The trials of a study that runs to its end."""
    with study(folder, count, bucket) as running:
        codes, said = end(running, folder)
    assert codes == [0] * count, "\n".join(said)[-5000:]
    return [json.loads(text) for _, text in sorted(at(bucket or folder / "study").read_all("trials").items())]


def same(trials: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(trials) == len(others) == 2
    for one, other in zip(trials, others, strict=True):
        assert (one["mixture"], one["seeds"], one["status"]) == (other["mixture"], other["seeds"], other["status"])
        np.testing.assert_allclose(one["training"]["loss"], other["training"]["loss"], **TOLERANCE)
        np.testing.assert_allclose(one["feedback"]["value"], other["feedback"]["value"], **TOLERANCE)


def steps(folder: Path, trial: int, noted: str = "study/metrics.jsonl") -> list[int]:
    """Steps of a trial that were taken, in the order they were noted, in the file of that pattern, if there is one."""
    path = next(folder.glob(noted), folder / "none")
    # The last line of a study that runs may be half written.
    whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row["step"] for row in rows if row["trial"] == trial]


def until(holds: Callable[[], bool], running: list[Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.02)


needs_model = pytest.mark.skipif(not MODEL.exists(), reason="the small model is not there")


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    write_config(folder)
    return whole(folder, 1)


@pytest.mark.slow
@needs_model
def test_one_process_stops_and_goes_on(by_one: list[dict[str, Any]], tmp_path: Path) -> None:
    write_config(tmp_path)
    with study(tmp_path, 1) as running:
        until(lambda: len(steps(tmp_path, 0)) > 3, running)
        running[0].send_signal(signal.SIGTERM)
        codes, said = end(running, tmp_path)
    assert codes == [STOPPED] and "stopped by SIGTERM; the same command goes on from here" in said[0]
    done = steps(tmp_path, 0)
    assert len(done) < STEPS
    trials = whole(tmp_path, 1)
    assert steps(tmp_path, 0) == list(range(1, STEPS + 1)), "no step is taken twice"
    assert [trial["feedback"] for trial in trials] == [trial["feedback"] for trial in by_one], "to the same bits"


@pytest.mark.slow
@needs_model
def test_a_study_is_stopped_killed_and_ended_by_other_numbers_of_processes(
    by_one: list[dict[str, Any]], tmp_path: Path
) -> None:
    """By two, of which one is told to stop; by four, of which one is killed; and by one."""
    write_config(tmp_path)
    with study(tmp_path, 2) as running:
        until(lambda: len(steps(tmp_path, 0)) > 3, running)
        running[1].send_signal(signal.SIGTERM)
        codes, said = end(running, tmp_path)
    assert codes == [STOPPED] * 2 and all("stopped by SIGTERM" in text for text in said), "\n".join(said)[-5000:]
    assert 3 < len(steps(tmp_path, 0)) < STEPS
    with study(tmp_path, 4) as running:
        until(lambda: len(steps(tmp_path, 1)) > 20, running)
        running[2].kill()
        began = time.monotonic()
        codes, said = end(running, tmp_path)
    assert time.monotonic() - began < 2 * processes.SILENCE
    assert steps(tmp_path, 0) == list(range(1, STEPS + 1)), "no step is taken twice"
    # JAX's runtime may end a process with its own words first, as an abort.
    for number in (0, 1, 3):
        assert codes[number] in (processes.LOST, -signal.SIGABRT), said[number][-5000:]
        assert "another process of this run has ended" in said[number] or "another task died" in said[number]
    assert "another process of this run has ended" in said[0]
    same(whole(tmp_path, 1), by_one)


@pytest.mark.slow
@needs_model
def test_a_study_in_a_bucket_goes_on_with_other_numbers_of_processes(
    by_one: list[dict[str, Any]], s3: str, tmp_path: Path
) -> None:
    """By two, of which one is killed; by four, of which one is told to stop; and by one; none sees another's folder."""
    write_config(tmp_path)

    def taken(count: int, trial: int) -> list[int]:
        """By the first one of so many processes, on whose machine they are noted."""
        return steps(tmp_path, trial, f"{count}-0/**/metrics.one.jsonl")

    with study(tmp_path, 2, s3) as running:
        until(lambda: len(taken(2, 0)) > 25, running)
        running[1].kill()
        codes, said = end(running, tmp_path)
    assert codes[0] in (processes.LOST, -signal.SIGABRT), said[0][-5000:]
    with study(tmp_path, 4, s3) as running:
        until(lambda: len(taken(4, 1)) > 3, running)
        running[3].send_signal(signal.SIGTERM)
        codes, said = end(running, tmp_path)
    assert codes == [STOPPED] * 4, "\n".join(said)[-5000:]
    assert taken(4, 0) == list(range(16, STEPS + 1)), "a killed process loses the steps since the last checkpoint"
    stopped = taken(4, 1)[-1]
    same(whole(tmp_path, 1, s3), by_one)
    assert taken(1, 1) == list(range(stopped + 1, STEPS + 1)), "none that was told to stop loses any"
    rows = Study.open(s3).metrics()
    assert [(row["trial"], row["step"]) for row in rows] == [
        (i, step) for i in range(2) for step in range(1, STEPS + 1)
    ]
    kept = {name.split("/")[1] for name in at(s3).listed("checkpoints")}  # type: ignore[attr-defined]
    assert len(kept) == 1, "of the best trial alone"


@pytest.mark.slow
@needs_model
def test_two_processes_run_a_study_alike(by_one: list[dict[str, Any]], tmp_path: Path) -> None:
    write_config(tmp_path)
    same(whole(tmp_path, 2), by_one)
