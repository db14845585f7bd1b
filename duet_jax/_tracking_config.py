"""The part of a configuration that says where else a study's metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from duet_jax._checks import FieldError


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """A tracker that hears every training step and feedback; each trial is a run of its own.

    Attributes:
      kind: which; each needs its package.
      project: of W&B and trackio; None: the study's name. TensorBoard's files are in the study's folder tensorboard.
      options: further arguments of `wandb.init` or `trackio.init`, as entity, mode or space_id.
    """

    kind: Literal["tensorboard", "wandb", "trackio"]
    project: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("project", "options"):
            if self.kind == "tensorboard" and getattr(self, name):
                raise FieldError(name, "is of W&B and trackio; leave it out.")
        for name in ("project", "name", "group", "config", "id", "resume", "dir"):
            if name in self.options:
                raise FieldError(f"options.{name}", "is given by the study; leave it out.")
