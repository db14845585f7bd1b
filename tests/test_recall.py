"""From a configuration to the search that it describes."""

from __future__ import annotations

from typing import Any

import pytest

from duet_jax import config as configs
from duet_jax.errors import ConfigError
from duet_jax.recall import make_search, make_space
from duet_jax.search import Choice, Constraints, Fidelity, Group, Number, Search, Space, Subset


def make_config(search: dict[str, Any], **domain: Any) -> configs.StudyConfig:
    """A study of three domains; `domain` is of the first."""
    names = ("a", "b", "c")
    return configs.from_dict(
        {
            "name": "small",
            "budget": 100,
            "rounds": 2,
            "model": {"scratch": {}},
            "data": {"domains": [{"name": n, "source": "x.jsonl", **(domain if n == "a" else {})} for n in names]},
            "training": {"learning_rate": 0.001},
            "task": {"kind": "external"},
            "search": search,
        }
    )


def test_without_anything_it_is_the_default_search() -> None:
    assert make_search(make_config({})) == Search(num_domains=3, constraints=Constraints(floor=0.02))


def test_settings_and_fidelity() -> None:
    settings = [
        {"field": "training.learning_rate", "low": 1e-4, "high": 1e-2, "log": True},
        {"field": "training.lora.rank", "low": 4, "high": 64, "log": True},
        {"field": "training.schedule", "values": ["cosine", "linear"]},
        {"field": "training.lora.targets", "members": ["q", "k", "v"], "least": 2},
    ]
    fidelity = {"field": "budget", "levels": [10, 100], "costs": [1, 5]}
    space = make_space(make_config({"settings": settings, "fidelity": fidelity}))
    assert space == Space(
        (
            Number("training.learning_rate", 1e-4, 1e-2, log=True),
            Number("training.lora.rank", 4, 64, log=True, integer=True),
            Choice("training.schedule", ("cosine", "linear")),
            Subset("training.lora.targets", ("q", "k", "v"), least=2),
        ),
        Fidelity("budget", (10, 100), (1.0, 5.0)),
    )
    # What a trial's file brings back is what was proposed.
    middle = space.decode(space.middle())
    assert isinstance(middle["training.lora.rank"], int)
    assert space.decode(space.encode({**middle, "training.lora.targets": ["q", "k", "v"]})) == middle


def test_groups_are_told_by_name() -> None:
    group = {"domains": ["c", "a"], "minimum": 0.25, "maximum": 0.5}
    found = make_search(make_config({"groups": [group]})).constraints
    assert found == Constraints(groups=(Group((2, 0), 0.25, 0.5),), floor=0.02)
    with pytest.raises(ConfigError, match="^No mixture can be proposed under .*: Group 0 may have 0.5, but its minima"):
        make_search(make_config({"groups": [group]}, minimum=0.75))


def test_repetition_needs_sizes() -> None:
    config = make_config({"repetition": 2.0}, minimum=0.1, maximum=0.5)
    assert make_search(config).constraints.maximum == (0.5, 1.0, 1.0)
    sizes = {"a": 40, "b": 10, "c": 1000}
    assert make_search(config, sizes).constraints.maximum == (0.5, 0.2, 1.0)
    with pytest.raises(
        ConfigError, match=r"^No mixture can be proposed under .*: The minimum of domain 0, 0.1, is abo"
    ):
        make_search(config, {**sizes, "a": 4})
    with pytest.raises(ConfigError, match=r"2 epochs of 6 examples are less than the budget, 100\."):
        make_search(config, dict.fromkeys("abc", 2))
    assert make_search(make_config({}), sizes).constraints.maximum == ()


def test_prior() -> None:
    search = make_search(make_config({"prior": {"c": 0.25, "a": 0.75}, "penalty": 0.5}))
    assert search.prior == (0.75, 0.0, 0.25) and search.penalty == 0.5
