"""What is noted of each step: rates, memory and compilations; trackers that hear of it; the profiler's trace."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import metering
from duet_jax.config import StudyConfig
from duet_jax.display import Display
from duet_jax.errors import ConfigError, StudyError
from duet_jax.metering import Compilations, Meter, Peak
from duet_jax.profiling import SKIPPED, TRACED, profiling
from duet_jax.study import Study
from duet_jax.tracking import Tracking
from duet_jax.training.reports import StepReport
from duet_jax.watching import Watch

REPORT = StepReport(
    step=2,
    steps=4,
    loss=1.5,
    gradient_norm=0.5,
    learning_rate=0.01,
    tokens=300,
    seconds=9.0,
    step_seconds=0.5,
    flops=4e9,
    devices=4,
)


def make_config(**changes: Any) -> StudyConfig:
    domains = [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]
    values = {"name": "small", "budget": 16, "rounds": 2, "model": {"scratch": {}}, "data": {"domains": domains}}
    values |= {"training": {"learning_rate": 0.001}, "task": {"kind": "external"}}
    return configs.from_dict({**values, **changes})


def make_study(folder: Path, **tracking: Any) -> Study:
    study = Study.create(folder / "study", make_config(tracking=tracking or None))
    study.new_trial(mixture={"a": 0.5, "b": 0.5}, counts={"a": 8, "b": 8}, proposal=None, seeds={}, worker="one")
    return study


def test_rates_of_a_step() -> None:
    compilations = Compilations(3, 0.25)
    meter = Meter(Peak(1e10, "published"), compilations)
    found = meter.read(REPORT)
    memory = found.pop("memory")
    assert found == {
        "tokens_per_second": 600.0,
        "mfu": 0.2,
        "peak_flops": 1e10,
        "peak": "published",
        "compilations": 3,
        "compile_seconds": 0.25,
    }
    assert isinstance(memory, int) and memory > 2**20
    assert meter.read(REPORT)["compilations"] == 0


def test_memory_is_of_the_device_where_it_keeps_books(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 12345, "bytes_in_use": 1})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert metering.highest_memory() == 12345


def test_compilations_are_counted_inside_and_only_there() -> None:
    with metering.watching_compilations() as seen:
        jax.jit(lambda x: x * 3 + 1)(np.arange(7.0))
        count, seconds = seen.take()
        assert count >= 1 and seconds > 0
        assert seen.take() == (0, 0.0)
    jax.jit(lambda x: x * 5 - 2)(np.arange(7.0))
    assert seen.take() == (0, 0.0)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v4", 275e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_published_peaks(kind: str, flops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert metering.find_peak("bfloat16") == Peak(flops, f"published for {kind}")


def test_a_measured_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "SIZE_CPU", 128)
    monkeypatch.setattr(metering, "SIZE", 128)
    metering._measured.cache_clear()
    peak = metering.find_peak(np.float32)
    metering._measured.cache_clear()
    assert peak.source == f"measured on {jax.devices()[0].device_kind}"
    assert 1e6 < peak.flops < 1e15


def test_a_step_is_noted_and_a_trial_that_was_taken_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, logged, steps = make_study(tmp_path), [], []
    trial = study.trials()[0]
    meter = Meter(Peak(1e10, "published"), Compilations())
    with Display(1, quiet=True) as display:
        watch = Watch(study, display, meter, Tracking(study), steps.append)
        on_step = watch.steps(trial, lambda step, values: logged.append((step, values)))
        on_step(REPORT)
        (row,) = study.metrics()
        noted = {"trial": 0, "worker": "one", "claim": 1, "step": 2, "tokens": 300, "flops": 4e9, "score": None}
        noted |= {"tokens_per_second": 600.0, "mfu": 0.2}
        assert {name: row[name] for name in noted} == noted
        assert (study.folder / "metrics.one.jsonl").is_file() and steps == [False]
        ((step, values),) = logged
        assert step == 2 and values["loss"] == 1.5 and values["mfu"] == 0.2
        study.claim(trial, "two")
        on_step(REPORT)
        monkeypatch.setattr("duet_jax.watching.BEAT", 0.0)
        with pytest.raises(StudyError, match="Trial 0 was taken over"):
            on_step(REPORT)


def scalars(path: Path) -> list[tuple[int, str, float]]:
    """Of an event file: records of length, its checksum, an event, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found, content = [], path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    study = make_study(tmp_path, kind="tensorboard")
    tracking = Tracking(study)
    with tracking.trial(study.trials()[0]) as log:
        log(1, {"loss": 1.5, "peak": "published", "score": None})
        log(2, {"loss": 0.5, "tokens": 3})
    (file,) = (study.folder / "tensorboard" / "0000").iterdir()
    assert scalars(file) == [(1, "loss", 1.5), (2, "loss", 0.5), (2, "tokens", 3.0)]


