"""Replies of a model to prompts and their rewards, in files: what was sampled or judged once is not lost.

samples-00000.npz   replies to the first prompts: ids, lengths, both log-probabilities, texts
rewards-00000.npy   their rewards
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from duet_jax._files import save_array, save_arrays
from duet_jax.config import PolicyConfig
from duet_jax.data import Encoded, Example
from duet_jax.distributed.processes import lead
from duet_jax.feedback import Deployed
from duet_jax.feedback.rewards import Reward
from duet_jax.influence.build import Progress
from duet_jax.models.generate import Samples
from duet_jax.models.sampling import Sampling

# Prompts whose replies are written together, at least; and how often all rows are filled, so that few stand idle at the
# end of a part.
PART, FILLS = 32, 4
# The published code of NICE samples so, whatever its temperature.
COMPAT = {"top_k": 50, "top_p": 0.95}


class Questions(NamedTuple):
    """Prompts to reply to.

    Attributes:
      prompts: as the model gets them.
      examples: that rewards of the replies look at.
      beginnings: of the replies, which the prompts end with; "" for most.
    """

    prompts: Encoded
    examples: tuple[Example, ...]
    beginnings: tuple[str, ...]


class Judged(NamedTuple):
    """Replies, and their rewards float64 `[prompts, samples]`."""

    samples: Samples
    rewards: np.ndarray


def sampling(policy: PolicyConfig) -> Sampling:
    """The distribution that tokens are drawn from."""
    chosen = {"top_k": policy.top_k, "top_p": policy.top_p, "min_p": policy.min_p}
    return Sampling(policy.temperature, **(COMPAT if policy.compat else chosen))


def judged(
    model: Deployed,
    questions: Questions,
    policy: PolicyConfig,
    reward: Reward,
    external: Samples | None,
    folder: Path,
    *,
    seed: int,
    on_progress: Progress,
) -> Judged:
    """Replies to all prompts with their rewards, from `folder` where they are there already.

    A reply depends on the seed, its prompt and its number alone; equal prompts in one part get different ones.

    Args:
      model: that replies.
      questions: what to, at least one.
      policy: how.
      reward: of replies.
      external: replies to take in place of the model's, or None.
      folder: of these replies alone.
      seed: of the sampler.
      on_progress: is told replies done and of how many.

    Raises:
      FeedbackError: a reply cannot be rewarded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    each = policy.samples if external is None else external.ids.shape[1]
    done, of = 0, len(questions.prompts) * each
    found, rewards = [], []

    def more(replies: int, _: int) -> None:
        on_progress(done + replies, of)

    size = max(PART, -(-FILLS * policy.batch_size // each))
    for number, start in enumerate(range(0, len(questions.prompts), size)):
        rows = np.arange(start, min(start + size, len(questions.prompts)))
        if external is None:
            path = folder / f"samples-{number:05d}.npz"
            if not lead(path.is_file):
                sampled = model.sample(
                    questions.prompts.take(rows),
                    sampling(policy),
                    samples=policy.samples,
                    max_new_tokens=policy.max_new_tokens,
                    batch_size=policy.batch_size,
                    seed=seed,
                    stop_strings=policy.stop,
                    on_progress=more,
                )
                lead(_save, path, sampled)
            found.append(_load(path))
        else:
            found.append(_take(external, rows))
        rewards.append(lead(_rewards, folder / f"rewards-{number:05d}.npy", found[-1], questions, rows, reward))
        done += len(rows) * each
        on_progress(done, of)
    return Judged(_join(found), np.concatenate(rewards))


def _rewards(path: Path, samples: Samples, questions: Questions, rows: np.ndarray, reward: Reward) -> np.ndarray:
    if not path.is_file():
        pairs = [
            (questions.beginnings[row] + text, questions.examples[row])
            for row, texts in zip(rows, samples.texts, strict=True)
            for text in texts
        ]
        values = reward([text for text, _ in pairs], [example for _, example in pairs])
        save_array(path, values.reshape(samples.lengths.shape))
    return np.load(path, allow_pickle=False)


def _save(path: Path, samples: Samples) -> None:
    arrays = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
    # As bytes of JSON: NumPy's own texts lose zeros at their end.
    arrays["texts"] = np.frombuffer(json.dumps(samples.texts).encode(), np.uint8)
    save_arrays(path, arrays)


def _load(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as kept:
        arrays = dict(kept)
    texts = json.loads(arrays.pop("texts").tobytes())
    return Samples(**arrays, texts=tuple(map(tuple, texts)))


def _take(samples: Samples, rows: np.ndarray) -> Samples:
    """The replies to some of the prompts."""
    arrays = {f.name: getattr(samples, f.name)[rows] for f in dataclasses.fields(samples) if f.name != "texts"}
    return Samples(**arrays, texts=tuple(samples.texts[row] for row in rows))


def _join(parts: list[Samples]) -> Samples:
    """The replies to the prompts of all parts, one after the other."""
    names = [field.name for field in dataclasses.fields(Samples) if field.name != "texts"]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Samples(**arrays, texts=tuple(texts for part in parts for texts in part.texts))
