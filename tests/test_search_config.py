"""What is searched besides the mixture: checked before any compute is spent, and applied to a trial's training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from duet_jax import config as configs
from duet_jax._search_config import configured, is_whole
from duet_jax.errors import ConfigError

SMALLEST: dict[str, Any] = {
    "name": "small",
    "budget": 16,
    "rounds": 2,
    "model": {"scratch": {}},
    "data": {"domains": [{"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"}]},
    "training": {"learning_rate": 0.001},
    "task": {"kind": "response_loss", "source": "test.jsonl"},
}


def searching(*settings: dict[str, Any], **training: Any) -> configs.StudyConfig:
    """A study that searches these settings, below training."""
    full = [{**one, "field": f"training.{one['field']}"} for one in settings]
    own = {**SMALLEST["training"], **training}
    return configs.from_dict({**SMALLEST, "training": own, "search": {"settings": full}})


@pytest.mark.parametrize(
    ("setting", "training", "sentence"),
    [
        ({"field": "learning_rates"}, {}, "field is 'training.learning_rates'; it must be one of training.learning_ra"),
        ({"field": "checkpoint_every", "values": [1, 2]}, {}, "field is 'training.checkpoint_every'; it must be one o"),
        ({"field": "method", "values": ["full", "lora"]}, {}, "field is 'training.method'; it must be one of training"),
        ({"field": "epochs"}, {}, "field is 'training.epochs'; it needs one of low and high, values, and members."),
        ({"field": "epochs", "values": []}, {}, "field is 'training.epochs'; it needs one of low and high, values,"),
        ({"field": "epochs", "low": 1, "high": 2, "values": [1]}, {}, "field is 'training.epochs'; it needs one of"),
        ({"field": "epochs", "low": 1}, {}, "high is missing; a range has both ends."),
        ({"field": "epochs", "high": 1}, {}, "low is missing; a range has both ends."),
        ({"field": "epochs", "low": 2, "high": 2}, {}, "high is 2.0; it must be greater than low (2)."),
        (
            {"field": "epochs", "low": 1.5, "high": 4},
            {},
            "low is 1.5; it must be a whole number, as training.epochs is",
        ),
        ({"field": "learning_rate", "low": 0, "high": 1, "log": True}, {}, "low is 0.0; it must be greater than 0 on"),
        ({"field": "epochs", "values": [1, 2], "log": True}, {}, "log has no meaning without low and high; leave it"),
        ({"field": "epochs", "values": [1, 2], "least": 2}, {}, "least has no meaning without members; leave it out."),
        ({"field": "lora.targets", "members": ["q"], "least": 2}, {}, "least is 2; it must be from 0 to the number of"),
        ({"field": "schedule", "low": 1, "high": 2}, {}, "field is 'training.schedule', which is no number; give valu"),
        ({"field": "schedule", "members": ["linear"]}, {}, "field is 'training.schedule', which is no list; give valu"),
        ({"field": "schedule", "values": ["cosin", "linear"]}, {}, "values.0 is 'cosin'; it must be one of cosine, li"),
        ({"field": "schedule", "values": ["linear"]}, {}, "values is ['linear']; it must be a list of at least two."),
        ({"field": "learning_rate", "values": [1, 1.0]}, {}, "values is [1.0, 1.0]; it must be a list of at least one"),
        ({"field": "epochs", "values": [1, 2.5]}, {}, "values.1 is 2.5; it must be a whole number."),
        ({"field": "lora.targets", "members": ["q", "x"]}, {}, "members.1 is 'x'; it must be one of q, k, v,"),
        (
            {"field": "lora.rank", "low": 0, "high": 8},
            {},
            "field is 'training.lora.rank', which cannot be 0: rank is 0; it must be at least 1.",
        ),
        (
            {"field": "lora.dropout", "low": 0, "high": 1},
            {},
            "field is 'training.lora.dropout', which cannot be 1.0: dropout is 1.0; it must be in [0, 1).",
        ),
        (
            {"field": "lora.targets", "members": ["q", "v"], "least": 0},
            {},
            "field is 'training.lora.targets', which cannot be (): targets is []; it must be a list of at least one,",
        ),
        (
            {"field": "batch_size", "low": 4, "high": 8},
            {"micro_batch_size": 2},
            "field is 'training.batch_size', which cannot be 5: micro_batch_size is 2; it must be a divisor of batch",
        ),
        (
            {"field": "lora.rank", "low": 1, "high": 8},
            {"method": "full"},
            "field is 'training.lora.rank', which has no meaning for the method 'full'.",
        ),
    ],
)
def test_a_setting_that_cannot_be_searched(setting: dict[str, Any], training: dict[str, Any], sentence: str) -> None:
    good = {"field": "warmup_fraction", "low": 0, "high": 1}
    with pytest.raises(ConfigError) as caught:
        searching(good, setting, **training)
    assert str(caught.value).startswith(f"search.settings.1.{sentence}"), str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_a_field_is_searched_once() -> None:
    epochs = {"field": "epochs", "values": [1, 2]}
    with pytest.raises(ConfigError, match=r"^search.settings.1.field is 'training.epochs' a second time;"):
        searching(epochs, epochs)
    fidelity = {"field": "training.epochs", "levels": [1, 2]}
    search = {"settings": [{**epochs, "field": "training.epochs"}], "fidelity": fidelity}
    tree = {**SMALLEST, "search": search, "training": {"learning_rate": 0.1, "epochs": 2}}
    with pytest.raises(ConfigError, match=r"^search.fidelity.field is 'training.epochs', which is among the settings;"):
        configs.from_dict(tree)


def test_settings_have_the_types_of_their_fields_and_load_back_equal() -> None:
    config = searching(
        {"field": "learning_rate", "values": ["1e-3", 1]},
        {"field": "lora.rank", "low": 1, "high": 8, "log": True},
        {"field": "lora.layers", "values": [None, [0, 1]]},
        {"field": "lora.targets", "members": ["q", "v"], "least": 2},
        {"field": "schedule", "values": ["linear", "constant"]},
    )
    rate, rank, layers, targets, _ = config.search.settings
    assert rate.values == (0.001, 1.0) and layers.values == (None, (0, 1)) and targets.members == ("q", "v")
    assert rank.low == 1 and is_whole(rank, config.training)
    assert configs.loads(configs.dump(config)) == config
    fidelity = configs.FidelityConfig(field="budget", levels=(4, 16))
    search = dataclasses.replace(config.search, fidelity=fidelity, prior={"a": 0.25, "b": 0.75}, penalty=0.5)
    config = dataclasses.replace(config, search=search)
    assert configs.loads(configs.dump(config)) == config


def test_a_trial_has_its_own_training() -> None:
    training = configs.from_dict(SMALLEST).training
    settings = {"training.learning_rate": 0.5, "training.lora.rank": 3, "budget": 4}
    own = configured(training, settings)
    assert (own.learning_rate, own.lora.rank, own.lora.alpha, own.epochs) == (0.5, 3, training.lora.alpha, 1)
    assert configured(training, {}) == training


def test_one_domain_is_enough_with_settings() -> None:
    tree = {**SMALLEST, "data": {"domains": SMALLEST["data"]["domains"][:1]}}
    with pytest.raises(ConfigError, match="or of one with search.settings"):
        configs.from_dict(tree)
    tree["search"] = {"settings": [{"field": "training.epochs", "low": 1, "high": 2}]}
    assert len(configs.from_dict(tree).data.domains) == 1


def test_shares_that_are_frozen_sum_to_one_but_for_rounding() -> None:
    domains = [{"name": f"d{i}", "source": "x.jsonl", "minimum": 0.1, "maximum": 0.1} for i in range(10)]
    assert len(configs.from_dict({**SMALLEST, "data": {"domains": domains}}).data.domains) == 10
