"""A model of random weights that benchmarks ask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duet_jax import models
from duet_jax.feedback import Deployed, Engine
from duet_jax.models import llama
from tests.feedback.benchmarks import CONFIG, TOKENIZER


@pytest.fixture(scope="session")
def tiny() -> Deployed:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), llama.shapes(CONFIG))
    model = models.Model(CONFIG, params, TOKENIZER, "tiny", "")
    return Deployed(Engine(model, False, (96,)), params)
