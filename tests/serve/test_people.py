"""A whole study that people rate: the run waits, the server answers, ratings are told, the next mixture is trained."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from duet_jax import cli, duet
from duet_jax import config as configs
from duet_jax._decode import encode
from duet_jax.errors import ConfigError, StudyError
from duet_jax.serve.opening import Opener
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.telling import Rule
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study

BEST = 0.7


def kindness(share: float) -> float:
    """What an average rater thinks of a model that was trained with this share of A, in stars."""
    return 4.5 - 8 * (share - BEST) ** 2


def test_people_are_asked_instead_of_the_task(tmp_path, people_config, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(duet, "run", lambda config, *arguments: asked.append(config))
    file = tmp_path / "config.yaml"
    plain = people_config()
    tree = encode(plain) | {"task": {"kind": "response_loss", "source": "synthetic:walk"}}
    file.write_text(json.dumps(tree))
    assert cli.main(["run", str(file), "--feedback", "people", "task.people={open: 2}", "task.max_new_tokens=8"]) == 0
    (config,) = asked
    assert config.task.kind == "people" and config.task.people == configs.PeopleConfig(open=2)
    assert configs.loads(configs.dump(config)) == config
    for change, reason in (
        ({"people": {"stars": 1}}, "task.people.stars is 1; it must be from 2 to 10"),
        ({"people": {"open": 0}}, "task.people.open is 0; it must be at least 1"),
        ({"source": "x"}, "task.source has no meaning for a task of kind 'people'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            configs.from_dict(tree | {"task": {"kind": "people", **change}})
    with pytest.raises(ConfigError, match="task.people has no meaning"):
        configs.from_dict(tree | {"task": {"kind": "external", "people": {"stars": 2}}})


def test_only_studies_that_people_rate_are_served(tmp_path, people_config, capsys) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    tree = encode(people_config()) | {"task": {"kind": "external"}}
    Study.create(tmp_path / "study", configs.from_dict(tree))
    assert cli.main(["serve", str(tmp_path / "study")]) == 2
    assert "which people do not rate" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none")]) == 2
    assert cli.main(["serve", str(tmp_path / "study"), "--rule", "soon"]) == 2
    assert "it must be count=N" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "study"), "--port", "70000"]) == 2
    assert cli.main(["ratings", "import", str(tmp_path / "none"), str(tmp_path / "study")]) == 2


def test_tokens_stay_and_are_different(tmp_path) -> None:
    one, other = Tokens(tmp_path), Tokens(tmp_path)
    assert (one.owner, one.trial(3), one.rater("x")) == (other.owner, other.trial(3), other.rater("x"))
    assert len({one.owner, one.tester, one.trial(0), one.trial(1)}) == 4
    assert (tmp_path / "serve.secret").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["serve.secret"]


@pytest.mark.slow
def test_a_panel_of_known_bias_and_noise_finds_the_best_mixture(tmp_path, people_config, make_house) -> None:
    from starlette.testclient import TestClient

    from duet_jax.serve.app import build

    config, folder = people_config(rounds=7, open=2), tmp_path / "study"
    ended: list[duet.Result] = []
    run = threading.Thread(target=lambda: ended.append(duet.run(config, folder, quiet=True)), daemon=True)
    run.start()
    wait(lambda: Study.exists(folder) and any(trial.stage == "trained" for trial in Study.open(folder).trials()), run)
    study, ratings, said = Study.open(folder), Ratings(folder), []
    opener = Opener(study, ratings, Rule(count=24), 4, said.append)
    app, tokens = build(study, ratings, opener), Tokens(folder)
    opener.start()
    rng, bias = np.random.default_rng(0), np.random.default_rng(1).normal(0, 0.5, 12)
    try:
        # Somebody talks to a model that has been trained, and rates it as anybody does.
        client = TestClient(app, headers={"origin": "http://testserver"})
        client.get("/", params={"token": tokens.tester}).raise_for_status()
        wait(lambda: opener.open, run)
        conversation = client.post("/api/conversations", json={}).json()["conversation"]
        answer = client.post(f"/api/conversations/{conversation}/messages", json={"text": "A:a"})
        assert json.loads(answer.text.splitlines()[-1]) == {"answer": "0"}
        vote = {"key": "page", "stars": 4, "answer": "0"}
        client.post(f"/api/conversations/{conversation}/ratings", json=vote).raise_for_status()
        done: set[int] = set()
        while run.is_alive():
            trials = study.trials()
            ready = [t for t in trials if (t.status, t.stage) == ("pending", "trained") and t.trial not in done]
            # Nobody rates one before the next is there, so that two are open at once.
            if len(ready) == 2 or len(trials) == 7:
                for trial in ready:
                    rate(client, tokens, trial, rng, bias)
                    done.add(trial.trial)
            time.sleep(0.2)
    finally:
        opener.stop()
    (result,) = ended
    told = study.trials()
    assert [trial.status for trial in told] == ["completed"] * 7 and result.waiting == ()
    assert all(sum(trial.feedback["ratings"]) >= 24 for trial in told)
    assert told[1].times["proposed"] < told[0].times["told"]
    assert result.mixture is not None
    reached = kindness(result.mixture["A"])
    assert reached > 4.5 - 0.25 and reached > kindness(0.5)
    assert any("is told" in line for line in said)
    owner = TestClient(app)
    owner.get("/owner", params={"token": tokens.owner}).raise_for_status()
    report = owner.get("/owner/report")
    assert "Score by round" in report.text and "script" not in report.headers["content-security-policy"]
    assert (folder / "best_model").is_dir()


def rate(client: Any, tokens: Tokens, trial: Any, rng: np.random.Generator, bias: np.ndarray) -> None:
    """Each rater gives two ratings, which are not all counted before the rule is met."""
    headers = {"authorization": f"Bearer {tokens.trial(trial.trial)}"}
    for i, rater in enumerate(np.repeat(np.arange(len(bias)), 2)):
        star = int(np.clip(np.rint(kindness(trial.mixture["A"]) + bias[rater] + rng.normal(0, 0.7)), 1, 5))
        vote = {"key": str(i), "trial": trial.trial, "stars": star, "rater": f"r{rater}", "item": str(i)}
        found = client.post("/api/ratings", json=vote, headers=headers)
        if found.status_code == 409:
            assert "is completed and takes no more" in found.text
            return
        assert found.status_code == 200, found.text


def wait(condition: Any, run: threading.Thread) -> None:
    """Until it holds, as long as the run lives."""
    while not condition():
        assert run.is_alive()
        time.sleep(0.2)


def test_a_trial_without_its_checkpoint_is_named(tmp_path, people_config) -> None:
    study = Study.create(tmp_path / "study", people_config())
    trial = study.new_trial(
        mixture={"A": 0.5, "B": 0.5}, counts={"A": 32, "B": 32}, proposal=None, seeds={"sample": 0}, stage="trained"
    )
    with pytest.raises(StudyError, match="Trial 0 of .* has no trained model"):
        duet.deployed(None, study, trial)  # type: ignore[arg-type]
