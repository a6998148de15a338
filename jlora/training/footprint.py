"""Parameters and bytes of a run, by part, and what the compiler says."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from jlora.core.quantized import is_quantized
from jlora.parallel.shardings import is_on_host

ON_HOST = 'optimizer state, on the host'


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What a training step takes, in parameters and bytes.

  Bytes are those of one device.

  Attributes:
    frozen_params: Weights that are not trained.
    trainable_params: Weights that are, without the zeros that pad the ranks
      within a stack.
    bytes: Bytes by part: frozen 4-bit, frozen dense, trainable, optimizer,
      and scratch, the compiler's temporary buffers, gradients included.
    compiled_peak: Bytes at the peak of one step: arguments + temporary
      buffers + results - buffers shared by both.
  """

  frozen_params: int
  trainable_params: int
  bytes: dict[str, int]
  compiled_peak: int

  def rows(self) -> Iterator[tuple[str, str]]:
    """Yields the lines of the table that is printed before the first step."""
    total = self.frozen_params + self.trainable_params
    share = self.trainable_params / total
    yield 'parameters', f'{total:,}, {self.trainable_params:,} trained'
    yield 'trained share', f'{share:.2%}'
    for part, size in self.bytes.items():
      yield part, f'{size / 1e6:,.1f} MB'
    yield 'compiled peak', f'{self.compiled_peak / 1e6:,.1f} MB'


def measure(
  frozen: Any, state: Any, compiled: Any, *, trained: int
) -> Footprint:
  """Counts a run's parameters and bytes.

  Args:
    frozen: The frozen half of the parameters.
    state: The TrainState.
    compiled: The compiled train step.
    trained: Number of trained weights, padding left out.
  """
  leaves = jax.tree.leaves(frozen, is_leaf=is_quantized)
  memory = compiled.memory_analysis()
  return Footprint(
    frozen_params=sum(x.size for x in leaves),
    trainable_params=trained,
    bytes={
      **bytes_by_part(frozen, state),
      'scratch of a step': memory.temp_size_in_bytes,
    },
    compiled_peak=compiled_peak(compiled),
  )


def compiled_peak(compiled: Any) -> int:
  """Returns the bytes that one device holds at the peak of a program.

  Args:
    compiled: The program.
  """
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def bytes_by_part(frozen: Any, state: Any) -> dict[str, int]:
  """Returns the bytes that one device holds between steps, by part.

  Args:
    frozen: The frozen half of the parameters, or its shapes.
    state: The TrainState, or its shapes. What an optimizer keeps in the host's
      memory is the part `ON_HOST`, which is there only then.
  """
  leaves = jax.tree.leaves(frozen, is_leaf=is_quantized)
  moments = jax.tree.leaves(state.opt_state)
  parts = {
    'frozen, quantized': _on_one([x for x in leaves if is_quantized(x)]),
    'frozen, dense': _on_one([x for x in leaves if not is_quantized(x)]),
    'trainable': _on_one(state.trainable),
    'optimizer state': _on_one([x for x in moments if not _is_on_host(x)]),
  }
  if away := _on_one([x for x in moments if _is_on_host(x)]):
    parts[ON_HOST] = away
  return parts


def _is_on_host(array: Any) -> bool:
  sharding = getattr(array, 'sharding', None)
  return sharding is not None and is_on_host(sharding)


def _on_one(tree: Any) -> int:
  """Returns the bytes that one device holds of all arrays of a tree."""

  def size(array: Any) -> int:
    sharding = getattr(array, 'sharding', None)
    shape = sharding.shard_shape(array.shape) if sharding else array.shape
    return math.prod(shape) * array.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))
