"""Online batch selection: which of a step's candidates are trained on, inside the compiled step.

Algorithm 1 of RHO-loss (Mindermann et al., ICML 2022, arXiv 2206.07137): the losses of a large batch under the current
model are compared with those of the same examples under a fixed reference, which are known before, and the best are
trained on. "davir" compares as DavIR does (arXiv 2310.13008), with the current model in the place of the base.

Where we differ from RHO-loss: our losses are of responses, as means over their tokens or as sums; and of a batch with
fewer than all candidates, the last one of an epoch, no larger share is chosen than of the others.

A choice keeps noise away as long as the model is behind its reference on the rest. Then the highest scores are those of
noise that the reference fits better, by chance or because it was trained on it ("davir"): train no longer than it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from duet_jax.distributed.place import map_rows, spread
from duet_jax.kernels.linear_cross_entropy import response_log_probs
from duet_jax.models import llama
from duet_jax.models import lora as adapters

if TYPE_CHECKING:
    from duet_jax.config import OnlineConfig, TrainingConfig

# Mean loss per token, nats, below which an example is known by heart and has no share of it left to lose.
SMALLEST_LOSS = 1e-6


class Choice(NamedTuple):
    """What of a step's candidates is trained on.

    Attributes:
      rows: int32 `[B]`, numbers of candidates, best first.
      kept: bool `[B]`; the others fill up a step that has fewer to train on.
      score: float32 scalar, mean of the kept ones'; nan if one of them has none.
    """

    rows: Array
    kept: Array
    score: Array


def choose(
    settings: TrainingConfig,
    model: llama.LlamaConfig,
    params: llama.Params,
    lora: adapters.Lora | None,
    tokens: Array,
    mask: Array,
    reference: Array,
    compute_dtype: Any,
    mesh: Mesh | None = None,
) -> Choice:
    """The best `batch_size` of a step's candidates under the current model.

    Args:
      settings: with online selection.
      model: shape of the network.
      params, lora: as they are before the step; adapters drop nothing here.
      tokens: int32 `[C, T]`; rows of padding stand after all others.
      mask: bool `[C, T]`, which tokens are scored; none in rows of padding.
      reference: float32 `[C]`, summed losses of the responses under the reference, nats.
      compute_dtype: dtype of matrix products.
      mesh: each forward pass is spread over its devices; None for one device.
    """
    assert settings.online is not None
    size = settings.micro_batch_size or settings.batch_size
    losses = _response_losses(model, params, lora, tokens, mask, size, compute_dtype, mesh)
    return best(settings.online, losses, reference, jnp.sum(mask, axis=1), settings.batch_size)


def best(config: OnlineConfig, losses: Array, reference: Array, counts: Array, batch_size: int) -> Choice:
    """The candidates of the highest scores; of equal ones the first, and those without a score last.

    Args:
      config, losses, reference, counts: as for `scores`; rows of padding stand after all others.
      batch_size: B. Of fewer than C candidates, the same share is chosen, rounded up.
    """
    found = scores(config, losses, reference, counts)
    values, rows = jax.lax.top_k(jnp.where(jnp.isnan(found), -jnp.inf, found), batch_size)
    wanted = -(jnp.count_nonzero(counts) * -batch_size // len(counts))
    kept = jnp.arange(batch_size) < wanted
    mean = jnp.mean(values, where=kept)
    return Choice(rows, kept, jnp.where(jnp.isfinite(mean), mean, jnp.nan))


def scores(config: OnlineConfig, losses: Array, reference: Array, counts: Array) -> Array:
    """What the rule chooses by, float32 `[C]`; nan for a candidate that it says nothing of.

    Args:
      config: the rule, and whether losses are means.
      losses: float32 `[C]`, summed loss of each response under the current model, nats.
      reference: float32 `[C]`, the same under the reference.
      counts: int32 `[C]`, scored tokens; 0 in rows of padding.
    """
    if config.token_mean:
        losses, reference = losses / counts, reference / counts
    found = losses - reference
    if config.rule == "davir":
        found = jnp.where(losses < SMALLEST_LOSS, jnp.nan, found / losses)
    return jnp.where(jnp.isfinite(found) & (counts > 0), found, jnp.nan)


def _response_losses(
    model: llama.LlamaConfig,
    params: llama.Params,
    lora: adapters.Lora | None,
    tokens: Array,
    mask: Array,
    size: int,
    compute_dtype: Any,
    mesh: Mesh | None,
) -> Array:
    """Summed loss of each response with its end of text, float32 `[C]`; only `size` rows are in memory at a time."""
    params = llama.frozen(params, compute_dtype)

    def of_some(part: tuple[Array, Array]) -> Array:
        tokens, mask = part
        hidden = llama.hidden_states(model, params, tokens, lora=lora, compute_dtype=compute_dtype, mesh=mesh)

        def of_rows(hidden: Array, tokens: Array, mask: Array, head: Array) -> Array:
            return -response_log_probs(hidden, head, tokens, mask, compute_dtype)

        return map_rows(mesh, of_rows, (hidden, tokens, mask), (llama.output_head(params),))

    parts = spread(mesh, tuple(x.reshape(-1, size, x.shape[1]) for x in (tokens, mask)), at=1)
    return jax.lax.map(of_some, parts).reshape(-1)
