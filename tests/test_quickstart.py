"""The embedded default does what the README says: it finds the mixture that is known to be best."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duet_jax import config, duet
from duet_jax.study import Study

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


@pytest.mark.slow
def test_quickstart_finds_the_known_best_mixture(tmp_path):
    result = duet.run(config.load(CONFIG), tmp_path / "study", quiet=True)
    found = np.array([result.mixture[name] for name in ("cats", "dogs", "birds", "noise")])
    distance = 0.5 * np.abs(found - [0.5, 0.5, 0.0, 0.0]).sum()
    assert distance < 0.2, "total variation distance; the uniform mixture is 0.5 away"
    uniform = Study.open(tmp_path / "study").trials()[0]
    assert set(uniform.mixture.values()) == {0.25}
    assert result.value > uniform.feedback["value"] + 0.3
