"""Checkpoints of a run: complete or invisible, and never the frozen base."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora.core.state import TrainState
from jlora.errors import CheckpointError

KEPT = 2  # a damaged newest checkpoint leaves one to fall back to


class RunCheckpoints:
  """The checkpoints of one run folder, through Orbax.

  A checkpoint holds the train state (trainable, optimizer state, step) and a
  small JSON record of where the run stood. Orbax writes into a temporary
  folder and renames it, so a killed save leaves nothing that could be read.
  """

  def __init__(self, folder: os.PathLike[str] | str):
    """Opens or makes a folder of checkpoints.

    Args:
      folder: Usually `checkpoints` in the run folder.

    Raises:
      CheckpointError: The folder cannot be written.
    """
    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=KEPT, enable_async_checkpointing=False
    )
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(self.folder, options=options)
    except OSError as error:
      raise CheckpointError(
        f'checkpoints cannot be written to {self.folder}: {error}; choose'
        ' another --workdir'
      ) from error

  def steps(self) -> list[int]:
    """Returns the steps that can be restored, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, record: dict[str, Any]) -> None:
    """Saves a checkpoint for `state.step` and returns once it is complete.

    Args:
      state: What training carries.
      record: JSON values: where data, metrics and best adapter stood.

    Raises:
      CheckpointError: The disk is full or read-only. Older checkpoints stay.
    """
    step = int(state.step)
    if step in self.steps():
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
    )
    try:
      self._manager.save(step, args=items)
    except (OSError, ValueError) as error:
      raise CheckpointError(
        f'the checkpoint of step {step} could not be saved to {self.folder}:'
        f' {error}; the last complete one is {self.steps()[-1:] or "none"}'
      ) from error

  def restore(
    self, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest checkpoint, or None where there is none.

    Args:
      like: A state of arrays or ShapeDtypeStructs with the shardings wanted.

    Raises:
      CheckpointError: There are checkpoints, and none can be read.
    """
    failures = []
    for step in reversed(self.steps()):
      try:
        return self._restore(step, like)
      except (OSError, ValueError, KeyError) as error:
        failures.append(f'step {step}: {type(error).__name__}: {error}')
    if failures:
      raise CheckpointError(
        f'no checkpoint in {self.folder} can be read ({"; ".join(failures)});'
        ' move the folder away to start from the beginning'
      )
    return None

  def _restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
    )
    found = self._manager.restore(step, args=items)
    return found.state, found.record

  def close(self) -> None:
    """Ends the background work of Orbax."""
    self._manager.close()
