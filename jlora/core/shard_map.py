"""The rule of `shard_map`: each shard gets its part of a lazy leaf.

A field is split where the kernel is: over a stacked axis all of them, over the
inputs `a`, over the outputs `b` and the magnitude, the frozen kernel over both.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.core.flow import Cut, Flow, MatrixPart, resized
from jlora.core.lazy import LazyArray, in_size, is_lazy, out_size
from jlora.core.quantized import QuantizedArray
from jlora.core.views import IN, OUT, Atom, View

# Fields of a leaf -> their axes after the stacked ones.
_AXES = {
  'a': (IN, None),
  'b': (None, OUT),
  'base': (IN, OUT),
  'codes': (IN, OUT),
  'key': (),
  'magnitude': (OUT,),
  'offset': (),
  'scale': (),
  'scales': (IN, OUT),
  'scales2': (),
}


def shard_map(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
  """Lazy leaves are split like the kernels that they stand for."""
  params = equation.params
  mesh, specs = params['mesh'], params['in_specs']
  shards = [
    _split(x, spec, mesh, params['check_vma']) if isinstance(x, Flow) else None
    for x, spec in zip(operands, specs, strict=True)
  ]
  plain = [
    x if shard else evaluate.dense(x, equation)
    for x, shard in zip(operands, shards, strict=True)
  ]

  def run(*inner: Any) -> list[jax.Array]:
    inputs = [
      shard.local(x) if shard else x
      for x, shard in zip(inner, shards, strict=True)
    ]
    found = evaluate(params['jaxpr'], (), inputs)
    return [evaluate.dense(x, equation) for x in found]

  mapped = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=tuple(
      shard.specs if shard else spec
      for shard, spec in zip(shards, specs, strict=True)
    ),
    out_specs=list(params['out_specs']),
    axis_names=params['newly_manual_axes'],
    check_vma=params['check_vma'],
  )
  return mapped(
    *(
      shard.flow.leaf if shard else x
      for x, shard in zip(plain, shards, strict=True)
    )
  )


def pvary(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
  """What varies over a mesh axis is every field of a lazy leaf."""
  (kernel,) = operands
  cast = functools.partial(
    jax.lax.pcast, axis_name=equation.params['axes'], to='varying'
  )
  return [kernel.with_leaf(jax.tree.map(cast, kernel.leaf))]


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A lazy leaf that is split over a mesh.

  Attributes:
    flow: The whole leaf, in a form whose fields can be split.
    view: What the inner program sees of one shard.
    shards: How many parts `in` and `out` have.
    splits: Mesh axes by axis of the matrix form.
    varies: Whether JAX keeps account of what varies over the mesh.
  """

  flow: Flow
  view: View
  shards: tuple[int, int]
  splits: dict[int, tuple[str, ...]]
  varies: bool

  @property
  def specs(self) -> Any:
    """The leaf with a PartitionSpec in the place of each field."""
    return self._specs(self.flow.leaf)

  def _specs(self, leaf: LazyArray) -> Any:
    stacked = [self.splits.get(k) for k in range(len(leaf.stacked))]
    fields = {}
    for name, axes in _AXES.items():
      value = getattr(leaf, name, None)
      if isinstance(value, QuantizedArray):
        fields[name] = self._specs(value)
      elif value is not None:
        fields[name] = P(*stacked, *map(self.splits.get, axes))
    return dataclasses.replace(leaf, **fields)

  def local(self, leaf: LazyArray) -> Flow:
    """Returns one shard of the leaf as the inner program sees it."""
    if self.varies:
      leaf = jax.tree.map(self._vary, leaf, self.specs)
    view = self.view.without_units()
    return Flow(self._resized(leaf), self.flow.path, self.view).seen_as(view)

  def _vary(self, field: jax.Array, spec: P) -> jax.Array:
    """Returns a field that varies over all mesh axes that split the kernel."""
    every = {name for split in self.splits.values() for name in split}
    own = {name for split in spec for name in _names(split)}
    missing = tuple(sorted(every - own))
    return jax.lax.pcast(field, missing, to='varying') if missing else field

  def _resized(self, leaf: LazyArray) -> LazyArray:
    if self.shards == (1, 1):
      return leaf
    base = getattr(leaf, 'base', None)
    fields = {'base': self._resized(base)} if is_lazy(base) else {}
    return dataclasses.replace(
      leaf,
      inputs=(in_size(leaf) // self.shards[0],),
      outputs=(out_size(leaf) // self.shards[1],),
      **fields,
    )


def _split(flow: Flow, spec: P, mesh: Mesh, varies: bool) -> _Shard | None:
  """Returns how a leaf is split, or None where the kernel must be formed."""
  view, splits, shards = flow.view, {}, {IN: 1, OUT: 1}
  for axis, names in enumerate(spec):
    names = _names(names)
    count = math.prod(mesh.shape[name] for name in names)
    group = view.groups[axis]
    if count == 1 or not group:
      continue
    atom = group[0]
    if len(group) > 1 or not _can_split(flow.leaf, atom, count):
      return None
    view = resized(view, axis, atom, atom.size // count)
    if atom.axis in shards:
      shards[atom.axis] = count
    if atom.axis is not None:
      splits[atom.axis] = names
  if shards != {IN: 1, OUT: 1}:
    flow = flow.with_leaf(_in_matrix_form(flow.leaf))
  return _Shard(flow, view, (shards[IN], shards[OUT]), splits, varies)


def _names(split: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  return (split,) if isinstance(split, str) else tuple(split or ())


def _can_split(leaf: LazyArray, atom: Atom, count: int) -> bool:
  """Whether an axis can be split without forming the kernel."""
  if atom.axis is None or atom.axis >= 0:
    return True
  size = in_size(leaf) if atom.axis == IN else out_size(leaf)
  slowest = atom.size * atom.stride == size
  part = MatrixPart(atom, Cut(0, atom.size // count))
  return slowest and part.is_possible(leaf)


def _in_matrix_form(leaf: LazyArray) -> LazyArray:
  size = out_size(leaf)
  return MatrixPart(Atom(OUT, size, 1), Cut(0, size)).of_leaf(leaf)
