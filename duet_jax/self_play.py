"""Self-play (SPIN, Chen et al. 2024, arXiv 2401.01335): a model's own replies as the responses that are not preferred.

Replies are token ids from the sampler and stay ids: nothing is decoded and encoded again, so a reply's log-probability
is that of what was sampled. One that was not finished after `max_new_tokens` has no end of text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from duet_jax._files import save_arrays
from duet_jax.config import SpinConfig
from duet_jax.data import Encoded
from duet_jax.errors import DataError
from duet_jax.feedback import Deployed, Engine
from duet_jax.models.sampling import Sampling

# Prompts whose replies are written together are at least so many, and fill all rows so often.
PART, FILLS = 32, 4


def check_prompts(engine: Engine, examples: Encoded, spin: SpinConfig) -> None:
    """Raises a DataError where an example has no prompt, or prompt and reply do not fit the model's context."""
    empty = next((i for i, length in zip(examples.ids, examples.prompt_lengths, strict=True) if length == 0), None)
    if empty is not None:
        raise DataError(f"domain 'pairs': '{empty}' has no prompt to reply to; self-play needs one for every example.")
    engine.require_room(_prompts(examples), spin.max_new_tokens, "spin")


def replies(
    model: Deployed,
    examples: Encoded,
    spin: SpinConfig,
    identity: str,
    folder: Path,
    *,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> Encoded:
    """The examples with a reply of the model in the place of each response, from `folder` where they are there already.

    Args:
      model: that replies, at temperature 1.
      examples: to whose prompts; cut to the engine's longest bucket with their replies.
      spin: how.
      identity: what tells the model from all others.
      folder: of all replies; a run that was killed goes on from what is there.
      seed: of the sampler.
      on_progress: is told replies done and of how many.
    """
    whole = [identity, examples.digest, spin.max_new_tokens, spin.batch_size, seed]
    folder = folder / f"replies-{hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    found: list[np.ndarray] = []
    size = max(PART, FILLS * spin.batch_size)
    for number, start in enumerate(range(0, len(examples), size)):
        path, done = folder / f"part-{number:05d}.npz", len(found)
        if not path.is_file():
            samples = model.sample(
                _prompts(examples.take(np.arange(start, min(start + size, len(examples))))),
                Sampling(),
                samples=1,
                max_new_tokens=spin.max_new_tokens,
                batch_size=spin.batch_size,
                # Equal prompts in different parts get different replies.
                seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1),
                on_progress=lambda count, _, done=done: on_progress(done + count, len(examples)),  # type: ignore[misc]
            )
            save_arrays(path, {"ids": samples.ids[:, 0], "lengths": samples.lengths[:, 0]})
        with np.load(path, allow_pickle=False) as kept:
            found += [ids[:length] for ids, length in zip(kept["ids"], kept["lengths"], strict=True)]
        on_progress(len(found), len(examples))
    longest = model.engine.buckets[-1]
    pieces = zip(_prompts(examples).tokens, found, strict=True)
    whole_tokens = [np.concatenate([prompt, reply]).astype(np.int32) for prompt, reply in pieces]
    return Encoded(
        tuple(tokens[:longest] for tokens in whole_tokens),
        examples.prompt_lengths,
        examples.ids,
        tuple(len(tokens) > longest for tokens in whole_tokens),
    )


def _prompts(examples: Encoded) -> Encoded:
    parts = zip(examples.tokens, examples.prompt_lengths, strict=True)
    return Encoded(tuple(tokens[:length] for tokens, length in parts), examples.prompt_lengths, examples.ids)
