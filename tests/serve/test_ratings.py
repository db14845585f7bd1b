"""Ratings on the disk: counted once, never lost once acknowledged, and told as they should be heard."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from duet_jax import cli
from duet_jax.errors import FeedbackError, StudyError
from duet_jax.recall import make_search, recall
from duet_jax.serve.ratings import Ratings, Vote, read_votes
from duet_jax.serve.telling import Rule, rated, raters, tell
from duet_jax.study import Study


def vote(key: str, stars: int = 3, trial: int = 0, **more) -> Vote:
    return Vote(key=key, trial=trial, stars=stars, **more)


def study_of(folder: Path, config, trials: int = 2) -> Study:
    study = Study.create(folder, config)
    for number in range(trials):
        mixture = {"A": 0.25 + 0.5 * number, "B": 0.75 - 0.5 * number}
        study.new_trial(mixture=mixture, counts={"A": 1, "B": 1}, proposal=None, seeds={}, stage="trained")
    return study


def test_a_vote_counts_once_and_a_later_one_takes_its_place(tmp_path) -> None:
    ratings = Ratings(tmp_path)
    first = vote("a", 2, rater="r", item="i", seconds=1.0)
    assert ratings.add([first, first]) == [True, False]
    assert ratings.add([vote("a", 2, rater="r", item="i", seconds=9.0)]) == [False]
    assert ratings.add([vote("b", 5, rater="r", item="i")]) == [True]
    assert ratings.add([vote("c", 1, rater="s", item="i"), vote("a", 1, trial=1)]) == [True, True]
    assert ratings.add([vote("d", 1), vote("e", 1)]) == [True, True]
    assert [v.key for v in ratings.votes()] == ["b", "c", "a", "d", "e"]
    # Another vote under a key that was used is refused, with all that came with it.
    with pytest.raises(FeedbackError, match="a key of its own"):
        ratings.add([vote("new"), vote("b", 4, rater="r", item="i")])
    assert [v.key for v in Ratings(tmp_path).votes()] == ["b", "c", "a", "d", "e"]
    # All of it is still in the file.
    assert len(ratings.path.read_text().splitlines()) == 6


def test_raters_are_left_out_and_taken_in_again(tmp_path) -> None:
    ratings, other = Ratings(tmp_path), Ratings(tmp_path)
    ratings.add([vote("a", rater="r"), vote("b", rater="s")])
    ratings.exclude("r", True)
    other.refresh()
    assert [v.rater for v in other.votes()] == ["s"] and len(other.all_votes()) == 2
    assert other.excluded == {"r"}
    other.exclude("r", False)
    ratings.refresh()
    assert len(ratings.votes()) == 2


def test_what_a_kill_tore_is_no_vote_and_swallows_none(tmp_path) -> None:
    ratings = Ratings(tmp_path)
    ratings.add([vote("a")])
    whole = ratings.path.read_bytes()
    ratings.path.write_bytes(whole + whole[:20])
    again = Ratings(tmp_path)
    assert [v.key for v in again.votes()] == ["a"]
    again.add([vote("b")])
    assert [v.key for v in Ratings(tmp_path).votes()] == ["a", "b"]
    lines = ratings.path.read_bytes().splitlines()
    ratings.path.write_bytes(lines[0][:30] + b"\n" + lines[1] + b"\n")
    with pytest.raises(StudyError, match="ratings.jsonl, line 1, is damaged"):
        Ratings(tmp_path)


def test_threads_and_processes_add_at_once(tmp_path) -> None:
    one, other = Ratings(tmp_path), Ratings(tmp_path)

    def work(ratings: Ratings, name: str) -> None:
        for i in range(20):
            ratings.add([vote(f"{name}{i}"), vote(f"shared{i}")])

    threads = [threading.Thread(target=work, args=(r, n)) for r, n in ((one, "a"), (one, "b"), (other, "c"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ratings(tmp_path).votes()) == 80


ADDER = """
import sys
from pathlib import Path
from duet_jax.serve.ratings import Ratings, Vote
ratings = Ratings(Path(sys.argv[1]))
for i in range(10**6):
    ratings.add([Vote(key=f"{sys.argv[2]}-{i}", trial=0, stars=1 + i % 5)])
    print(f"{sys.argv[2]}-{i}", flush=True)
