"""The selector `clear`: `duet select` takes the examples in whose responses the model is confident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from duet_jax import cli
from duet_jax import config as configs
from duet_jax.config import SelectorConfig
from duet_jax.curation.asking import confidence
from duet_jax.curation.respondent import ModelRespondent
from duet_jax.errors import ConfigError
from duet_jax.feedback import Deployed
from duet_jax.loading import load
from duet_jax.reading import load_all
from tests.small import SCRATCH, write_rows

CONFIDENCE: dict[str, Any] = {
    "samples": 2,
    "max_new_tokens": 4,
    "batch_size": 8,
    "sample_template": "{prompt}",
    "reflection_templates": ["{prompt} {answer}\n{options}"],
    "contradiction_template": "{prompt} {first} {second}\n{options}",
}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    domains = []
    for name in "ab":
        # A model from scratch knows the characters of its data: here the letters and Yes and No.
        rows = [{"id": f"{name}{i}", "prompt": f"ABC {i}", "response": f"Yes or No {name * i}"} for i in range(4)]
        domains.append({"name": name, "source": write_rows(tmp_path / f"{name}.jsonl", rows)})
    return {
        "name": "sure",
        "count": 3,
        "pooled": True,
        "model": {"scratch": SCRATCH},
        "training": {"learning_rate": 0.01, "batch_size": 4, "lora": {"rank": 2}},
        "data": {"validation_fraction": 0, "max_length": 192, "buckets": [32, 192], "domains": domains},
        "selector": {"kind": "clear", "rule": "top_k", "confidence": CONFIDENCE},
    }


def run(tmp_path: Path, tree: dict[str, Any], output: str) -> dict[str, list]:
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["select", str(tmp_path / "select.yaml"), "--output", str(tmp_path / output), "--quiet"]) == 0
    return pyarrow.parquet.read_table(tmp_path / output / "scores.parquet").to_pydict()


def test_the_surest_examples_are_chosen(tmp_path: Path, tree: dict[str, Any]) -> None:
    found = run(tmp_path, tree, "out")
    values = dict(zip(found["id"], found["utility"], strict=True))
    chosen = {i for i, selected in zip(found["id"], found["selected"], strict=True) if selected}
    assert chosen == set(sorted(values, key=lambda i: -values[i])[:3])
    config = configs.load_selection(tmp_path / "select.yaml")
    assert config.model is not None and config.training is not None and config.selector.confidence is not None
    domains = load_all(config.data, config.seed)
    loaded = load(config.model, config.data, config.training, domains, (), config.seed, lambda line: None)
    respondent = ModelRespondent(
        Deployed(loaded.engine, loaded.trainer.load_base()), "f", config.selector.confidence, config.seed
    )
    examples = [example for domain in domains for example in domain.train]
    expected = confidence(respondent, examples, config.selector.confidence, tmp_path / "again")
    np.testing.assert_allclose([values[example.id] for example in examples], expected.value, atol=1e-12)
    assert np.ptp(expected.value) > 0


def test_a_field_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="confidence has no meaning for a selector of kind 'random'"):
        SelectorConfig(confidence=configs.ConfidenceConfig())
    assert SelectorConfig(kind="clear").confidence == configs.ConfidenceConfig()
