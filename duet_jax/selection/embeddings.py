"""A vector for every example: mean hidden states of the base model, or what a function of the user's makes of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from duet_jax._files import save_array
from duet_jax.config import SelectorConfig
from duet_jax.data import join
from duet_jax.distributed.processes import lead
from duet_jax.errors import DataError
from duet_jax.feedback.outside import load_function
from duet_jax.models import llama
from duet_jax.selection.passes import each
from duet_jax.selection.pool import Pool


def embeddings(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """Embeddings of the training examples, float32 `[examples, dim]` of each domain.

    By default the mean over all tokens of an example, prompt and response, of the base model's final hidden states,
    after the last normalisation. Otherwise `selector.embedding` names a function of a list of texts (prompt, line
    break, response) to an array `[texts, dim]`. With sentence-transformers it is three lines of a module:

        from sentence_transformers import SentenceTransformer
        def encode(texts):
            return SentenceTransformer("all-MiniLM-L6-v2").encode(texts)

    Args:
      pool: whose examples.
      selector: of a kind that looks for variety.
      folder: of all selections. Embeddings are kept in it by a hash of the examples and of the model, or of the
        function's name and its module's text, and serve all selectors; a run that was killed goes on from there.

    Raises:
      ConfigError: there is no such function.
      DataError: the function fails, or gives no finite numbers, one row a text; or the model's are not finite.
    """
    folder = folder / f"embeddings-{pool.embedding_digest(selector)[:16]}"
    if selector.embedding is None:
        found = _mean_states(pool, folder)
        what = "the mean hidden states of the model"
    else:
        kept, what = folder / "given.npy", f"what {selector.embedding} gives"
        lead(_keep_given, kept, selector.embedding, pool.texts)
        found = np.load(kept, allow_pickle=False)
    wrong = ~np.isfinite(found).all(axis=1)
    if wrong.any():
        name = [identifier for part in pool.train for identifier in part.ids][int(wrong.argmax())]
        raise DataError(f"{what} is not finite for the example '{name}'; embeddings must be finite numbers")
    return np.split(found, np.cumsum([len(part) for part in pool.train])[:-1])


def _keep_given(kept: Path, name: str, texts: list[str]) -> None:
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_array(kept, _given(name, texts))


def _mean_states(pool: Pool, folder: Path) -> np.ndarray:
    trainer, data = pool.trainer, join(pool.train)
    params = llama.frozen(trainer.load_base(), trainer.compute_dtype)

    @jax.jit
    def mean_states(params: llama.Params, tokens: Array, lengths: Array) -> Array:
        dtype, mesh = trainer.compute_dtype, trainer.mesh
        hidden = llama.hidden_states(trainer.model, params, tokens, compute_dtype=dtype, mesh=mesh)
        inside = jnp.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
        return jnp.sum(jnp.where(inside, hidden, 0), axis=1) / lengths[:, None]

    return each(
        pool,
        # A row of padding counts as one token, so that nothing is divided by 0.
        lambda batch, lengths: mean_states(params, batch.tokens, np.maximum(lengths, 1)),
        data,
        folder,
        "embeddings",
    )


def _given(name: str, texts: list[str]) -> np.ndarray:
    function = load_function(name, "selector.embedding")
    try:
        answer: Any = function(texts)
    except Exception as error:  # whatever a stranger's function raises
        raise DataError(f"selector.embedding: {name} failed: {type(error).__name__}: {error}") from error
    try:
        found = np.asarray(answer, np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"selector.embedding: {name} gave {type(answer).__name__}, which is no array of numbers: {error}"
        ) from None
    if found.ndim != 2 or len(found) != len(texts) or not found.shape[1]:
        raise DataError(
            f"selector.embedding: {name} gave an array of shape {list(found.shape)} for {len(texts)} texts; it must "
            f"give one row of numbers a text"
        )
    return found
