"""What the rows of a store are, and which stores may be compared."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, get_args

from duet_jax import __version__
from duet_jax.errors import DataError
from duet_jax.influence import quantise
from duet_jax.influence.quantise import RowFormat

Loss = Literal["sum", "mean", "policy_gradient"]
LAYOUT = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything that decides a store's rows. Hashes are any text that differs when the content does.

    Attributes:
      scheme: of the projection, with its parameters: two stores with one text here, one seed and one k are
        projected by the same matrix.
      seed: of the projection, below 2**32.
      k: coordinates of a row, a multiple of 32.
      feature: what is projected: 'sgd' for the plain gradient, otherwise the name of the map and its variant.
      loss: whether an example's loss is the sum or the mean of its tokens', or a prompt's is minus its expected reward.
      rows: number of examples.
      model: fingerprint of the base model.
      adapter: hash of the LoRA factors, or of what was trained; empty for none.
      data: hash of the examples' tokens, in order.
      template: hash of the prompt template.
      optimiser: hash of the optimiser's moments that the feature uses; empty for none.
      compute_dtype: of the matrix products.
      format: of the stored rows, see `quantise`.
      shard_size: rows a shard.
      version: of the library that began the store.
      layout: of the files.

    Raises:
      ValueError: a field is out of its range.
    """

    scheme: str
    seed: int
    k: int
    feature: str
    loss: Loss
    rows: int
    model: str
    adapter: str
    data: str
    template: str
    optimiser: str = ""
    compute_dtype: str = "float32"
    format: RowFormat = "int8"
    shard_size: int = 1024
    version: str = __version__
    layout: int = LAYOUT

    def __post_init__(self) -> None:
        rules = {
            "seed": (0 <= self.seed < 2**32, "at least 0 and below 2**32"),
            "k": (self.k >= 32 and self.k % 32 == 0, "a positive multiple of 32"),
            "loss": (self.loss in get_args(Loss), "'sum', 'mean' or 'policy_gradient'"),
            "rows": (self.rows >= 1, "at least 1"),
            "format": (self.format in quantise.FORMATS, f"one of {', '.join(quantise.FORMATS)}"),
            "shard_size": (self.shard_size >= 1, "at least 1"),
            "layout": (self.layout == LAYOUT, f"{LAYOUT}, the only one that this version reads"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    @property
    def bytes_per_row(self) -> int:
        """Bytes of an encoded row and its scale."""
        dtype, width = quantise.layout(self.format, self.k)
        return width * dtype.itemsize + 4 * quantise.has_scales(self.format)

    def differences(self, other: Header) -> dict[str, tuple[Any, Any]]:
        """Values of the fields that differ, here and there, by name."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    def to_json(self) -> str:
        """The text of header.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str) -> Header:
        """The header of a text, which was read from `place`.

        Raises:
          DataError: it is no header; the sentence says why.
        """
        kinds = {"str": str, "int": int, "Loss": str, "RowFormat": str}
        try:
            found = json.loads(text)
            for field in dataclasses.fields(cls):
                if field.name not in found or type(found[field.name]) is not kinds[str(field.type)]:
                    raise ValueError(f"it has no valid {field.name}")
            return cls(**found)
        except (ValueError, TypeError) as error:
            raise DataError(f"{place} is no header of a store that this version reads: {error}.") from None


# Without one of these in common, inner products of two stores' rows mean nothing.
_SHARED = ("scheme", "seed", "k", "loss", "model", "adapter", "compute_dtype")


def require_comparable(train: Header, target: Header) -> None:
    """Requires that training rows and target rows may be multiplied.

    The feature must be the same, or that of the targets 'sgd': an example's influence is the product of the step that
    it causes, which the optimiser may have shaped, with the plain gradient of a target (LESS, section 3).
    A policy gradient is a target of its own, beside training rows of either loss.

    Raises:
      DataError: they may not; the sentence names the first differing field and both values.
    """
    differing = train.differences(target)
    for name in _SHARED:
        if name in differing and (name, target.loss) != ("loss", "policy_gradient"):
            ours, theirs = differing[name]
            raise DataError(
                f"The stores cannot be compared: {name} is {ours!r} for the training rows and {theirs!r} for the "
                f"target rows; build both with the same {name}."
            )
    if target.feature not in (train.feature, "sgd"):
        raise DataError(
            f"The stores cannot be compared: feature is {train.feature!r} for the training rows and "
            f"{target.feature!r} for the target rows; build the target rows with {train.feature!r} or 'sgd'."
        )
