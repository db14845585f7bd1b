"""Checkpoints of one training: written beside the training, found again after any crash.

In a folder orbax writes them. It has no way to the object stores that this library does without further packages, nor
any to Azure's; there they are in `parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from duet_jax.distributed.processes import deferring, lead
from duet_jax.errors import ModelError
from duet_jax.storage import Shelf
from duet_jax.training.parts import Parts, Removed


class _Manager(ocp.CheckpointManager):
    """Leaves it to `processes.stopping` to ask for preemptions: JAX has one count of such calls, which steps upset."""

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        del step
        return False

    def latest(self) -> tuple[int, Any] | None:
        """The newest step, and the name of its checkpoint."""
        step = self.latest_step()
        return None if step is None else (step, step)

    def place(self, name: int) -> str:
        """Where a checkpoint is, for people."""
        return f"{self.directory}/{name}"

    def about(self, name: int) -> dict[str, Any]:
        """What was written with a state."""
        return self.restore(name, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def write(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Writes a state in the background."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self.save(step, args=args, force=True)

    def read(self, name: int, abstract: Any) -> Any:
        """A state laid out as a tree of shapes with shardings."""
        return self.restore(name, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]


class Checkpoints:
    """The latest state of one training, in a folder of its own, or on a shelf of an object store.

    A checkpoint appears whole or not at all (orbax writes beside it and renames), and the one before it is
    removed only then. Of several processes each writes and reads the parts of its own devices, in a folder that all
    of them see, or on a shelf.

    Args:
      folder: made when missing.
      identity: what the training is of, as names and values: the model's fingerprint, the data's. A
        checkpoint found in the folder must carry the same.
    """

    def __init__(self, folder: Path | Shelf, identity: Mapping[str, str]):
        self._folder = folder if isinstance(folder, Shelf) else folder.absolute()
        self._identity = dict(identity)
        self._manager: _Manager | Parts
        if isinstance(self._folder, Shelf):
            self._manager = Parts(self._folder)
        else:
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
            if isinstance(self._manager, Parts):
                self._manager.close(error)
                return
            self._manager.wait_until_finished()
            self._manager.close()

    def save(self, step: int, state: Any, progress: Mapping[str, float]) -> None:
        """Writes the state after `step` steps, in the background; `progress` is plain numbers kept with it.

        A step that is there already stays: a training that was killed and goes on comes by with the same bits.
        """
        if not lead(lambda: step in self._manager.all_steps()):
            self._manager.write(step, state, {"identity": self._identity, "progress": dict(progress)})

    def restore(self, like: Any) -> tuple[int, Any, dict[str, float]] | None:
        """The newest checkpoint, or None where there is none.

        Args:
          like: a tree of arrays, laid out as the state is to be. A checkpoint takes their place: they are deleted
            before it is read, so that there are never two states in memory.

        Returns:
          Step, state and progress as they were saved.

        Raises:
          ModelError: the checkpoint is of another model or of other data.
          StudyError: it was removed while it was read, and there is no newer one.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        latest = lead(self._manager.latest)
        while latest is not None:
            step, name = latest
            try:
                about = self._about(name)
                jax.tree.map(lambda x: x.delete(), like)
                return step, self._manager.read(name, abstract), about["progress"]
            except Removed:
                # By another machine that trains the same, when it had a newer one.
                latest = lead(self._manager.latest)
                if latest is None or latest[1] == name:
                    raise
        return None

    def _about(self, name: Any) -> dict[str, Any]:
        """What was written with a checkpoint of this training."""
        about = self._manager.about(name)
        for key, wanted in self._identity.items():
            written = about["identity"].get(key)
            if written != wanted:
                place = self._manager.place(name)
                raise ModelError(
                    f"The checkpoint {place} was written by a training with another {key} "
                    f"({str(written)[:12]}, now {wanted[:12]}); restore the {key} it began with, or delete "
                    f"the folder {place.rpartition('/')[0]} to train this trial anew."
                )
        return about
