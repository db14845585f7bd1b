"""Eight virtual devices compute what one does: losses, trained factors, sketches, scores, replies and selections.

Sums over features and examples are added up in another order, so that values agree to a tolerance; that is stated with
each. What is counted, drawn or chosen is the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

SHARED, DATA, FSDP, TENSOR = "2,2,2", "8,1,1", "1,8,1", "1,1,8"
HERE = Path(__file__).parent


Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def compute(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Found]:
    """Gives what several parts of `spread_programs` find, from a process of eight devices."""

    @cache
    def run(*runs: str) -> Found:
        out = tmp_path_factory.mktemp("spread") / "found.npz"
        flags = (
            "--xla_force_host_platform_device_count=8",
            # All eight threads meet in every collective, on machines of few cores.
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        )
        environment = {
            **os.environ,
            "XLA_FLAGS": " ".join((os.environ.get("XLA_FLAGS", ""), *flags)),
            "JAX_PLATFORMS": "cpu",
        }
        code = [sys.executable, str(HERE / "spread_programs.py"), str(out), *runs]
        done = subprocess.run(code, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(out) as found:
            return dict(found)

    return run


def both(parts: Sequence[str], *meshes: str) -> list[str]:
    """Runs of parts on one device and on meshes."""
    return [f"{mesh}:{part}" for mesh in ("one", *meshes) for part in parts]


def pairs(found: Found, run: str, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays of one part whose names begin with `key`, on one device and on the mesh."""
    single = f"one:{run.split(':')[1]}"
    names = [name.removeprefix(single) for name in found if name.startswith(f"{single} {key}")]
    assert names
    return [(found[single + name], found[run + name]) for name in names]


def check_training(found: Found, run: str, share: float) -> None:
    for one, many in (*pairs(found, run, "losses"), *pairs(found, run, "trained")):
        # Adam divides by the root of a mean square: where a gradient is nearly 0, rounding counts more.
        np.testing.assert_allclose(many, one, atol=2e-4, rtol=2e-3)
    # The most that a device holds of the state; what is too small to be split, as norms are, lies on all.
    assert found[f"{run} share"] <= share
    assert found[f"{run} programs"] == 1


def check_sketches(found: Found, run: str) -> None:
    """Equal sketches have equal signs and places: one that differed would move whole entries of gradients."""
    for one, many in (*pairs(found, run, "sketches"), *pairs(found, run, "losses")):
        np.testing.assert_allclose(many, one, atol=2e-5 * np.abs(one).max())
    assert found[f"{run} share"] == 1 / 8


@pytest.fixture(scope="module")
def together(compute: Callable[..., Found]) -> Found:
    return compute(*both(["lora", "sketches"], SHARED), "one:choices")


def test_adapters_train_alike(together: Found) -> None:
    check_training(together, f"{SHARED}:lora", 0.26)


def test_sketches_are_alike_and_stay_with_their_examples(together: Found) -> None:
    check_sketches(together, f"{SHARED}:sketches")


def test_a_mesh_is_chosen_so_that_its_state_fits(together: Found) -> None:
    sizes = together["one:choices sizes"].tolist()
    assert sizes == [[8, 1, 1], [8, 1, 1], [4, 2, 1], [2, 4, 1], [1, 8, 1], [8, 1, 1]]


def test_what_a_mesh_cannot_share_is_refused(together: Found) -> None:
    batch, micro, heads, chosen, none = together["one:choices said"].tolist()
    assert (
        batch == "training.batch_size is 12; it must be a multiple of 8, the devices along data and fsdp of the mesh."
    )
    assert micro.startswith("training.micro_batch_size is 4; it must be a multiple of 8")
    assert heads == "mesh.tensor is 4; it must divide the 2 key and value heads of from scratch."
    # Without being told, as many devices are used as share the batch.
    assert chosen == "{'data': 4, 'fsdp': 1, 'tensor': 1}"
    # Where that is one, the model lies on it, and not on the host.
    assert none == "mesh: none, 1 of 8 devices; a training.batch_size that is a multiple of 8 uses all True"


@pytest.mark.slow
def test_a_checkpoint_in_an_object_store_is_that_of_every_mesh(compute: Callable[..., Found]) -> None:
    """To the same bits, where the mesh has it, and each piece is written once."""
    pytest.importorskip("obstore")
    found = compute(f"{SHARED}:shelved")
    assert found.pop(f"{SHARED}:shelved written") == 1
    assert len(found) == 4 and all(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [FSDP, SHARED])
