"""The folder of a run: who owns it, which config it holds, its metrics."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import filelock

from jlora.errors import CheckpointError, ConfigError

# What may differ between the config of a run and that of its continuation.
_MAY_CHANGE = (
  'log',
  'eval',
  'optim.learning_rate',
  'train.checkpoint_every',
  'train.epochs',
  'train.steps',
)


class RunFolder:
  """Paths of a run, and the lock that keeps a second process out of them."""

  def __init__(self, root: os.PathLike[str] | str):
    """Makes the folder and locks it until the process ends.

    Args:
      root: The run's folder.

    Raises:
      ConfigError: It is a file, cannot be written, or another process runs
        in it.
    """
    self.root = pathlib.Path(root)
    try:
      self.root.mkdir(parents=True, exist_ok=True)
      self._lock = filelock.FileLock(self.root / '.lock', timeout=0)
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
    target = self.path(name)
    part = target.with_name(f'.{target.name}.part')
    part.write_text(text)
    part.replace(target)

  def release(self) -> None:
    """Lets other processes use the folder."""
    self._lock.release()

  def check_config(self, text: str) -> list[str]:
    """Compares a config with the one that this folder's run began with.

    Args:
      text: The resolved config as JSON.

    Returns:
      The differences that a continued run may have, one line each.

    Raises:
      ConfigError: The config cannot continue this run.
    """
    old = _flat(json.loads(self.path('config.json').read_text()))
    new = _flat(json.loads(text))
    return [
      self._change(field, old.get(field), new.get(field))
      for field in sorted(old.keys() | new.keys())
      if old.get(field) != new.get(field)
    ]

  def _change(self, field: str, old: Any, new: Any) -> str:
    if not any(f'{field}.'.startswith(f'{f}.') for f in _MAY_CHANGE):
      raise ConfigError(
        f'{self.root} holds a run with {field}={old!r}, and this config has'
        f' {new!r}; choose another --workdir, or remove the folder to start'
        f' over (a continued run may change {", ".join(_MAY_CHANGE)})'
      )
    return f'{field}: {old!r} -> {new!r}'


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  fields: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      fields |= _flat(value, f'{prefix}{name}.')
    else:
      fields[f'{prefix}{name}'] = value
  return fields


class MetricsFile:
  """metrics.jsonl: one JSON object a line, in the order of steps."""

  def __init__(self, path: os.PathLike[str] | str, *, up_to: int):
    """Opens the file and drops what a continued run will write again.

    Args:
      path: The file.
      up_to: Last step to keep; -1 keeps nothing.
    """
    self.path = pathlib.Path(path)
    kept = [line for line in self.read() if line['step'] <= up_to]
    part = self.path.with_name(f'.{self.path.name}.part')
    part.write_text(''.join(map(_line, kept)))
    part.replace(self.path)

  def append(self, fields: Mapping[str, Any]) -> None:
    """Adds a line, on disk before this returns.

    Args:
      fields: JSON values, `step` among them.

    Raises:
      CheckpointError: The line cannot be written.
    """
    try:
      with self.path.open('a') as file:
        file.write(_line(fields))
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      raise CheckpointError(
        f'{self.path} cannot be written: {error}'
      ) from error

  def read(self) -> list[dict[str, Any]]:
    """Returns all lines; a last line that was cut off by a kill is left out."""
    if not self.path.exists():
      return []
    text = self.path.read_text()
    whole = text[: text.rfind('\n') + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _line(fields: Mapping[str, Any]) -> str:
  return json.dumps(dict(fields)) + '\n'
