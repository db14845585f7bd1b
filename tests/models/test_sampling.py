"""What is drawn has the distribution that the options say: by its definition and by chi-square tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from duet_jax.models.sampling import GREEDY, Sampling, draw

OPTIONS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(min_p=0.05),
    Sampling(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
]


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution by sorting, token after token."""
    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits - logits.max())
    kept = order if sampling.top_k is None else order[: sampling.top_k]
    if sampling.top_p < 1:
        share = weights[kept] / weights[kept].sum()
        before = np.concatenate([[0], np.cumsum(share)[:-1]])
        kept = kept[before < sampling.top_p]
    kept = kept[weights[kept] >= sampling.min_p]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [20, 700])
def test_draws_and_their_log_probabilities(sampling, size):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
    count = 20000
    uniforms = jax.random.uniform(jax.random.key(1), (count,))
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, size))
    tokens, log_probs, sampled = jax.jit(lambda x, u: draw(x, u, sampling))(rows, uniforms)
    right, model = expected(logits, sampling), expected(logits, Sampling())
    counts = np.bincount(tokens, minlength=size)
    assert not counts[right == 0].any()
    # Rare tokens together: the test needs some expected draws of each.
    often = right * count >= 10
    observed = np.append(counts[often], counts[~often].sum())
    theory = np.append(right[often], right[~often].sum()) * count
    filled = theory > 0
    assert stats.chisquare(observed[filled], theory[filled]).pvalue > 1e-4
    np.testing.assert_allclose(sampled, np.log(right[tokens]), atol=2e-5)
    np.testing.assert_allclose(log_probs, np.log(model[tokens]), atol=2e-5)


def test_the_inverse_is_that_of_the_cumulative_distribution():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    for uniform, token in [(0.0, 0), (0.05, 0), (0.15, 1), (0.45, 2), (0.7, 3), (0.9999999, 3)]:
        assert draw(logits, jnp.array([uniform]), Sampling())[0].item() == token


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, -1.0]])
    tokens, log_probs, sampled = draw(logits, jnp.array([0.9, 0.9]), GREEDY)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], atol=1e-6)
    assert sampled.tolist() == [0, 0]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12, unique=True),
    st.floats(0, 0.9999),
    st.integers(1, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_what_is_drawn_was_kept(values, uniform, top_k, top_p, min_p):
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.array(values, np.float32)
    token = draw(jnp.asarray(logits)[None], jnp.array([uniform]), sampling)[0].item()
    right = expected(logits, sampling)
    # Rounding of float32 may keep or drop a token whose mass before it is top_p but for 1e-6.
    looser = expected(logits, Sampling(top_k=top_k, top_p=min(top_p + 1e-5, 1.0), min_p=max(min_p - 1e-5, 0.0)))
    assert right[token] > 0 or looser[token] > 0


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1)]
)
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*; it must be"):
        Sampling(**{field: value})
