"""Workers of a study in an object store: their names and heartbeats, whoever sleeps, ends or comes back."""

from __future__ import annotations

import time
from typing import Any

import pytest

from duet_jax import leases, workers
from duet_jax.errors import Overtaken, StudyError
from duet_jax.study import Study
from tests.storage.remote import Watched, add, make_config, objects, until


def test_a_worker_is_gone_when_it_ended_or_is_silent(
    studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    monkeypatch.setattr(workers, "SILENCE", 0.3)
    study, other = studies
    with workers.join(study, "one") as one:
        assert one.gone(None) and one.gone("one") and one.gone("never there")
        with workers.join(other, "two"):
            assert not one.gone("two")
            time.sleep(0.4)
            assert not one.gone("two"), "its heart beats"
            monkeypatch.setattr(leases, "BEAT", 600.0)
            until(lambda: one.gone("two"))
            monkeypatch.setattr(leases, "BEAT", 0.01)
        assert one.gone("two")
    with workers.join(study, "one") as one, workers.join(other, "two"):
        assert not one.gone("two"), "both are back, without waiting"


def test_a_name_that_is_used_is_refused(studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch) -> None:
    # A beat may be late by the two others that it takes to be gone.
    monkeypatch.setattr(leases, "BEAT", 0.3)
    said: list[str] = []
    with workers.join(studies[0], "one") as one:
        with pytest.raises(StudyError, match=r"s3://bucket/study has a worker one \(process \d+ on .*another name"):
            workers.join(studies[1], "one", said.append).__enter__()
        one.check()
    assert len(said) == 1 and "the study knows a worker one (process" in said[0]


def test_a_name_that_is_silent_is_taken_over(studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.02)
    study, other = studies
    asleep = leases.Lease(study.storage, "one")
    asleep.take(lambda line: None)
    trial = add(study, "one")
    with workers.join(other, "one") as one:
        asleep.beat()
        one.check()
        with pytest.raises(StudyError, match="has a worker one"):
            asleep.check()
        asleep.beat(ended=True)
        one.check()
        assert one.gone(trial.worker), "what it had under this name is to be taken up"
        claimed = other.claim(trial, "one")
        with pytest.raises(Overtaken):
            study.tell(trial, 1.0)
    assert study.tell(claimed, 2.0).claim == 2


def test_of_two_that_take_over_a_name_one_gets_it(
    place: Watched, studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.02)
    dead, two = (leases.Lease(study.storage, "one") for study in studies)
    dead.take(lambda line: None)
    place.before = [lambda: two.take(lambda line: None)]
    three = leases.Lease(studies[0].storage, "one")
    with pytest.raises(StudyError, match="has a worker one"):
        three.take(lambda line: None)
    two.check()


def test_a_store_that_heeds_no_conditions_is_refused(memory: Any) -> None:
    class Careless(Watched):
        def put(self, *args: Any, mode: Any = None, **options: Any) -> Any:
            return self.store.put(*args, **options)

    study = Study.create(objects(Careless(memory)), make_config())
    with pytest.raises(StudyError, match="s3://bucket/study heeds no conditions on writes"):
        workers.join(study, "one").__enter__()


def test_a_heart_beats_on_after_the_store_was_out_of_reach(
    place: Watched, studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)

    def lost() -> None:
        raise StudyError("no network")

    with workers.join(studies[0], "one"):
        place.before = [lost] * 3
        until(lambda: not place.before)
        seen = leases.heartbeat(studies[1].storage, "one")
        until(lambda: leases.heartbeat(studies[1].storage, "one") != seen)
