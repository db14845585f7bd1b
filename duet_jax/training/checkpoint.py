"""Checkpoints of one training, through orbax: written beside the training, found again after any crash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from duet_jax.distributed.processes import deferring, lead
from duet_jax.errors import ModelError


class _Manager(ocp.CheckpointManager):
    """Leaves it to `processes.stopping` to ask for preemptions: JAX has one count of such calls, which steps upset."""

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        del step
        return False


class Checkpoints:
    """The latest state of one training, in a folder of its own.

    A checkpoint appears whole or not at all (orbax writes beside it and renames), and the one before it is
    removed only then. Of several processes each writes and reads the parts of its own devices, in a folder that all
    of them see.

    Args:
      folder: made when missing.
      identity: what the training is of, as names and values: the model's fingerprint, the data's. A
        checkpoint found in the folder must carry the same.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self._folder = folder.absolute()
        self._identity = dict(identity)
        self._manager = _Manager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What is being written is earned already.
        with deferring():
            self._manager.wait_until_finished()
            self._manager.close()

    def save(self, step: int, state: Any, progress: Mapping[str, float]) -> None:
        """Writes the state after `step` steps, in the background; `progress` is plain numbers kept with it.

        A step that is there already stays: a training that was killed and goes on comes by with the same bits.
        """
        if lead(lambda: step in self._manager.all_steps()):
            return
        about = {"identity": self._identity, "progress": dict(progress)}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)),
            force=True,
        )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, float]] | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a tree of arrays, laid out as the state is to be. A checkpoint takes their place: they are deleted
            before it is read, so that there are never two states in memory.

        Returns:
          Step, state and progress as they were saved.

        Raises:
          ModelError: the checkpoint is of another model or of other data.
        """
        step = lead(self._manager.latest_step)
        if step is None:
            return None
        found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about = found["about"]
        for name, wanted in self._identity.items():
            written = about["identity"].get(name)
            if written != wanted:
                raise ModelError(
                    f"The checkpoint {self._folder / str(step)} was written by a training with another {name} "
                    f"({str(written)[:12]}, now {wanted[:12]}); restore the {name} it began with, or delete "
                    f"the folder {self._folder} to train this trial anew."
                )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        jax.tree.map(lambda x: x.delete(), like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return step, restored["state"], about["progress"]
