"""A study in an object store: nothing is told twice or lost, whoever is fast, late or dead."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import cli, duet, kept, leases, proposals, workers
from duet_jax.display import Display
from duet_jax.errors import FeedbackError, Overtaken, StudyError
from duet_jax.report import write_report
from duet_jax.study import Study
from duet_jax.training.checkpoint import Checkpoints
from duet_jax.trial import Trial
from tests.storage.remote import HALVES, Watched, add, make_config, objects


def test_what_one_process_writes_the_other_reads(studies: tuple[Study, Study]) -> None:
    one, other = studies
    trial = add(one, "one")
    assert other.trials() == [trial] and other.config == one.config
    told = other.tell(0, 2.0, 0.5)
    assert one.trials() == [told] and one.completed() == [told]
    one.note_sizes({"a": 7, "b": 9})
    with pytest.raises(StudyError, match="the study in s3://bucket/study began"):
        other.note_sizes({"a": 7, "b": 8})
    with pytest.raises(FeedbackError, match="There is no trial 1 in s3://bucket/study; its trials are 0 to 0"):
        other.tell(1, 1.0)


def test_a_study_is_begun_once(memory: Any, place: Watched) -> None:
    assert not Study.exists(objects(memory))
    with pytest.raises(StudyError, match="There is no study in s3://bucket/study"):
        Study.open(objects(memory))
    # Another process is faster between this one's look and its write.
    place.before = [lambda: Study.create(objects(memory), make_config(rounds=5))]
    begun = Study.begin(objects(place), make_config(rounds=5))
    assert begun.config.rounds == 5 and not place.before
    with pytest.raises(StudyError, match="these fields differ: budget"):
        Study.begin(objects(memory), make_config(budget=17))
    assert Study.begin(objects(memory), make_config(rounds=7)).config.rounds == 7
    assert Study.open(objects(place)).config.rounds == 7


def test_a_place_with_other_objects_is_no_study(memory: Any) -> None:
    memory.put("letter.txt", b"dear")
    with pytest.raises(StudyError, match="holds other files, such as letter.txt"):
        Study.begin(objects(memory), make_config())


def test_a_number_is_given_to_one_trial(place: Watched, studies: tuple[Study, Study]) -> None:
    one, other = studies
    place.before = [lambda: add(other, "other")]
    with pytest.raises(FileExistsError):
        add(one, "one")
    assert [trial.worker for trial in one.trials()] == ["other"]


def test_a_change_that_was_overtaken_is_made_on_what_is_there(place: Watched, studies: tuple[Study, Study]) -> None:
    one, other = studies
    trial = add(one)
    place.before = [lambda: other.tell(0, 1.0)]
    changed = one.update(trial, stage="trained", training={"loss": 2.0})
    assert (changed.status, changed.stage, changed.training) == ("completed", "scored", {"loss": 2.0})
    assert changed.feedback is not None and changed.feedback["value"] == 1.0 and other.trials() == [changed]


def test_of_two_tellers_one_is_heard(place: Watched, studies: tuple[Study, Study]) -> None:
    one, other = studies
    trial = add(one)
    place.before = [lambda: other.tell(0, 1.0)]
    with pytest.raises(FeedbackError, match="has its feedback already: 1.0"):
        one.tell(trial, 2.0)
    assert [trial.feedback["value"] for trial in one.trials() if trial.feedback] == [1.0]


def test_a_holder_that_slept_between_look_and_write_is_refused(place: Watched, studies: tuple[Study, Study]) -> None:
    one, other = studies
    trial = add(one, "one")
    reports: list[Callable[[Trial], Any]] = [
        lambda trial: one.tell(trial, 1.0),
        lambda trial: one.update(trial, stage="trained"),
        lambda trial: one.abandon(trial, "not finite"),
        lambda trial: one.claim(trial, "one"),
    ]
    for report in reports:
        # The report has read the trial as its own, and another worker claims it before the write.
        place.before = [lambda: other.claim(other.trials()[0], "two")]
        with pytest.raises(Overtaken, match="Trial 0 of s3://bucket/study was taken over by two"):
            report(trial)
        trial = one.trials()[0]
        assert trial.worker == "two" and trial.status == "pending" and trial.stage == "proposed"


def test_a_trial_that_was_told_is_not_claimed(studies: tuple[Study, Study]) -> None:
    one, other = studies
    trial = add(one, "gone")
    other.tell(0, 1.0)
    with pytest.raises(Overtaken, match="Trial 0 is completed by now"):
        one.claim(trial, "one")


def stub(study: Study, search: Any, trials: list[Trial]) -> dict[str, Any]:
    return {"mixture": HALVES, "counts": {"a": 8, "b": 8}, "settings": {}, "proposal": None, "seeds": {}}


def test_workers_do_all_rounds_and_no_more(
    memory: Any, studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process opens trials as fast as it can."""
    monkeypatch.setattr(proposals, "_propose", stub)
    monkeypatch.setattr(proposals, "PAUSE", 0.001)
    monkeypatch.setattr(proposals, "LONG_PAUSE", 0.001)
    rounds, done, failures = 30, [], []

    def work(name: str) -> None:
        try:
            study = Study.open(objects(memory), make_config(rounds=rounds))
            with workers.join(study, name) as me, Display(rounds, quiet=True) as display:
                while (trial := proposals.next_trial(study, None, me, display)) is not None:  # type: ignore[arg-type]
                    trial = study.update(trial, stage="trained", training={"loss": 1.0})
                    study.tell(trial, float(trial.trial))
                    done.append(trial.trial)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sorted(done) == list(range(rounds))
    trials = studies[0].trials()
    assert [trial.status for trial in trials] == ["completed"] * rounds and {trial.claim for trial in trials} == {1}


