"""One low-rank pair of all experts of a layer, made of blocks."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jlora.checkpoints.peft_scales import (
  Strength,
  alpha_within,
  divided,
  times,
)

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
_A, _B = ENDS = ('lora_A.weight', 'lora_B.weight')


@dataclasses.dataclass(frozen=True)
class Block:
  """Where the pair of one module lies in a fused one.

  Attributes:
    part: Index of the kernel among those that lie one behind the other.
    expert: Index of the expert.
    ranks: Its share of the rank.
    factor: What its `lora_B` is multiplied by there.
  """

  part: int
  expert: int
  ranks: slice
  factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Fused:
  """One fused pair of a file.

  Attributes:
    key: What its tensors' names start with.
    rank: Of the pair of one expert.
    alpha: As in LoraSpec.
    parts: Modules of all experts, for each of the kernels that lie one behind
      the other along the output axis.
    blocks: By module, of those that have a pair.
  """

  key: str
  rank: int
  alpha: float
  parts: tuple[tuple[str, ...], ...]
  blocks: Mapping[str, Block]

  @property
  def modules(self) -> list[str]:
    """Returns all modules, with a pair or without."""
    return [module for part in self.parts for module in part]

  def shapes(self, shapes: Shapes) -> Shapes:
    """Returns shapes by key, of which those of single modules are given."""
    a, b = (shapes[key_of(next(iter(self.blocks)), end)] for end in (_A, _B))
    count = len(self.parts[0])
    return {
      f'{self.key}.{_A}': (count * self.rank, a[1]),
      f'{self.key}.{_B}': (len(self.parts) * b[0], self.rank * count),
    }

  def fuse(self, tensors: Tensors) -> Tensors:
    """Returns the fused tensors, of which those of modules are given."""
    first = next(iter(self.blocks))
    keys = [key_of(first, end) for end in ENDS]
    shapes = self.shapes({key: tensors[key].shape for key in keys})
    found = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    a, b = self._views(found)
    for module, block in self.blocks.items():
      own_a, own_b = (tensors[key_of(module, end)] for end in (_A, _B))
      a[block.expert, block.ranks] = own_a
      b[block.part, :, block.ranks, block.expert] = times(own_b, block.factor)
    return found

  def split(self, tensors: Tensors) -> Tensors:
    """Returns the tensors of single modules."""
    a, b = self._views(tensors)
    found = {}
    for module, block in self.blocks.items():
      own = b[block.part, :, block.ranks, block.expert]
      found[key_of(module, _A)] = a[block.expert, block.ranks]
      found[key_of(module, _B)] = divided(own, block.factor)
    return found

  def holds(self, tensors: Tensors) -> bool:
    """Whether the blocks are all that the fused tensors hold."""
    again = self.fuse(self.split(tensors))
    return all(np.array_equal(tensors[key], again[key]) for key in again)

  def in_blocks(self, tensors: Tensors) -> 'Fused':
    """Returns the same with a block for each part, if it has such blocks.

    Args:
      tensors: The fused ones. Where `lora_B` is not zero decides; where that
        leaves a choice, the shares of the rank are as even as can be.
    """
    if len(self.parts) != 2:
      return self
    _, b = self._views(tensors)
    first, second = (part.any(axis=(0, 2)).nonzero()[0] for part in b)
    low = first[-1] + 1 if first.size else 0
    high = second[0] if second.size else self.rank
    if low > high:
      return self
    cut = int(min(max(self.rank // 2, low), high))
    ranks = slice(0, cut), slice(cut, self.rank)
    return dataclasses.replace(self, blocks=whole(self.parts, ranks))

  def strengths(self, scaling: str) -> dict[str, Strength]:
    """Returns rank and alpha of the modules in blocks without a factor."""
    found = {}
    for module, block in self.blocks.items():
      rank = block.ranks.stop - block.ranks.start
      alpha = alpha_within((self.rank, self.alpha), rank, scaling)
      found[module] = rank, alpha
    return found

  def _views(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Returns [experts, rank, in] and [parts, out, rank, experts]."""
    a, b = (tensors[f'{self.key}.{end}'] for end in (_A, _B))
    parts, count = len(self.parts), len(self.parts[0])
    return (
      a.reshape(count, self.rank, a.shape[1]),
      b.reshape(parts, b.shape[0] // parts, self.rank, count),
    )


def whole(
  parts: tuple[tuple[str, ...], ...], ranks: tuple[slice, ...]
) -> dict[str, Block]:
  """Returns blocks in which all experts of a part have the same ranks.

  Args:
    parts: As in `Fused`.
    ranks: Of each part; those of an empty one have no block.
  """
  return {
    module: Block(i, expert, ranks[i])
    for i, part in enumerate(parts)
    for expert, module in enumerate(part)
    if ranks[i].start < ranks[i].stop
  }


def key_of(module: str, end: str) -> str:
  """Returns the name of a tensor of a single module."""
  return f'base_model.model.{module}.{end}'
