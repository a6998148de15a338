"""How adapters started that began as a part of their base, on disk.

The frozen half of such a run is its base without these factors. They are kept,
because another decomposition of the same base, on other threads or another
machine, would leave a part that quantizes to other codes.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jlora.core.decompositions import Start
from jlora.core.tree import nest
from jlora.errors import AdapterError

Starts = Mapping[str, Start]


def first_pairs(starts: Starts) -> dict[str, Any]:
  """Returns the low-rank pairs that training began with, as a tree.

  Args:
    starts: By the kernel's path.
  """
  return nest({path: {'a': x.a, 'b': x.b} for path, x in starts.items()})


def to_bytes(starts: Starts) -> bytes:
  """Returns the content of a file; the same starts give the same bytes.

  Args:
    starts: By the kernel's path.
  """
  tensors = {}
  for path, start in starts.items():
    factors = {'a': start.a, 'b': start.b}
    if start.taken is not None:
      factors |= dict(zip(('taken_a', 'taken_b'), start.taken, strict=True))
    for name, array in factors.items():
      tensors[f'{path}/{name}'] = np.asarray(array, np.float32)
  return safetensors.numpy.save(tensors)


def save_starts(path: pathlib.Path, starts: Starts) -> None:
  """Writes a file; it is whole or not there.

  Args:
    path: The file.
    starts: By the kernel's path.
  """
  part = path.with_name(f'.{path.name}.part')
  part.write_bytes(to_bytes(starts))
  part.replace(path)


def load_starts(path: pathlib.Path) -> dict[str, Start]:
  """Returns what a file holds, by the kernel's path.

  Args:
    path: The file.

  Raises:
    AdapterError: It is damaged.
  """
  nodes: dict[str, dict[str, np.ndarray]] = {}
  try:
    for name, array in safetensors.numpy.load_file(path).items():
      parent, _, factor = name.rpartition('/')
      nodes.setdefault(parent, {})[factor] = array
    return {p: _start(node) for p, node in nodes.items()}
  except (safetensors.SafetensorError, OSError, KeyError) as error:
    raise AdapterError(
      f'{path} is no whole file of starts ({error}); restore it'
    ) from error


def _start(node: Mapping[str, np.ndarray]) -> Start:
  taken = None
  if 'taken_a' in node:
    taken = node['taken_a'], node['taken_b']
  return Start(node['a'], node['b'], taken)