"""


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path) -> None:
    acknowledged: list[str] = []
    for attempt in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", ADDER, str(tmp_path), str(attempt)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(20)]
            time.sleep(0.01 * attempt)
            os.kill(process.pid, signal.SIGKILL)
            acknowledged += process.stdout.read().split()
    keys = [v.key for v in Ratings(tmp_path).votes()]
    assert len(keys) == len(set(keys)) and set(acknowledged) <= set(keys)
    # Of each process at most one vote was on the disk whose word was not out yet.
    assert len(keys) - len(acknowledged) <= 3


def test_ratings_are_imported_all_or_none(tmp_path, people_config, capsys) -> None:
    study = study_of(tmp_path / "study", people_config())
    file = tmp_path / "ratings.jsonl"
    rows = [{"key": str(i), "trial": i % 2, "stars": 1 + i % 5, "rater": "r"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    for said in ("10 ratings added", "0 ratings added, 10 were there already"):
        assert cli.main(["ratings", "import", str(file), str(study.folder)]) == 0
        assert capsys.readouterr().out.strip() == said
    found = Ratings(study.folder).votes()
    assert [(v.trial, v.stars, v.source) for v in found] == [(i % 2, 1 + i % 5, "import") for i in range(10)]
    for line, reason in (
        ("{", "line 2, is not valid JSON"),
        ("[]", "line 2: A rating is []"),
        (
            '{"key": "x", "trial": 0, "stars": 9}',
            "line 2: A rating's stars is 9; it must be a whole number from 1 to 5",
        ),
        ('{"key": "x", "trial": 0}', "line 2: A rating has no stars"),
        ('{"key": "x", "trial": 4, "stars": 1}', "There is no trial 4"),
    ):
        file.write_text('{"key": "fine", "trial": 0, "stars": 1}\n' + line + "\n")
        assert cli.main(["ratings", "import", str(file), str(study.folder)]) == 2
        assert reason in capsys.readouterr().err
    assert len(Ratings(study.folder).votes()) == 10
    # A file that grows is imported again, also when some of its trials are told meanwhile.
    tell(study, Ratings(study.folder), 0)
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"key": "new", "trial": 1, "stars": 2}]))
    assert cli.main(["ratings", "import", str(file), str(study.folder)]) == 0
    assert capsys.readouterr().out.strip() == "1 ratings added, 10 were there already"
    file.write_text('{"key": "late", "trial": 0, "stars": 1}\n')
    assert cli.main(["ratings", "import", str(file), str(study.folder)]) == 2
    assert "takes no more ratings" in capsys.readouterr().err
    with pytest.raises(FeedbackError, match="nowhere.* cannot be read"):
        read_votes(tmp_path / "nowhere", 5)


def test_ratings_are_told_as_counts_and_heard_as_such(tmp_path, people_config) -> None:
    study = study_of(tmp_path / "study", people_config())
    ratings = Ratings(study.folder)
    ratings.add([vote(f"a{i}", stars) for i, stars in enumerate([1, 2, 2, 3])])
    ratings.add([vote(f"b{i}", stars, trial=1, rater=f"r{i}") for i, stars in enumerate([4, 5, 5])])
    assert tell(study, ratings, 0).feedback["ratings"] == [1, 2, 1, 0, 0]
    assert cli.main(["tell", str(study.folder), "1", "--ratings"]) == 0
    told = study.trials()[1].feedback
    assert told["ratings"] == [0, 0, 0, 1, 2] and told["value"] == pytest.approx(14 / 3)
    assert told["details"] == {"raters": 3.0}
    state, *_ = recall(make_search(study.config), study)
    assert state.feedback[:2].tolist() == [[1, 2, 1, 0, 0], [0, 0, 0, 1, 2]]
    # A number says nothing that such a search could hear.
    study.new_trial(mixture={"A": 0.5, "B": 0.5}, counts={"A": 1, "B": 1}, proposal=None, seeds={}, stage="trained")
    with pytest.raises(FeedbackError, match="told by the ratings they got"):
        study.tell(2, 4.0)
    with pytest.raises(FeedbackError, match="Trial 2 has no ratings"):
        tell(study, ratings, 2)
    assert cli.main(["tell", str(study.folder), "2", "4"]) == 2


def test_no_vote_comes_between_the_count_and_the_word(tmp_path, people_config, monkeypatch) -> None:
    study = study_of(tmp_path / "study", people_config())
    ratings, other = Ratings(study.folder), Ratings(study.folder)
    ratings.add([vote("a", 5)])
    said: list[str] = []

    def add() -> None:
        with pytest.raises(FeedbackError, match="takes no more"):
            other.add([vote("b", 1)], lambda number: rated(study, number))
        said.append("refused")

    late, whole = threading.Thread(target=add), Study.tell

    def slow(*arguments, **options):
        late.start()
        late.join(0.3)
        assert not said
        return whole(*arguments, **options)

    monkeypatch.setattr(Study, "tell", slow)
    assert tell(study, ratings, 0).feedback["ratings"] == [0, 0, 0, 0, 1]
    late.join()
    assert said == ["refused"] and [v.key for v in Ratings(study.folder).votes()] == ["a"]


@pytest.mark.parametrize("wrong", [[], [1, 2], [0] * 5, [-1, 2, 0, 0, 0], [1.5, 0, 0, 0, 0], [True, 0, 0, 0, 0]])
def test_ratings_that_are_none_are_not_told(tmp_path, people_config, wrong) -> None:
    study = study_of(tmp_path / "study", people_config())
    with pytest.raises(FeedbackError, match="must be 5 whole numbers"):
        study.tell(0, 3.0, ratings=wrong)
    assert study.trials()[0].status == "pending"


def test_of_several_votes_a_full_disk_keeps_none_and_a_vote_sent_again_is_synced(tmp_path, monkeypatch) -> None:
    ratings, write, sync = Ratings(tmp_path), os.write, os.fsync
    ratings.add([vote("a")])

    def full(descriptor, data):
        if len(data) < 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StudyError, match="No space left"):
        ratings.add([vote(str(i)) for i in range(8)])
    monkeypatch.setattr(os, "write", write)
    assert [v.key for v in Ratings(tmp_path).votes()] == [v.key for v in ratings.votes()] == ["a"]
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(sync(descriptor)))
    assert ratings.add([vote("a")]) == [False] and len(synced) == 1


def test_ratings_are_told_as_a_mean_less_what_raters_differ_by(tmp_path, people_config) -> None:
    study = study_of(tmp_path / "study", people_config(heard="mean"))
    ratings = Ratings(study.folder)
    # A strict rater had trial 0 more often, a mild one trial 1; both find the two alike.
    for trial, strict, mild in ((0, 12, 4), (1, 4, 12)):
        ratings.add([vote(f"s{trial}{i}", 2, trial, rater="strict", item=f"{trial}{i}") for i in range(strict)])
        ratings.add([vote(f"m{trial}{i}", 4, trial, rater="mild", item=f"{trial}{i}") for i in range(mild)])
    told = [tell(study, ratings, number).feedback for number in (0, 1)]
    assert abs(told[0]["value"] - told[1]["value"]) < 0.1 < 1.0 == 3.5 - 2.5
    assert all(0.1 < feedback["stderr"] < 0.3 for feedback in told)
    state, *_ = recall(make_search(study.config), study)
    assert state.feedback.stderrs[:2, 0].tolist() == [feedback["stderr"] for feedback in told]


def test_rules() -> None:
    assert Rule.parse("count=3").met([1, 2, 3], 5) and not Rule.parse("count=3").met([1, 2], 5)
    # Of n equal ratings the standard error is sqrt((1/n + 1/12) / n).
    assert Rule.parse("stderr=0.2").met([3] * 5, 5) is ((1 / 5 + 1 / 12) / 5 <= 0.04)
    assert Rule.parse("stderr=0.2").met([3] * 6, 5) is ((1 / 6 + 1 / 12) / 6 <= 0.04)
    assert not Rule.parse("stderr=0.2").met([], 5)
    for text in ("count=0", "count=1.5", "stderr=0", "stderr=inf", "stderr=nan", "often", ""):
        with pytest.raises(FeedbackError, match="it must be count=N"):
            Rule.parse(text)


def test_careless_raters_are_shown() -> None:
    votes = [vote(f"s{i}", 5, rater="same") for i in range(8)]
    votes += [vote(f"f{i}", 1 + i % 5, rater="fast", seconds=1.0, words=11 if i < 2 else 9) for i in range(4)]
    votes += [vote(f"g{i}", 1 + i % 5, rater="good", seconds=30.0, words=100) for i in range(9)]
    votes += [vote(f"n{i}", 3, rater="new") for i in range(7)] + [vote("anonymous", 1)]
    found = {rater.name: rater for rater in raters(votes)}
    assert {name: rater.doubt for name, rater in found.items()} == {
        "same": "always the same",
        "fast": "faster than reading",
        "good": "",
        "new": "",
    }
    assert (found["fast"].timed, found["fast"].fast) == (4, 2) and found["good"].mean == pytest.approx(25 / 9)
