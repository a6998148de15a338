"""Rules for how leaves are cut, and how one is followed.

A rule names, for each axis of a leaf, the mesh axes that cut it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from jlora.core.quantized import is_quantized
from jlora.errors import ConfigError

Names = tuple[str | tuple[str, ...] | None, ...]
# (pattern over whole leaf paths, mesh axes or None for each axis of the leaf;
# () for a side that takes what has no equal parts on the other)
Rules = tuple[tuple[str, Names], ...]
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
    if devices_along(mesh, (name,)) == 1:
      continue
    for side in (axis, *_other_side(axis, names)):
      if units[side] % devices_along(mesh, (*cuts[side], name)) == 0:
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


def devices_along(mesh: Mesh, names: Iterable[str]) -> int:
  """Returns the number of devices along some axes of a mesh.

  Args:
    mesh: The devices.
    names: The axes.

  Raises:
    ConfigError: The mesh lacks one.
  """
  for name in names:
    if name not in mesh.shape:
      raise ConfigError(
        f'a sharding rule names {name!r}, and the mesh has'
        f' {", ".join(mesh.shape)}; use one of these'
      )
  return math.prod(mesh.shape[name] for name in names)


def rule_of(path: str, rules: Rules) -> Names:
  """Returns what the first rule that matches a leaf says.

  Args:
    path: The leaf's.
    rules: In this order.

  Raises:
    ConfigError: None matches.
  """
  for pattern, names in rules:
    if re.fullmatch(pattern, path):
      return names
  raise ConfigError(
    f'no sharding rule matches {path!r}; end the rules with one for the rest,'
    " such as ('.*', ())"
  )
