"""Low-rank pairs of all experts of a layer, as PEFT fuses them.

transformers 5 keeps the experts of a layer in two parameters, `gate_up_proj`
and `down_proj`, and PEFT has one pair for each (`target_parameters`):
`lora_A` [experts * rank, in] and `lora_B` [out, rank * experts], the experts
running slowest in the first and fastest in the second. Here every expert has a
pair of its own, for its gate and for its up projection.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.peft_modules import Modules
from jlora.errors import AdapterError

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
_A, _B = 'lora_A.weight', 'lora_B.weight'


def target_parameters(
  fields: Mapping[str, Any], base: Modules
) -> tuple[str, ...]:
  """Returns the parameters with a fused pair, by the rules of PEFT.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no parameter of the base.
  """
  names = fields['target_parameters'] or []
  found: dict[str, None] = {}
  for name in names:
    hits = [p for p in base.parameters if f'.{p}'.endswith(f'.{name}')]
    if not hits:
      known = sorted({p.rpartition('.')[2] for p in base.parameters})
      raise AdapterError(
        f'target_parameters has {name!r}, which is no fused parameter of this'
        f' base; it has {known}'
      )
    found |= dict.fromkeys(hits)
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Fused:
  """One fused pair of a file.

  Attributes:
    key: What its tensors' names start with.
    parts: Modules of all experts, for each of the kernels that lie one behind
      the other along the output axis.
  """

  key: str
  parts: tuple[tuple[str, ...], ...]

  def fuse(self, shapes: Shapes) -> Shapes:
    """Returns shapes by key, of which those of single modules are given."""
    a, b = (shapes[_key(self.parts[0][0], end)] for end in (_A, _B))
    count, parts = len(self.parts[0]), len(self.parts)
    return {
      f'{self.key}.{_A}': (count * a[0], a[1]),
      f'{self.key}.{_B}': (parts * b[0], b[1] * count),
    }

  def split(self, tensors: Tensors) -> Tensors:
    """Returns the tensors of single modules."""
    a, b = (tensors[f'{self.key}.{end}'] for end in (_A, _B))
    count = len(self.parts[0])
    a = a.reshape(count, -1, a.shape[1])
    b = b.reshape(len(self.parts), -1, a.shape[1], count)
    return {
      _key(module, end): tensor
      for part, modules in enumerate(self.parts)
      for expert, module in enumerate(modules)
      for end, tensor in ((_A, a[expert]), (_B, b[part, :, :, expert]))
    }


def make_fused(parameters: tuple[str, ...], base: Modules) -> list[Fused]:
  """Returns where the pairs of parameters lie in a file.

  Of two parameters of one module, PEFT wraps the first one first.

  Args:
    parameters: From `target_parameters`.
    base: Modules of the base.
  """
  chosen = [p for p in base.parameters if p in parameters]
  owners = [p.rpartition('.')[0] for p in chosen]
  fused = []
  for i, (parameter, owner) in enumerate(zip(chosen, owners, strict=True)):
    inner = '.base_layer' * owners[i + 1 :].count(owner)
    key = f'base_model.model.{owner}{inner}'
    fused.append(Fused(key, base.parameters[parameter]))
  return fused


def fuse_shapes(shapes: Shapes, fused: list[Fused]) -> Shapes:
  """Returns what a file holds where pairs are fused."""
  alone = dict(shapes)
  for key in _keys(fused):
    del alone[key]
  return {**alone, **{k: s for f in fused for k, s in f.fuse(shapes).items()}}


def split_tensors(tensors: Tensors, fused: list[Fused]) -> Tensors:
  """Returns the tensors of a file, those of single modules for fused ones."""
  return {
    **tensors,
    **{k: t for f in fused for k, t in f.split(tensors).items()},
  }


def _keys(fused: list[Fused]) -> Iterator[str]:
  for pair in fused:
    for modules in pair.parts:
      for module in modules:
        yield _key(module, _A)
        yield _key(module, _B)


def _key(module: str, end: str) -> str:
  return f'base_model.model.{module}.{end}'
