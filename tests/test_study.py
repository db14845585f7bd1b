"""The study directory survives kills, holds against two processes, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import trial as trials
from duet_jax import workers
from duet_jax.config import StudyConfig
from duet_jax.errors import ConfigError, FeedbackError, StudyError
from duet_jax.storage import Folder, folder
from duet_jax.study import Study, Trial

HALVES = {"a": 0.5, "b": 0.5}


def make_config(rounds: int = 10, seed: int = 0) -> StudyConfig:
    return configs.from_dict(
        {
            "name": "small",
            "seed": seed,
            "budget": 16,
            "rounds": rounds,
            "model": {"scratch": {}},
            "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
            "training": {"learning_rate": 0.001},
            "task": {"kind": "external"},
        }
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "study", make_config())


def add(study: Study, mixture: dict[str, float] | None = None) -> Trial:
    chosen = mixture or HALVES
    counts = {name: round(16 * share) for name, share in chosen.items()}
    return study.new_trial(mixture=chosen, counts=counts, proposal=None, seeds={"sample": 7})


def test_a_trial_from_proposal_to_feedback(study: Study) -> None:
    trial = add(study)
    assert (trial.trial, trial.status, trial.stage) == (0, "pending", "proposed")
    trial = study.update(trial, stage="trained", training={"loss": 1.5})
    trial = study.tell(trial, 0.25, 0.1, details={"accuracy": 0.25}, independent=False)
    assert (trial.status, trial.stage) == ("completed", "scored")
    assert list(trial.times) == ["proposed", "trained", "told"]
    again = Study.open(study.folder)
    assert again.trials() == [trial] and again.config == study.config
    written = json.loads((study.folder / "trials" / "0000.json").read_text())
    assert written["feedback"] == {
        "value": 0.25,
        "stderr": 0.1,
        "independent": False,
        "details": {"accuracy": 0.25},
    }
    assert written["mixture"] == HALVES and written["error"] is None


def test_numbers_come_back_to_the_last_bit(study: Study) -> None:
    shares = {"a": 1 / 3, "b": 1 - 1 / 3}
    add(study, shares)
    study.tell(0, math.pi, math.e)
    assert study.trials()[0].mixture == shares
    mixtures, values, errors = study.observations()
    assert mixtures.tolist() == [[1 / 3, 1 - 1 / 3]] and values.tolist() == [math.pi] and errors == [math.e]


def test_observations_in_trial_order_with_their_own_noise_only(study: Study) -> None:
    empty, values, errors = study.observations()
    assert empty.shape == (0, 2) and values.shape == (0,) and errors == []
    for share in (0.0, 0.25, 1.0):
        add(study, {"b": 1 - share, "a": share})
    study.tell(2, 3.0, 0.5, independent=False)
    study.fail(1, "the loss is not finite")
    study.tell(0, 1.0, 0.25)
    mixtures, values, errors = study.observations()
    np.testing.assert_array_equal(mixtures, [[0.0, 1.0], [1.0, 0.0]])
    assert values.tolist() == [1.0, 3.0] and errors == [0.25, None]


@pytest.mark.parametrize(
    ("number", "value", "stderr", "sentence"),
    [
        (0, math.nan, None, "The feedback is nan; it must be a finite number"),
        (0, math.inf, None, "The feedback is inf; it must be a finite number"),
        (0, 1.0, -0.1, "The standard error of the feedback is -0.1; it must be finite and not negative"),
        (0, 1.0, math.nan, "The standard error of the feedback is nan"),
        (0, "good", None, "The feedback ('good', None) must be numbers"),
        (3, 1.0, None, "There is no trial 3 in"),
        (-1, 1.0, None, "There is no trial -1 in"),
        (1, 1.0, None, "Trial 1 has its feedback already: 0.5, told at"),
        (2, 1.0, None, "Trial 2 failed (no power) and takes no feedback"),
    ],
)
def test_feedback_that_cannot_be_recorded(
    study: Study, number: int, value: float, stderr: float | None, sentence: str
) -> None:
    for _ in range(3):
        add(study)
    study.tell(1, 0.5)
    study.fail(2, "no power")
    before = study.trials()
    with pytest.raises(FeedbackError) as caught:
        study.tell(number, value, stderr)
    assert str(caught.value).startswith(sentence)
    assert study.trials() == before


def test_feedback_for_an_empty_study(study: Study) -> None:
    with pytest.raises(FeedbackError, match="There is no trial 0 in .*; it has none yet"):
        study.tell(0, 1.0)


def test_only_a_pending_trial_fails_or_is_abandoned(study: Study) -> None:
    for _ in range(2):
        add(study)
    study.tell(0, 1.0)
    closed = study.abandon(1, "the disk is full")
    assert (closed.status, closed.error, list(closed.times)) == (
        "abandoned",
        "the disk is full",
        ["proposed", "abandoned"],
    )
    assert study.trials()[1] == closed
    with pytest.raises(FeedbackError, match="Trial 0 is completed and cannot fail any more"):
        study.fail(0, "late")
    with pytest.raises(FeedbackError, match="Trial 1 is abandoned and cannot be abandoned any more"):
        study.abandon(1, "again")
    with pytest.raises(FeedbackError, match=r"Trial 1 was abandoned \(the disk is full\) and takes no feedback"):
        study.tell(1, 1.0)
    with pytest.raises(FeedbackError, match="There is no trial 7"):
        study.fail(7, "late")


def test_settings_come_back_as_they_were(study: Study) -> None:
    settings = {"training.learning_rate": 1 / 3, "training.lora.targets": ("q", "v"), "training.lora.layers": None}
    made = study.new_trial(mixture=HALVES, counts={}, proposal=None, seeds={}, settings=settings)
    assert study.trials() == [made] and made.settings == settings
    path = study.folder / "trials" / "0000.json"
    old = json.loads(path.read_text())
    del old["settings"]
    path.write_text(json.dumps(old))
    assert study.trials()[0].settings == {}, "a file of an older version"


def test_a_diverged_training_is_known_by_its_loss(study: Study) -> None:
    add(study)
    assert not study.trials()[0].diverged
    assert not study.update(0, training={"loss": 1.0}).diverged
    study.update(0, training={"loss": math.nan})
    assert study.trials()[0].diverged


def test_sizes_are_noted_once(study: Study) -> None:
    assert study.sizes() is None
    study.note_sizes({"a": 7, "b": 9})
    study.note_sizes({"b": 9, "a": 7})
    assert Study.open(study.folder).sizes() == {"a": 7, "b": 9}
    with pytest.raises(
        StudyError, match="The domain b has 8 examples to choose from, but had 9 when the study in .* began; restore"
    ):
        study.note_sizes({"a": 7, "b": 8})
    (study.folder / "sizes.json").write_text('{"a": 7}')
    with pytest.raises(StudyError, match=r"sizes.json is damaged; restore it from a copy"):
        study.sizes()


def test_settings_in_words() -> None:
    settings = {"training.learning_rate": 3e-4, "training.lora.targets": ("q", "v"), "training.lora.layers": None}
    settings |= {"training.lora.rank": 8, "budget": 64, "training.schedule": "linear"}
    assert trials.words(settings) == {
        "learning_rate": "0.0003",
        "targets": "q,v",
        "layers": "all",
        "rank": "8",
        "budget": "64",
        "schedule": "linear",
    }


def test_feedback_during_training_is_not_taken_back(study: Study) -> None:
    trial = add(study)
    study.tell(0, 1.0)
    trial = study.update(trial, stage="trained", training={"loss": 1.0})
    assert (trial.status, trial.stage) == ("completed", "scored") and trial.training == {"loss": 1.0}


@pytest.mark.parametrize(
    ("mixture", "sentence"),
    [
        ({"a": 1.0}, r"has shares for 1 domains \(a\), not for a, b"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, r"has shares for 3 domains \(a, b, c\), not for a, b"),
        ({"a": 1.5, "b": -0.5}, "has the share -0.5 for b; a share is at least 0"),
        ({"a": math.nan, "b": 1.0}, "has the share nan for a"),
        ({"a": 0.5, "b": 0.4}, "has shares that sum to 0.9, not 1"),
    ],
)
def test_a_mixture_is_a_point_of_the_simplex(study: Study, mixture: dict[str, float], sentence: str) -> None:
    with pytest.raises(StudyError, match=sentence):
        study.new_trial(mixture=mixture, counts={}, proposal=None, seeds={})
    assert study.trials() == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ('{"trial": 0, "sta', "Unterminated string"),
        ("[]", "must be a mapping"),
        ('{"trial": 0}', "missing 4 required"),
        ("trial", "Expecting value"),
        ({"trial": 5}, "it says to be trial 5"),
        ({"status": "done"}, "its status is 'done'"),
        ({"status": "completed"}, "it is completed without feedback"),
        ({"feedback": {"value": 1.0, "stderr": None}}, "it is pending with feedback"),
        ({"status": "completed", "feedback": {"value": math.nan, "stderr": None}}, "The feedback is nan"),
        ({"status": "completed", "feedback": {"value": 1.0}}, "stderr"),
        ({"mixture": {"a": 0.5}}, "has shares for 1 domains"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_damaged_trial_is_named(study: Study, text: str | dict[str, object], problem: str) -> None:
    path = study.folder / "trials" / "0000.json"
    if isinstance(text, dict):
        text = json.dumps({**dataclasses.asdict(add(study)), **text})
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(StudyError) as caught:
        study.trials()
    assert str(caught.value).startswith(f"{path} is damaged (") and problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_trial_is_named(study: Study) -> None:
    for _ in range(3):
        add(study)
    (study.folder / "trials" / "0001.json").unlink()
    with pytest.raises(StudyError, match="0001.json is missing"):
        study.trials()


def test_open_and_create(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="There is no study in"):
        Study.open(tmp_path)
    with pytest.raises(StudyError, match="already holds a study"):
        Study.create(study.folder, make_config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(StudyError, match="holds other files, such as letter.txt"):
        Study.create(tmp_path / "other", make_config())
    with pytest.raises(StudyError, match="cannot be made a study directory: "):
        Study.create(tmp_path / "other" / "letter.txt" / "below", make_config())
    (study.folder / "config.yaml").write_text("name: 3\n")
    with pytest.raises(ConfigError, match="config.yaml: budget is missing"):
        Study.open(study.folder)


def test_another_configuration_is_refused_and_its_fields_are_named(study: Study) -> None:
    other = dataclasses.replace(make_config(seed=1), budget=17)
    with pytest.raises(StudyError, match="these fields differ: seed, budget. Give another --study"):
        Study.open(study.folder, other)
    assert Study.open(study.folder, make_config(rounds=12)).config.rounds == 12
    assert Study.open(study.folder).config.rounds == 12


CRASH = """
import os, signal, sys
from duet_jax.study import Study
study = Study.open(sys.argv[1])
# The new file is written beside the old one and the power goes off.
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
study.tell(0, 1.0)
"""


def test_a_crash_before_the_replacement_leaves_the_old_file(study: Study) -> None:
    trial = add(study)
    done = subprocess.run([sys.executable, "-c", CRASH, str(study.folder)])
    assert done.returncode == -signal.SIGKILL
    left = [path for path in (study.folder / "trials").iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1 and json.loads(left[0].read_text())["status"] == "completed"
    assert Study.open(study.folder).trials() == [trial]
    with workers.alone(study):
        assert not left[0].exists()
    assert study.tell(0, 2.0).feedback is not None


def test_a_failed_write_leaves_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = add(study)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            study.tell(0, 1.0)
    assert [path.name for path in (study.folder / "trials").iterdir()] == ["0000.json"]
    assert study.trials() == [trial]


def test_a_creation_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / ".config.yaml.x.tmp").write_text("name")
    assert Study.create(tmp_path, make_config()).trials() == []


def _tell_some(folder: Path, numbers: list[int]) -> None:
    study = Study.open(folder)
    for number in numbers:
        study.tell(number, float(number))
        while True:
            # Another one may be faster to open the next trial.
            with suppress(FileExistsError):
                add(study)
                break


def test_concurrent_tells_lose_nothing(study: Study) -> None:
    for _ in range(24):
        add(study)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_tell_some, args=(study.folder, list(range(i, 24, 4)))) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    trials = study.trials()
    assert len(trials) == 48
    told = {trial.trial: trial.feedback["value"] for trial in trials if trial.feedback is not None}
    assert told == {number: float(number) for number in range(24)}


HOLD = """
import sys, time
from duet_jax import workers
from duet_jax.study import Study
with workers.alone(Study.open(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_a_killed_one_lets_go(study: Study) -> None:
    add(study)
    command = [sys.executable, "-c", HOLD, str(study.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError) as caught, workers.alone(study):
            pass
        assert f"Another run holds {study.folder} (process {holder.pid} on " in str(caught.value)
        # Feedback comes in while the run goes on.
        assert study.tell(0, 1.0).status == "completed"
        holder.kill()
    held = study.storage
    assert isinstance(held, Folder)
    with workers.alone(study), held.editing(), held.editing():
        add(study)
    assert not (study.folder / "run.holder.json").exists()


def test_a_change_waits_for_the_other_but_not_for_ever(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "SECONDS_TO_WAIT", 0.2)
    began = time.monotonic()
    with Folder(study.folder).editing(), pytest.raises(StudyError, match="locked by another process for"):
        add(study)
    assert time.monotonic() - began < 5
    add(study)


def test_reading_works_on_a_copy_that_cannot_be_written(study: Study) -> None:
    add(study)
    (study.folder / "write.lock").unlink()
    files = set(study.folder.rglob("*"))
    opened = Study.open(study.folder)
    assert len(opened.trials()) == 1 and opened.metrics() == []
    assert set(study.folder.rglob("*")) == files


def test_metrics_keep_the_last_of_a_step_and_skip_torn_lines(study: Study) -> None:
    assert study.metrics() == []
    study.append_metrics([{"trial": 1, "step": 1, "loss": 3.0}, {"trial": 0, "step": 2, "loss": 2.0}])
    with (study.folder / "metrics.jsonl").open("a") as file:
        file.write('{"trial": 1, "step": 2, "lo')
    assert [row["loss"] for row in study.metrics()] == [2.0, 3.0]
    study.append_metrics([{"trial": 1, "step": 1, "loss": 2.5}, {"trial": 1, "step": 2, "loss": 1.0}])
    assert study.metrics() == [
        {"trial": 0, "step": 2, "loss": 2.0},
        {"trial": 1, "step": 1, "loss": 2.5},
        {"trial": 1, "step": 2, "loss": 1.0},
    ]


def test_a_directory_that_cannot_be_written_is_named(study: Study) -> None:
    (study.folder / "write.lock").unlink(missing_ok=True)
    (study.folder / "write.lock").mkdir()
    with pytest.raises(StudyError, match="study cannot be written: Is a directory"):
        add(study)
    (study.folder / "run.lock").mkdir()
    with pytest.raises(StudyError, match="run.lock cannot be written: Is a directory"), workers.alone(study):
        pass
