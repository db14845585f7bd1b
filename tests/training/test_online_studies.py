"""Studies whose rounds choose their batches online, and configurations that make no sense for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_jax import config as configs
from duet_jax import duet, job
from duet_jax.errors import ConfigError
from duet_jax.study import Study


def study(**changes: Any) -> dict[str, Any]:
    walk = {"letters": 6, "length": 8, "examples": 120}
    return {
        "name": "online",
        "budget": 64,
        "rounds": 2,
        "model": {"scratch": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        "data": {
            "max_length": 16,
            "buckets": [16],
            "domains": [
                {"name": "a", "source": "synthetic:walk", "options": {**walk, "tags": "A"}},
                {"name": "noise", "source": "synthetic:walk", "options": {**walk, "noise": 1.0}},
            ],
        },
        "training": {
            "method": "full",
            "learning_rate": 0.01,
            "batch_size": 8,
            "checkpoint_every": 2,
            "online": {"candidates": 16},
        },
        "task": {"kind": "response_loss", "source": "synthetic:walk", "options": {**walk, "tags": "A", "examples": 16}},
        **changes,
    }


def test_a_study_with_online_selection_runs_and_goes_on(tmp_path: Path) -> None:
    config = configs.from_dict(study())
    assert configs.loads(configs.dump(config)) == config
    duet.run(config, tmp_path / "s", quiet=True)
    opened = Study.open(tmp_path / "s")
    metrics = opened.metrics()
    assert [trial.training["steps"] for trial in opened.trials()] == [4, 4], "64 candidates, 16 a step"
    assert len(metrics) == 8 and all(np.isfinite(row["score"]) for row in metrics)
    assert len(list((tmp_path / "s" / "selections").glob("losses-*.npz"))) == 1

    searched = {"settings": [{"field": "training.batch_size", "values": [4, 8]}]}
    small = configs.from_dict(study(search=searched))
    prepared = job.prepare(small, tmp_path / "s", lambda line: None)
    assert prepared.reference is not None and len(prepared.reference) == len(prepared.data)
    one, other = (prepared.trainer_for({"training.batch_size": size}) for size in (4, 8))
    assert one.step is not other.step
    assert one.step is prepared.trainer_for({"training.batch_size": 4}).step


@pytest.mark.parametrize(
    ("chosen", "data", "message"),
    [
        ({}, {}, "training.online.candidates is missing"),
        ({"candidates": 8}, {}, r"training.online.candidates is 8; it must be a multiple of batch_size \(8\), and"),
        ({"candidates": 20}, {}, "training.online.candidates is 20; it must be a multiple"),
        ({"candidates": 16, "rule": "loss"}, {}, "training.online.rule is 'loss'; it must be one of rho, davir"),
        ({"candidates": 16, "rule": "davir", "token_mean": False}, {}, "training.online.token_mean has no meaning"),
        ({"candidates": 16, "reference": ""}, {}, "training.online.reference is ''"),
        ({"candidates": 16}, {"validation_fraction": 0}, "training.online.reference is missing, and data.validation"),
    ],
)
def test_mistakes_are_told_by_their_field(chosen: dict, data: dict, message: str) -> None:
    whole = study()
    whole["training"]["online"] = chosen
    whole["data"] |= data
    with pytest.raises(ConfigError, match=message):
        configs.from_dict(whole)


def test_nothing_needs_to_be_held_out_for_a_reference_that_is_given_or_trained_on_the_pool() -> None:
    for needless in ({"candidates": 16, "reference": "package:x"}, {"candidates": 16, "rule": "davir"}):
        whole = study()
        whole["training"]["online"] = needless
        whole["data"]["validation_fraction"] = 0
        configs.from_dict(whole)


def test_every_batch_size_that_is_searched_must_divide_the_candidates() -> None:
    """12 is a multiple of 3, 4 and 6, and 5 lies between."""
    settings = {"settings": [{"field": "training.batch_size", "low": 3, "high": 6}]}
    whole = study(search=settings)
    whole["training"] |= {"batch_size": 6, "online": {"candidates": 12}}
    with pytest.raises(ConfigError, match="cannot be 5: online.candidates is 12; it must be a multiple of batch_size"):
        configs.from_dict(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 15}, r"budget is 15; it must be at least training.online.candidates \(16\)"),
        (
            {"search": {"fidelity": {"field": "budget", "levels": [8, 64]}}},
            r"search.fidelity.levels.0 is 8; it must be at least training.online.candidates \(16\)",
        ),
    ],
)
def test_a_round_has_a_step_of_candidates_at_least(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.from_dict(study(**changes))
    whole = study(budget=16, search={"fidelity": {"field": "training.epochs", "levels": [1, 2]}})
    whole["training"]["epochs"] = 2
    configs.from_dict(whole)


def test_fewer_examples_than_candidates_are_refused_before_there_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(budget=512)
    whole["training"]["online"] = {"candidates": 256}
    monkeypatch.setattr(job, "load", None)
    with pytest.raises(ConfigError, match="candidates is 256, but the domains have 216 training examples in all"):
        job.prepare(configs.from_dict(whole), tmp_path, lambda line: None)


def test_online_selection_is_for_studies(tmp_path: Path) -> None:
    whole = study()
    for name in ("budget", "rounds", "task"):
        del whole[name]
    path = tmp_path / "select.yaml"
    path.write_text(json.dumps(whole | {"count": 10, "selector": {"kind": "less"}}))
    with pytest.raises(ConfigError, match="training.online is of the rounds of a study"):
        configs.load_selection(path)
