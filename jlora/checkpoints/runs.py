"""Checkpoints of a run: complete or invisible, and never the frozen base."""

import contextlib
import hashlib
import json
import os
import pathlib
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.core.state import TrainState
from jlora.errors import CheckpointError
from jlora.parallel import processes

KEPT = 2  # a damaged newest checkpoint leaves one to fall back to
# What Orbax was seen to raise on truncated files and flipped bits.
_DAMAGE = (
  AssertionError,
  AttributeError,
  LookupError,
  OSError,
  RuntimeError,
  TypeError,
  ValueError,
)


class RunCheckpoints:
  """The checkpoints of one run folder, through Orbax.

  A checkpoint holds the train state (trainable, optimizer state, step) and a
  small JSON record of where the run stood. Orbax writes into a temporary
  folder and renames it, so a killed save leaves nothing that could be read. A
  digest of both is kept with them and compared before they are used.

  A context manager, which closes it; a folder left empty is removed.
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
    content = {'digest': _digest(state, record), 'record': record}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(content)
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
    """Returns the newest checkpoint that is whole, or None without any.

    Where a newer one is damaged, a warning says so, and it is removed.

    Args:
      like: A state of arrays or ShapeDtypeStructs with the shardings wanted.

    Raises:
      CheckpointError: There are checkpoints, and none can be read.
    """
    damaged = {}
    for step in reversed(self.steps()):
      found, reason = self._try(step, like)
      # All of several processes take the same step.
      if processes.any_of(found is None):
        damaged[step] = reason or 'another process could not read it'
        continue
      self._remove(damaged, step)
      return found
    if damaged:
      reasons = '; '.join(f'step {s}: {e}' for s, e in damaged.items())
      raise CheckpointError(
        f'no checkpoint in {self.folder} can be read ({reasons}); move the'
        ' folder away to start from the beginning'
      )
    return None

  def _try(
    self, step: int, like: TrainState
  ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """Returns a checkpoint, or None and what is wrong with it."""
    found, reason = None, ''
    try:
      found = self._restore(step, like)
    except _DAMAGE as error:
      reason = _first_line(error)
    if processes.any_of(found is None):  # before they find digests together
      return None, reason
    state, content = found
    record, expected = content['record'], content['digest']
    if (digest := _digest(state, record)) != expected:
      return None, f'it has sha256 {digest}, but {expected} was saved'
    return (state, record), ''

  def _restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
    )
    found = self._manager.restore(step, args=items)
    content = found.record
    if not {'record', 'digest'} <= content.keys():
      raise KeyError('record or digest')
    return found.state, content

  def _remove(self, damaged: dict[int, str], whole: int) -> None:
    """Removes damaged checkpoints, so that their steps are saved again."""
    for step, reason in damaged.items():
      warnings.warn(
        f'the checkpoint of step {step} in {self.folder} is damaged ({reason})'
        f' and is removed; that of step {whole} is used',
        stacklevel=3,
      )
      self._manager.delete(step)

  def __enter__(self) -> 'RunCheckpoints':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Closes it."""
    self.close()

  def close(self) -> None:
    """Ends the background work of Orbax."""
    self._manager.close()
    with contextlib.suppress(OSError):  # not empty
      self.folder.rmdir()


def _digest(state: TrainState, record: dict[str, Any]) -> str:
  """Returns the sha256 of the record and of all arrays with their paths.

  It does not depend on how they are cut; all processes find it together.
  """
  sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    sha.update(jax.tree_util.keystr(path).encode())
    sha.update(np.ascontiguousarray(processes.whole(leaf)).tobytes())
  return sha.hexdigest()


def _first_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]:.200}'
