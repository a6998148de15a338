"""What lies where on a mesh: rules for kernels, and all that follows them.

A rule names, for each axis of a leaf, the mesh axes that cut it. Codes and
scales are cut as their kernel is, on whole blocks; `a` as the kernel's input
axis and `b` as its output axis; an optimizer's moments as what they belong to.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.core import tree
from jlora.core.linear import Adapter
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantized import is_quantized
from jlora.core.state import TrainState
from jlora.errors import ConfigError

Names = tuple[str | tuple[str, ...] | None, ...]
# (pattern over whole leaf paths, mesh axes or None for each axis of the leaf;
# () for a side that takes what has no equal parts on the other)
Rules = tuple[tuple[str, Names], ...]
# Mesh axes whose devices work on other rows, so that each needs the kernel.
ROWS = ('data', 'fsdp')

Cuts = tuple[tuple[str, ...], ...]  # mesh axes for each axis of an array


@dataclasses.dataclass(frozen=True)
class Placement:
  """How one leaf is cut.

  Attributes:
    cuts: Mesh axes for each axis of the leaf; a kernel in matrix form.
    note: What of its rule could not be followed, and what was done instead.
  """

  cuts: Cuts
  note: str = ''


def place(path: str, leaf: Any, names: Names, mesh: Mesh) -> Placement:
  """Returns how a leaf is cut on a mesh.

  Where an axis has no equal parts (of whole blocks, for a quantized kernel's
  inputs), its mesh axis moves to the other side of the kernel unless the rule
  is None there; where there are none either, it does not cut the leaf.

  Args:
    path: The leaf's, for errors.
    leaf: An array or a QuantizedArray, or the shapes of one.
    names: What a rule says.
    mesh: The devices.

  Raises:
    ConfigError: The rule is for a leaf with another number of axes, or names
      an axis that the mesh does not have.
  """
  units = _units(leaf)
  if names and len(names) != len(units):
    raise ConfigError(
      f'the sharding rule {names} is for {len(names)} axes, and {path!r} has'
      f' {len(units)}; give one entry for each'
    )
  cuts: list[tuple[str, ...]] = [()] * len(units)
  notes = []
  for axis, name in _pairs(names):
    if _devices(mesh, (name,)) == 1:
      continue
    for side in (axis, *_other_side(axis, names)):
      if units[side] % _devices(mesh, (*cuts[side], name)) == 0:
        cuts[side] = (*cuts[side], name)
        break
    else:
      side = None
    if side != axis:
      what = 'does not cut it' if side is None else f'cuts axis {side} instead'
      notes.append(f'{name} ({units[axis]} parts on axis {axis}) {what}')
  return Placement(tuple(cuts), '; '.join(notes))


def _pairs(names: Names) -> Iterator[tuple[int, str]]:
  """Yields each axis of a leaf with each mesh axis that should cut it."""
  for axis, entry in enumerate(names):
    for name in (entry,) if isinstance(entry, str) else entry or ():
      yield axis, name


def _other_side(axis: int, names: Names) -> tuple[int, ...]:
  """Returns a kernel's output axis for its input axis, and back.

  Only one that its rule cuts too, or could, with (): hidden states would follow
  the width of an embedding that is cut.
  """
  sides = (len(names) - 2, len(names) - 1)
  if axis not in sides:
    return ()
  return tuple(s for s in sides if s != axis and names[s] is not None)


def _units(leaf: Any) -> tuple[int, ...]:
  """Returns for each axis how many parts it can be cut into."""
  if is_quantized(leaf):
    return leaf.scales.shape
  return tuple(leaf.shape)


def _devices(mesh: Mesh, names: Iterable[str]) -> int:
  for name in names:
    if name not in mesh.shape:
      raise ConfigError(
        f'a sharding rule names {name!r}, and the mesh has'
        f' {", ".join(mesh.shape)}; use one of these'
      )
  return math.prod(mesh.shape[name] for name in names)


@dataclasses.dataclass(frozen=True, eq=False)
class Shardings:
  """Where the parameters of a run lie.

  Attributes:
    mesh: The devices.
    placements: By the leaf's path.
    shapes: Of the leaves, by path, for the table.
  """

  mesh: Mesh
  placements: dict[str, Placement]
  shapes: dict[str, tuple[int, ...]]

  def frozen(self, params: Any) -> Any:
    """Returns the shardings of a frozen half, in a tree like it."""

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
      if not (is_frozen_leaf(leaf) or hasattr(leaf, 'shape')):
        return leaf
      return self.of_leaf(tree.join(path), leaf)

    return jax.tree_util.tree_map_with_path(
      visit, params, is_leaf=is_frozen_leaf
    )

  def of_leaf(self, path: str, leaf: Any) -> Any:
    """Returns the sharding of one frozen leaf; of a quantized one, by field."""
    cuts = self.placements[path].cuts
    if not is_quantized(leaf):
      if is_frozen_leaf(leaf):
        return leaf  # a placeholder: there is nothing to place
      return self._named(cuts)
    whole = self._named(cuts[:-2])
    return dataclasses.replace(
      leaf,
      codes=self._named(cuts),
      scales=self._named(cuts),
      scales2=whole if leaf.scales2 is not None else None,
      offset=whole if leaf.offset is not None else None,
    )

  def trainable(self, trainable: Any) -> Any:
    """Returns the shardings of a trainable half, in a tree like it."""

    def visit(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      name, _, kind = tree.join(path).rpartition('/')
      cuts = self.placements[name].cuts
      if kind == 'a':
        cuts = (*cuts[:-1], ())
      elif kind == 'b':
        cuts = (*cuts[:-2], (), cuts[-1])
      elif kind == 'magnitude':
        cuts = (*cuts[:-2], cuts[-1])
      elif kind == 'rows':
        cuts = ((), ())
      return self._named(self._even(cuts, leaf.shape))

    return jax.tree_util.tree_map_with_path(visit, trainable)

  def state(self, state: TrainState) -> TrainState:
    """Returns the shardings of a training state, in a tree like it.

    What an optimizer keeps for each weight lies where the weight does: leaves
    whose path ends in that of a trained one, and which have its shape.
    """
    shapes = tree.leaves_by_path(state.trainable)
    trained = tree.leaves_by_path(self.trainable(state.trainable))

    def visit(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      names = tree.join(path).split('/')
      ends = ('/'.join(names[i:]) for i in range(len(names)))
      end = next((end for end in ends if end in trained), None)
      if end is None or shapes[end].shape != leaf.shape:
        return self._named(())
      return trained[end]

    return jax.tree_util.tree_map_with_path(visit, state)

  def gather(self, path: str, part: Any) -> Any:
    """Brings a part of one layer to all devices with rows of their own.

    What `lift` takes as `gather`: codes are moved and decoded on each device,
    where XLA alone would move decoded kernels, or activations. Cuts along
    'tensor' stay.
    """
    if self.mesh.size == 1:
      return part
    *_, inputs, outputs = self.placements[path.partition('params/')[2]].cuts
    kept = (self._kept(inputs), self._kept(outputs))
    if isinstance(part, Adapter):
      a = self._constrain(part.a, (*kept[:1], ()))
      return part._replace(a=a, b=self._constrain(part.b, ((), *kept[1:])))
    if not is_quantized(part):
      return self._constrain(part, kept)
    return dataclasses.replace(
      part,
      codes=self._constrain(part.codes, kept),
      scales=self._constrain(part.scales, kept),
    )

  def _kept(self, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in ROWS)

  def _constrain(self, array: jax.Array, cuts: Cuts) -> jax.Array:
    """Returns an array [..., in, out] that is cut as said."""
    sharding = self._named(self._even(cuts, array.shape))
    return jax.lax.with_sharding_constraint(array, sharding)

  def title(self) -> str:
    """Returns the title of the table: the axes of the mesh."""
    axes = (f'{name} {size}' for name, size in self.mesh.shape.items())
    return f'parameters over {self.mesh.size} devices: {", ".join(axes)}'

  def rows(self) -> Iterator[tuple[str, str]]:
    """Yields the lines of the table: paths, and how each leaf is cut."""
    for path, placement in self.placements.items():
      shape = zip(self.shapes[path], placement.cuts, strict=True)
      text = ' × '.join(
        f'{size}/{"·".join(names)}' if names else str(size)
        for size, names in shape
      )
      yield path, f'{text}  {placement.note}'.rstrip()

  def _named(self, cuts: Cuts) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*(x or None for x in cuts)))

  def _even(self, cuts: Cuts, shape: tuple[int, ...]) -> Cuts:
    """Returns the cuts without those that leave parts of unequal size."""
    return tuple(
      names if size % _devices(self.mesh, names) == 0 else ()
      for names, size in zip(cuts, shape, strict=True)
    )


def make_shardings(
  params: Mapping[str, Any], rules: Rules, mesh: Mesh
) -> Shardings:
  """Returns where parameters lie.

  Args:
    params: Leaves by path: arrays, QuantizedArrays, or shapes of them.
    rules: The first that matches a leaf decides.
    mesh: The devices.

  Raises:
    ConfigError: No rule matches a leaf, or one does not fit it.
  """
  placements = {
    path: place(path, leaf, _rule_of(path, rules), mesh)
    for path, leaf in params.items()
  }
  shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
  return Shardings(mesh, placements, shapes)


def _rule_of(path: str, rules: Rules) -> Names:
  for pattern, names in rules:
    if re.fullmatch(pattern, path):
      return names
  raise ConfigError(
    f'no sharding rule matches {path!r}; end the rules with one for the rest,'
    " such as ('.*', ())"
  )