def test_a_claim_goes_on_from_the_checkpoints_of_another_machine(
    studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, other = studies
    first = add(one, "one")
    state = {"x": jnp.arange(8.0)}
    with Checkpoints(kept.checkpoints(one, first), {}) as checkpoints:
        checkpoints.save(5, state, {"loss": 2.0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    second = other.claim(first, "two")
    kept.inherit(other, second)
    with Checkpoints(kept.checkpoints(other, second), {}) as checkpoints:
        found = checkpoints.restore({"x": jnp.zeros(8)})
        assert found is not None and (found[0], found[2]) == (5, {"loss": 2.0})
        np.testing.assert_array_equal(found[1]["x"], np.arange(8.0))
        checkpoints.save(6, found[1], {"loss": 1.0})
    assert not kept.checkpoints(one, first).exists() and kept.checkpoints(other, second).exists()
    told = [other.update(second, stage="trained", training={"loss": 1.0})]
    kept.forget(other, told, keep=0)
    assert kept.checkpoints(other, second).exists()
    kept.forget(other, told, keep=1)
    assert other.storage.listed("checkpoints") == []  # type: ignore[attr-defined]


def test_steps_of_a_trained_trial_are_shared(
    studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, other = studies
    trial = add(one, "one")
    one.append_metrics([{"trial": 0, "step": 1, "worker": "one", "claim": 1, "loss": 2.0}])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert other.metrics() == []
    one.share_metrics(trial)
    assert other.metrics() == one.metrics() and other.metrics()[0]["loss"] == 2.0
    trial = other.claim(trial, "two")
    other.append_metrics([{"trial": 0, "step": 1, "worker": "two", "claim": 2, "loss": 1.0}])
    other.share_metrics(trial)
    assert [row["loss"] for row in one.metrics()] == [1.0], "the last claim counts"


def test_the_best_model_is_published_as_a_whole(studies: tuple[Study, Study]) -> None:
    one, other = studies
    assert kept.published(other) is None
    (one.folder / "best_model").mkdir()
    (one.folder / "best_model" / "config.json").write_text("{}")
    kept.publish(one, 3)
    assert kept.published(other) == 3 and other.storage.read("best_model/0003/config.json")[0] == b"{}"
    other.storage.write("best_model.json", b"{")
    with pytest.raises(StudyError, match="best_model.json is damaged; delete it"):
        kept.published(one)


def test_who_publishes_the_best_model(studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duet, "LONG_PAUSE", 0.01)
    monkeypatch.setattr(leases, "BEAT", 0.01)
    study, other = studies
    for _ in range(2):
        study.update(add(study, "two"), training={"loss": 1.0})
    known = [0]
    monkeypatch.setattr(duet, "best", lambda study, search: duet.Result(None, None, None, known[0]))

    def publish(number: int) -> None:
        known[0] = number
        other.storage.write("best_model.json", b'{"trial": %d}' % number)

    def ours(study: Study, me: workers.Worker) -> int | None:
        return duet._to_export(study, None, 0, me, display)  # type: ignore[arg-type]

    with workers.join(study, "one") as one, Display(3, quiet=True) as display:
        with workers.join(other, "two") as two:
            assert ours(other, two) == 0
            threading.Timer(0.1, publish, [0]).start()
            assert ours(study, one) is None, "two is there, and writes it"
            other.storage.write("best_model.json", b'{"trial": 5}')
            threading.Timer(0.1, publish, [1]).start()
            assert ours(study, one) is None, "two has found a better one meanwhile, and wrote that"
            known[0] = 0
        assert ours(study, one) == 0, "two has ended, and wrote another one"


@pytest.mark.parametrize(
    ("worker", "task", "sentence"),
    [
        (
            None,
            {"kind": "command", "command": ["true"]},
            "gs://bucket/x has no locks for a run alone; .* --worker NAME",
        ),
        (
            "one",
            {"kind": "external"},
            "kind 'external' are handed over in the study's folder, which gs://bucket/x is not",
        ),
    ],
)
def test_runs_that_need_a_folder(worker: str | None, task: dict[str, Any], sentence: str) -> None:
    pytest.importorskip("obstore")
    with pytest.raises(StudyError, match=sentence):
        duet.run(make_config(task=task), "gs://bucket/x", quiet=True, worker=worker)


@pytest.mark.parametrize("kind", ["random", "less"])
def test_several_hosts_that_score_need_one_folder_for_it(
    memory: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen: list[bool] = []
    # None: not all processes see it.
    monkeypatch.setattr(duet, "shared", lambda folder: seen.append(folder.is_dir()))
    asked = pytest.raises(StudyError, match="set XDG_CACHE_HOME to a folder") if kind == "less" else nullcontext()
    with asked:
        study = duet._begin(objects(memory), make_config(selector={"kind": kind}))
        assert study.remote
    assert seen == [True] * (kind == "less")
    assert not list(objects(memory).local.iterdir())


def test_a_report_needs_a_file(studies: tuple[Study, Study], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="s3://bucket/study is no folder for the report; give a file: --output FILE"):
        write_report(studies[0].storage)
    assert "small" in write_report(studies[0].storage, tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_commands_on_a_server(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study.create(s3, make_config())
    add(study)
    assert cli.main(["tell", s3, "0", "0.5"]) == 0 and cli.main(["info", s3, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("trial 0: feedback 0.5 recorded, 1 of 3 rounds have feedback\n")
    found = json.loads(printed[printed.index("{") :])
    assert found["study"] == s3 and found["trials"][0]["feedback"]["value"] == 0.5
    assert cli.main(["report", s3, "--output", str(tmp_path / "page.html")]) == 0
    assert cli.main(["tell", s3, "0", "1"]) == 2 and "feedback already: 0.5" in capsys.readouterr().err


WALK = {"letters": 6, "length": 8, "examples": 300}


@pytest.mark.slow
def test_a_run_on_three_machines(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first one ends in its first training, the second one goes on, and for the third one nothing is left."""
    domain = {"source": "synthetic:walk", "options": WALK}
    config = make_config(
        budget=96,
        model={"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        data={"max_length": 16, "buckets": [16], "domains": [{**domain, "name": "a"}, {**domain, "name": "b"}]},
        training={"method": "full", "learning_rate": 0.01, "batch_size": 8, "checkpoint_every": 2},
        task={"kind": "response_loss", "source": "synthetic:walk", "options": {**WALK, "examples": 32}},
        search={"initial": 3},
    )
    alone = duet.run(config, tmp_path / "folder", quiet=True)
    expected = Study.open(tmp_path / "folder").trials()

    def run(machine: str) -> duet.Result:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        return duet.run(config, objects(memory), quiet=True, worker=machine)

    real = Study.append_metrics

    def stop(self: Study, rows: Any) -> None:
        real(self, rows)
        if rows[0]["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Study, "append_metrics", stop)
        run("one")
    assert run("two") == alone
    study = Study.open(objects(memory))
    trials = study.trials()
    assert [trial.feedback for trial in trials] == [trial.feedback for trial in expected]
    assert [(trial.worker, trial.claim) for trial in trials] == [("two", 2), ("two", 1), ("two", 1)]
    rows = study.metrics()
    assert [(row["trial"], row["step"]) for row in rows] == [(i, step) for i in range(3) for step in range(1, 13)]
    assert [row["worker"] for row in rows] == ["one"] * 4 + ["two"] * 32, "no step is taken twice"
    assert run("three") == alone
    assert not list(tmp_path.glob("three/**/metrics*")) and kept.published(study) == alone.trial
    model = study.storage.read(f"best_model/{alone.trial:04d}/model.safetensors")[0]
    assert model == (tmp_path / "folder" / "best_model" / "model.safetensors").read_bytes()
