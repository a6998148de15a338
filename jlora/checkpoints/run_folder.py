"""The folder of a run: who owns it, which config it holds, its metrics."""

import contextlib
import json
import math
import os
import pathlib
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import filelock

from jlora.errors import CheckpointError, ConfigError
from jlora.parallel import processes

# What may differ between the config of a run and that of its continuation.
_MAY_CHANGE = (
  'log',
  'eval.every',
  'eval.merge',
  'mesh',
  'optim.learning_rate',
  'optim.offload',
  'train.attention',
  'train.checkpoint_every',
  'train.epochs',
  'train.steps',
)


_LOCK = '.lock'


class RunFolder:
  """Paths of a run, and the lock that keeps a second run out of them.

  A context manager: at its end the lock is given back, and a folder that was
  made and left empty, since the run was refused, is removed.

  Attributes:
    root: The folder.
    writes: Whether this process writes into it. Of several that train
      together the first does; to the others, writing is doing nothing.
  """

  def __init__(self, root: os.PathLike[str] | str, *, writes: bool = True):
    """Makes the folder and locks it until `release`, or the process's end.

    Args:
      root: The run's folder.
      writes: Whether this process writes into it.

    Raises:
      ConfigError: It is a file, cannot be written, or another process runs
        in it.
    """
    self.root = pathlib.Path(root)
    self.writes = writes
    if not writes:
      return
    try:
      self.root.mkdir(parents=True, exist_ok=True)
      self._lock = filelock.FileLock(self.root / _LOCK, timeout=0)
      self._lock.acquire()
    except filelock.Timeout as error:
      raise ConfigError(
        f'another process is training in {self.root}; wait for it or choose'
        ' another --workdir'
      ) from error
    except OSError as error:
      raise ConfigError(
        f'--workdir {self.root} cannot be written: {error}'
      ) from error

  def path(self, name: str) -> pathlib.Path:
    """Returns the path of one of the run's files."""
    return self.root / name

  def write(self, name: str, text: str) -> None:
    """Replaces a text file in one step, so it is never half-written."""
    if not self.writes:
      return
    target = self.path(name)
    part = target.with_name(f'.{target.name}.part')
    part.write_text(text)
    part.replace(target)

  def has(self, name: str) -> bool:
    """Whether a file is there, as the process sees it that writes.

    Of several, all ask together: a shared disk may show others an older state.
    """
    return processes.any_of(self.writes and self.path(name).exists())

  def check_shared(self) -> None:
    """Requires that all of several processes see this folder.

    Raises:
      ConfigError: One of them sees another.
    """
    if not processes.are_several():
      return
    file, said = self.path('.processes'), processes.from_first(uuid.uuid4().hex)
    self.write(file.name, said)
    processes.wait('the first has written')
    seen = file.read_text() if file.is_file() else 'nothing'
    processes.require_same('folder as --workdir', seen)
    self.remove(file.name)

  def remove(self, name: str) -> None:
    """Removes a file if it is there."""
    if self.writes:
      self.path(name).unlink(missing_ok=True)

  def metrics(self, *, up_to: int) -> 'MetricsFile':
    """Opens metrics.jsonl; see `MetricsFile`."""
    return MetricsFile(
      self.path('metrics.jsonl'), up_to=up_to, writes=self.writes
    )

  def __enter__(self) -> 'RunFolder':
    """Returns the folder."""
    return self

  def __exit__(self, *_: object) -> None:
    """Releases the folder."""
    self.release()

  def release(self) -> None:
    """Lets other runs use the folder; an empty one is removed."""
    if not self.writes:
      return
    if {path.name for path in self.root.iterdir()} == {_LOCK}:
      self.path(_LOCK).unlink()
      self.root.rmdir()
    self._lock.release()

  def check_config(self, text: str) -> dict[str, tuple[Any, Any]]:
    """Compares a config with the one that this folder's run began with.

    Args:
      text: The resolved config as JSON.

    Returns:
      What a continued run has changed: (old, new) by field.

    Raises:
      ConfigError: The config cannot continue this run.
    """
    old, new = self._load_config(), _flat(json.loads(text))
    changes = {
      field: (old.get(field), new.get(field))
      for field in sorted(old.keys() | new.keys())
      if old.get(field) != new.get(field)
    }
    for field, (before, now) in changes.items():
      if not any(f'{field}.'.startswith(f'{f}.') for f in _MAY_CHANGE):
        raise ConfigError(
          f'{self.root} holds a run with {field}={before!r}, and this config'
          f' has {now!r}; choose another --workdir, or remove the folder to'
          f' start over (a continued run may change {", ".join(_MAY_CHANGE)})'
        )
    return changes

  def _load_config(self) -> dict[str, Any]:
    path = self.path('config.json')
    try:
      return _flat(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as error:
      raise CheckpointError(
        f'{self.root} has checkpoints, but {path.name} cannot be read'
        f' ({error}); restore it, or choose another --workdir'
      ) from error


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  fields: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      fields |= _flat(value, f'{prefix}{name}.')
    else:
      fields[f'{prefix}{name}'] = value
  return fields


class MetricsFile:
  """metrics.jsonl: one JSON object a line, in the order of steps.

  Attributes:
    path: The file.
    lost: Lines that could not be written.
  """

  def __init__(
    self,
    path: os.PathLike[str] | str,
    *,
    up_to: int,
    writes: bool = True,
  ):
    """Opens the file and drops what a continued run will write again.

    Args:
      path: The file.
      up_to: Last step to keep; -1 keeps nothing.
      writes: Whether this process writes it; else appending does nothing.
    """
    self.path = pathlib.Path(path)
    self.lost = 0
    self._writes = writes
    if not writes:
      return
    kept = [line for line in self.read() if line['step'] <= up_to]
    part = self.path.with_name(f'.{self.path.name}.part')
    part.write_text(''.join(map(_line, kept)))
    part.replace(self.path)

  def append(self, fields: Mapping[str, Any]) -> None:
    """Adds a line, on disk before this returns; one that fails is counted.

    Args:
      fields: JSON values, `step` among them. Numbers that are not finite,
        which JSON does not have, are written as null.
    """
    if not self._writes:
      return
    size = self.path.stat().st_size
    try:
      with self.path.open('a') as file:
        file.write(_line(fields))
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      self.lost += 1
      warnings.warn(
        f'{self.path} cannot be written: {error}; training goes on without'
        f' line {fields!r:.60}',
        stacklevel=2,
      )
      with contextlib.suppress(OSError):
        os.truncate(self.path, size)

  def read(self) -> list[dict[str, Any]]:
    """Returns all lines; a last line that was cut off by a kill is left out.

    Raises:
      CheckpointError: A line is damaged.
    """
    if not self.path.exists():
      return []
    text = self.path.read_text()
    lines = text[: text.rfind('\n') + 1].splitlines()
    try:
      return [json.loads(line) for line in lines]
    except ValueError as error:
      raise CheckpointError(
        f'{self.path} has a line that is no JSON ({error}); remove that line'
      ) from error


def _line(fields: Mapping[str, Any]) -> str:
  return json.dumps(finite_or_none(dict(fields)), allow_nan=False) + '\n'


def finite_or_none(tree: Any) -> Any:
  """Returns JSON values with None in place of NaN and the infinities.

  Args:
    tree: Nested dicts, lists and tuples of JSON values.
  """
  if isinstance(tree, Mapping):
    return {name: finite_or_none(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [finite_or_none(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree
