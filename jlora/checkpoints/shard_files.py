"""Safetensors files as they are written: one, or shards and their index.

All headers are written first, so that tensors may come in any order, one in
memory at a time.
"""

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jlora.checkpoints.shards import DTYPES, INDEX, SINGLE
from jlora.checkpoints.weights import listed
from jlora.errors import CheckpointError, ConfigError

MAX_SHARD_SIZE = '50GB'  # as transformers has it

_KINDS = {name: kind for kind, name in DTYPES.items()} | {'uint8': 'U8'}
_UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
_UNITS |= {'KIB': 1 << 10, 'MIB': 1 << 20, 'GIB': 1 << 30}
_SHARD = re.compile(r'model-\d{5}-of-\d{5}\.safetensors')


class Entry(NamedTuple):
  """What a file holds under a name."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes that it takes."""
    return math.prod(self.shape) * self.dtype.itemsize


Entries = Mapping[str, Entry]


def as_bytes(size: str | int) -> int:
  """Returns a size such as '5GB' in bytes.

  Args:
    size: A number of bytes, or one with KB, MB, GB, KiB, MiB or GiB.

  Raises:
    ConfigError: It is no size.
  """
  found = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([a-zA-Z]*)', str(size).strip())
  unit = found and {'': 1, **_UNITS}.get(found[2].upper())
  if not unit or (count := int(float(found[1]) * unit)) < 1:
    raise ConfigError(
      f'a shard of at most {size!r} cannot be written; use a size such as'
      " '5GB' or '500MB'"
    )
  return count


def is_weights_file(name: str) -> bool:
  """Whether a file is one of those that `write_model` writes."""
  return name in (SINGLE, INDEX) or bool(_SHARD.fullmatch(name))


def write_model(
  folder: pathlib.Path,
  entries: Entries,
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  largest: int,
) -> None:
  """Writes a model's tensors, into several files where one would be too large.

  Args:
    folder: Holds none of them yet.
    entries: Shape and dtype of every tensor by name.
    tensors: Each of them once, in any order. Those of uint8 are bytes, which
      are written as they are; others are rounded.
    largest: Bytes of tensors that a file may have; one tensor may have more.

  Raises:
    ConfigError: A value does not fit its dtype.
    CheckpointError: A tensor is missing, unknown or of another shape.
  """
  shards = _cut(entries, largest)
  names = [SINGLE]
  if len(shards) > 1:
    numbers = range(1, len(shards) + 1)
    names = [f'model-{i:05}-of-{len(shards):05}.safetensors' for i in numbers]
    _write_index(folder / INDEX, names, shards, entries)
  with contextlib.ExitStack() as stack:
    places: dict[str, tuple[BinaryIO, int]] = {}
    for name, shard in zip(names, shards, strict=True):
      file = stack.enter_context((folder / name).open('xb'))
      starts, header = _lay_out({key: entries[key] for key in shard})
      file.write(header)
      places |= {k: (file, len(header) + at) for k, at in starts.items()}
    for name, tensor in tensors:
      if name not in places:
        raise CheckpointError(f'{name} comes twice, or the model has none')
      file, start = places.pop(name)
      file.seek(start)
      file.write(_content(name, tensor, entries[name]))
  if places:
    raise CheckpointError(f'{folder} would lack {listed(places)}')


def _cut(entries: Entries, largest: int) -> list[list[str]]:
  """Returns the names of each file's tensors."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, entry in sorted(entries.items()):
    if shards[-1] and size + entry.nbytes > largest:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += entry.nbytes
  return shards


def _write_index(
  path: pathlib.Path,
  names: list[str],
  shards: list[list[str]],
  entries: Entries,
) -> None:
  pairs = zip(names, shards, strict=True)
  fields = {
    'metadata': {'total_size': sum(x.nbytes for x in entries.values())},
    'weight_map': {key: name for name, shard in pairs for key in shard},
  }
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')


def _lay_out(entries: Entries) -> tuple[dict[str, int], bytes]:
  """Returns where each tensor starts behind the header, and the header."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  places, end = {}, 0
  # Readers want tensors aligned: those of wider items come first.
  order = sorted(entries, key=lambda n: (-entries[n].dtype.itemsize, n))
  for name in order:
    entry = entries[name]
    places[name] = end
    end += entry.nbytes
    header[name] = {
      'dtype': _KINDS[entry.dtype.name],
      'shape': entry.shape,
      'data_offsets': [places[name], end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return places, len(text).to_bytes(8, 'little') + text


def _content(name: str, tensor: np.ndarray, entry: Entry) -> bytes:
  if tensor.shape != entry.shape:
    raise CheckpointError(
      f'{name} has shape {tensor.shape}, and the model has it as {entry.shape}'
    )
  with np.errstate(over='ignore'):
    rounded = np.ascontiguousarray(tensor, entry.dtype)
  if not np.isfinite(rounded).all():
    raise ConfigError(
      f'{name} holds values that are not finite as {entry.dtype.name}; the'
      f' largest is {np.abs(tensor).max()}. Save as bfloat16 or float32'
    )
  return rounded.tobytes()