def test_a_deployed_model_scores_and_writes_alike(compute: Callable[..., Found], mesh: str) -> None:
    found, run = compute(*both(["deployed"], FSDP, SHARED)), f"{mesh}:deployed"
    for one, many in pairs(found, run, "scores"):
        np.testing.assert_allclose(many, one, rtol=1e-5)
    for one, many in pairs(found, run, "harness"):
        np.testing.assert_allclose(many, one, rtol=1e-5)
    for one, many in pairs(found, run, "ids"):
        np.testing.assert_array_equal(many, one)
    for one, many in pairs(found, run, "log_probs"):
        np.testing.assert_allclose(many, one, atol=1e-4)
    assert found[f"{run} programs"] == found["one:deployed programs"] == 2


@pytest.fixture(scope="module")
def whole(compute: Callable[..., Found]) -> Found:
    return compute(*both(["full", "head", "moments"], FSDP), *both(["lora"], DATA))


@pytest.mark.slow
def test_all_parameters_train_alike(whole: Found) -> None:
    check_training(whole, f"{FSDP}:full", 0.14)


@pytest.mark.slow
def test_copies_of_the_model_train_alike(whole: Found) -> None:
    check_training(whole, f"{DATA}:lora", 1.0)


@pytest.mark.slow
def test_sketches_of_all_parameters_in_micro_batches(whole: Found) -> None:
    check_sketches(whole, f"{FSDP}:head")


@pytest.mark.slow
def test_sums_are_over_the_examples_of_all_devices(whole: Found) -> None:
    for one, many in pairs(whole, f"{FSDP}:moments", "moments"):
        np.testing.assert_allclose(many, one, atol=1e-5 * max(np.abs(one).max(), 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [DATA, FSDP, SHARED])
def test_no_gradient_is_moved(compute: Callable[..., Found], mesh: str) -> None:
    """Between devices go parameters, gathered, and activations, which have a dimension of tokens; nothing else."""
    tokens = {"11", "12"}
    for kind, shape in compute(*(f"{one}:hlo" for one in (DATA, FSDP, SHARED)))[f"{mesh}:hlo collectives"].tolist():
        sizes = shape.split(",")
        parameter = kind == "all-gather" and len(sizes) == 2 and set(sizes) <= {"16", "32", "48", "64", "96"}
        assert parameter or tokens & set(sizes), (kind, shape)


def check_selection(found: Found, run: str) -> None:
    single = f"one:{run.split(':')[1]}"
    one = found[f"{single} utility"]
    assert found[f"{run} spread"] and not found[f"{single} spread"]
    np.testing.assert_array_equal(found[f"{run} selected"], found[f"{single} selected"])
    np.testing.assert_allclose(found[f"{run} utility"], one, atol=2e-3 * np.abs(one).max())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["less", "ekfac"])
def test_a_selection_is_the_same(compute: Callable[..., Found], part: str) -> None:
    check_selection(compute(*both(["less", "ekfac"], SHARED)), f"{SHARED}:{part}")


@pytest.fixture(scope="module")
def by_features(compute: Callable[..., Found]) -> Found:
    return compute(*both(["wide_lora", "wide_sketches", "wide_less"], TENSOR))


@pytest.mark.slow
def test_devices_that_share_features_alone_train_alike(by_features: Found) -> None:
    check_training(by_features, f"{TENSOR}:wide_lora", 0.14)


@pytest.mark.slow
def test_sketches_of_devices_that_share_features_alone(by_features: Found) -> None:
    check_sketches(by_features, f"{TENSOR}:wide_sketches")


@pytest.mark.slow
def test_a_selection_of_devices_that_share_features_alone(by_features: Found) -> None:
    check_selection(by_features, f"{TENSOR}:wide_less")


@pytest.mark.slow
def test_steps_choose_the_same_examples(compute: Callable[..., Found]) -> None:
    found, run = compute(*both(["rho"], SHARED)), f"{SHARED}:rho"
    for one, many in pairs(found, run, "tokens"):
        np.testing.assert_array_equal(many, one)
    for key in ("losses", "score", "trained"):
        for one, many in pairs(found, run, key):
            np.testing.assert_allclose(many, one, atol=2e-4, rtol=2e-3)
    assert found[f"{run} programs"] == found["one:rho programs"] == 1
