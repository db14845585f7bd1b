"""Shapes of models without their weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import pytest

from duet_jax.errors import ModelError
from duet_jax.models import llama
from duet_jax.models.published import read_shape

# As their makers count them.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    config = read_shape(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(llama.shapes(config))) == PARAMETERS[name]
    assert config.max_length == 131072 and config.rope_scaling is not None and not config.tie_embeddings


def test_of_a_folder_only_the_configuration_is_read(tmp_path: Path) -> None:
    raw = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 4}))
    assert read_shape(str(tmp_path)).num_layers == 2


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, file: str) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ModelError, match="config.json of somebody/something .* no route to the hub"):
        read_shape("somebody/something")
    with pytest.raises(ModelError, match="no config.json"):
        read_shape(str(tmp_path))
    with pytest.raises(ModelError, match="There is no model"):
        read_shape("./nowhere")
