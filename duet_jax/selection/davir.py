"""DavIR and RHO-loss: examples of which a reference model knows what the base model does not.

DavIR (Zhou et al., arXiv 2310.13008, section 3) takes the share of an example's loss that training on the whole pool
removes, `(L0 - Lr) / L0`, with the losses of its response under the base model and under the reference. That it is a
share takes the response's length out of it. RHO-loss (Mindermann et al., ICML 2022, arXiv 2206.07137, equation 3) is
`L0 - Lr` with a reference that is trained on what matters, here the targets or held-out examples; theirs compares
each large batch with the model in training, here the base model stands in its place and the pool is scored once.
`training.online` has both in the training itself.

Where we differ: an example whose base loss is below `LEAST` or whose losses are not finite is never chosen, and told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from duet_jax._files import save_arrays
from duet_jax.config import SelectorConfig
from duet_jax.data import Encoded, join
from duet_jax.distributed.processes import lead
from duet_jax.errors import DataError
from duet_jax.selection.losses import DETAILS, Losses, base_losses
from duet_jax.selection.pool import Pool
from duet_jax.selection.reference import given_losses, trained_losses
from duet_jax.training.online import SMALLEST_LOSS as LEAST

# Culprits that a line names.
NAMED = 5


def davir(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """`(L0 - Lr) / L0`, or over `Lr`, float64 `[examples]` of each domain.

    Args:
      pool: what is scored and, without a given reference, trained on.
      selector: of kind "davir".
      folder: gets `details.npz`: `base_loss` and `reference_loss`, sums in nats, and `response_tokens` of all domains'
        examples in order. Losses and trainings stand beside it, for other selectors too.

    Raises:
      DataError: no example of a domain can be scored.
      ModelError: the given reference does not fit.
    """
    data = join(pool.train)
    watched = {"the pool": data, "held-out examples": join(pool.validation)}
    base, reference = _compare(pool, selector, data, data, watched, folder)
    scores = davir_scores(base, reference, selector.denominator)
    return _told(pool, selector, data, base, reference, scores, folder)


def rho(pool: Pool, selector: SelectorConfig, folder: Path) -> list[np.ndarray]:
    """`L0 - Lr`, means over tokens or sums, float64 `[examples]` of each domain.

    Args:
      pool: what is scored. Without a given reference, one is trained on all its targets, or on the held-out examples
        of all domains where there are none.
      selector: of kind "rho".
      folder: as for `davir`.

    Raises:
      DataError: no example of a domain can be scored.
      ModelError: the given reference does not fit.
    """
    data, teachers = join(pool.train), join([examples for _, examples in pool.sets])
    watched = {"the pool": data, "what it is trained on": teachers}
    base, reference = _compare(pool, selector, data, teachers, watched, folder)
    return _told(pool, selector, data, base, reference, rho_scores(base, reference, selector.token_mean), folder)


def davir_scores(base: Losses, reference: Losses, denominator: Literal["base", "reference"] = "base") -> np.ndarray:
    """Shares of the base model's losses that the reference does not have, or their ratios to what it has.

    Args:
      base, reference: losses of the same examples.
      denominator: both give the same order. A reference's loss below `LEAST` a token counts as that.

    Returns:
      float64 `[n]`: -inf where a loss is not finite, or the base's below `LEAST` a token.
    """
    known = np.isfinite(base.sums) & np.isfinite(reference.sums) & (base.sums >= LEAST * base.tokens)
    divisor = base.sums if denominator == "base" else np.maximum(reference.sums, LEAST * reference.tokens)
    return _where(known, base.sums - np.where(known, reference.sums, 0), divisor)


def rho_scores(base: Losses, reference: Losses, token_mean: bool = True) -> np.ndarray:
    """Losses that the reference does not have, a token or in all, float64 `[n]`; -inf where one is not finite."""
    known = np.isfinite(base.sums) & np.isfinite(reference.sums)
    return _where(known, base.sums - np.where(known, reference.sums, 0), base.tokens if token_mean else 1)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of the ranks of two sets of numbers `[n]`, equal ones sharing their mean rank; nan if either is
    constant."""
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return float("nan")
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append((rank - rank.mean()) / np.linalg.norm(rank - rank.mean()))
    return float(ranks[0] @ ranks[1])


def _where(known: np.ndarray, numerator: np.ndarray, divisor: np.ndarray | int) -> np.ndarray:
    """The quotient where it is known, else -inf."""
    return np.divide(numerator, divisor, out=np.full(known.shape, -np.inf), where=known)


def _compare(
    pool: Pool, selector: SelectorConfig, data: Encoded, teachers: Encoded, watched: dict[str, Encoded], folder: Path
) -> tuple[Losses, Losses]:
    """Losses of all examples under the base model and under the reference."""
    place = folder.parent
    base = base_losses(pool, data, place)
    if selector.reference is not None:
        return base, given_losses(pool, selector.reference, "selector.reference", data, place)
    watched = {name: examples for name, examples in watched.items() if len(examples)}
    return base, trained_losses(pool, selector, data, teachers, watched, place)


def _told(
    pool: Pool,
    selector: SelectorConfig,
    data: Encoded,
    base: Losses,
    reference: Losses,
    scores: np.ndarray,
    folder: Path,
) -> list[np.ndarray]:
    """Scores of each domain; what they are made of is written, who has none and what length does to them is said."""
    details = {"base_loss": base.sums, "reference_loss": reference.sums, "response_tokens": base.tokens}
    lead(save_arrays, folder / DETAILS, details)
    ends = np.cumsum([len(part) for part in pool.train])[:-1]
    rows = np.split(np.arange(len(data)), ends)
    for name, part in zip(pool.names, rows, strict=True):
        unknown = part[scores[part] == -np.inf]
        if len(unknown) and len(unknown) == len(part):
            raise DataError(
                f"domain '{name}': no example has a score, because losses are not finite or the base model's are below "
                f"{LEAST} nats a token; lower training.learning_rate, or leave the domain out"
            )
        if len(unknown):
            named = ", ".join(data.ids[row] for row in unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
            pool.say(
                f"{selector.kind}, {name}: {len(unknown)} of {len(part)} examples are never chosen, because a loss is "
                f"not finite or the base model's is below {LEAST} nats a token: {named}"
            )
    every = [(f"{name}, ", part) for name, part in zip(pool.names, rows, strict=True)] if len(rows) > 1 else []
    compared = {
        "DavIR": davir_scores(base, reference),
        "RHO per token": rho_scores(base, reference),
        "RHO summed": rho_scores(base, reference, token_mean=False),
    }
    for name, part in [*every, ("", np.arange(len(data)))]:
        part = part[compared["DavIR"][part] > -np.inf]
        if len(np.unique(base.tokens[part])) == 1:
            continue  # Nothing can depend on a length that all share.
        found = [f"{kind} {spearman(values[part], base.tokens[part]):+.2f}" for kind, values in compared.items()]
        pool.say(f"{name}Spearman correlation with the response's length: {', '.join(found)}")
    return np.split(scores, ends)