def test_nothing_is_opened_before_the_first_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    study = make_study(tmp_path, kind="tensorboard")
    with Tracking(study).trial(study.trials()[0]):
        pass
    assert not (study.folder / "tensorboard").exists()
    plain = make_study(tmp_path / "plain")
    with Tracking(plain).trial(plain.trials()[0]) as log:
        log(1, {"loss": 1.0})


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_of_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    fake = types.ModuleType(kind)
    fake.init = lambda **options: calls.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, fake)
    study = make_study(tmp_path, kind=kind, project="mixtures", options={"mode": "offline"})
    tracking, trial = Tracking(study), study.trials()[0]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), tracking.trial(trial) as log:
            log(1, {"step": 1, "loss": 1.5, "peak": "published"})
            log(2, {"loss": 0.5})
            raise KeyboardInterrupt
    options, *rest, finished = calls[:4]
    assert rest == [(1, {"loss": 1.5}), (2, {"loss": 0.5})] and finished == "finish"
    assert calls[4:] == calls[:4], "it goes on in the same run"
    assert (options["project"], options["group"], options["resume"]) == ("mixtures", "small", "allow")
    assert options["mode"] == "offline" and options["name"].startswith("small-0000-")
    assert options["config"]["mixture"] == trial.mixture and options["config"]["training"]["learning_rate"] == 0.001
    assert ("id" in options) == (kind == "wandb")
    moved = Study.open(study.folder.rename(tmp_path / "moved"))
    with Tracking(moved).trial(moved.trials()[0]) as log:
        log(3, {"loss": 0.25})
    assert calls[8]["name"] == options["name"], "it goes on in the same run wherever the study lies"


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb; install it with: pip install 'duet_jax\[wandb\]'"):
        Tracking(make_study(tmp_path, kind="wandb"))


@pytest.mark.parametrize(
    ("tracking", "sentence"),
    [
        ({"kind": "mlflow"}, "tracking.kind is 'mlflow'; it must be one of tensorboard, wandb, trackio"),
        ({"kind": "tensorboard", "project": "x"}, "tracking.project is of W&B and trackio; leave it out"),
        ({"kind": "wandb", "options": {"name": "x"}}, "tracking.options.name is given by the study; leave it out"),
    ],
)
def test_mistakes_in_tracking(tracking: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(tracking=tracking)
    assert sentence in str(caught.value)


def test_tracking_may_change_between_two_runs(tmp_path: Path) -> None:
    make_study(tmp_path)
    changed = make_config(tracking={"kind": "wandb", "project": "later"})
    assert Study.open(tmp_path / "study", changed).config.tracking == changed.tracking


def test_a_trace_of_a_few_steps(tmp_path: Path) -> None:
    said: list[str] = []
    with profiling(tmp_path / "trace", said.append) as on_step:
        for _ in range(SKIPPED + 1):
            jax.jit(lambda x: x + 1)(np.arange(3.0)).block_until_ready()
            on_step(False)
    assert said == [f"the profiler's trace is in {tmp_path / 'trace'}"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_a_trace_begins_once_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    with profiling(tmp_path, lambda line: None) as on_step:
        for number in range(3 * (SKIPPED + TRACED)):
            events.append(str(number))
            on_step(False)
    assert [event for event in events if not event.isdigit()] == ["start", "stop"]
    assert events.index("stop") - events.index("start") - 1 == TRACED
    events.clear()
    with profiling(None, lambda line: None) as on_step:
        for _ in range(3 * (SKIPPED + TRACED)):
            on_step(False)
    assert events == []


def test_a_trace_ends_with_its_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    with profiling(tmp_path, lambda line: None) as on_step:
        for training in range(3):
            for step in range(SKIPPED):
                events.append(f"{training}.{step}")
                on_step(step == SKIPPED - 1)
    # Not at the last step of the first training, but after the first one of the second, of which two are left.
    assert events == ["0.0", "0.1", "0.2", "1.0", "start", "1.1", "1.2", "stop", "2.0", "2.1", "2.2"]
