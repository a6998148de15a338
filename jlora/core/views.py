"""What a program sees of a kernel: its axes transposed, split or merged.

A kernel in matrix form is `[*stacked, in, out]`. A program sees an array that
has the same numbers in another layout, such as `[out, in]` or `[heads, in,
head_dim]`. A `View` says where each axis of that array lies in the matrix, so
that layout operations cost nothing until a product asks.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.core.axes import array_axes

# Axes of the matrix form beside the stacked ones, which count from 0.
IN, OUT = -2, -1


class Atom(NamedTuple):
  """A part of an axis of the matrix form that a view keeps together.

  Attributes:
    axis: A stacked axis from 0, `IN`, `OUT`, or None for a broadcast.
    size: Number of entries.
    stride: Steps along the axis from one entry to the next.
  """

  axis: int | None
  size: int
  stride: int


@dataclasses.dataclass(frozen=True)
class View:
  """The layout of an array that stands for a kernel.

  Attributes:
    groups: For each axis of the array, the atoms that it runs over, the
      slowest first. An axis of size 1 has none.
  """

  groups: tuple[tuple[Atom, ...], ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array."""
    return tuple(math.prod(atom.size for atom in g) for g in self.groups)

  @property
  def atoms(self) -> list[Atom]:
    """All atoms in the order of the array."""
    return [atom for group in self.groups for atom in group]

  def of_axis(self, axis: int) -> list[Atom]:
    """Returns the atoms of one axis of the matrix form, the slowest first."""
    found = [atom for atom in self.atoms if atom.axis == axis]
    return sorted(found, key=lambda atom: -atom.stride)

  def without_units(self) -> 'View':
    """Returns the view without atoms of size 1."""
    return View(tuple(map(_group, self.groups)))

  def renamed(self, names: dict[int, int]) -> 'View':
    """Returns the view with its axes renamed."""
    return View(
      tuple(
        tuple(a._replace(axis=names.get(a.axis, a.axis)) for a in group)
        for group in self.groups
      )
    )

  def arrange(self, matrix: jax.Array) -> jax.Array:
    """Returns the array that the view shows of a kernel in matrix form.

    Args:
      matrix: [*stacked, in, out], the stacked axes of size 1 left out.
    """
    real = [atom for atom in self.atoms if atom.axis is not None]
    lying = sorted(real, key=position)
    array = matrix.reshape([atom.size for atom in lying])
    array = array.transpose([lying.index(atom) for atom in real])
    spread = [1 if a.axis is None else a.size for a in self.atoms]
    array = jnp.broadcast_to(
      array.reshape(spread), [a.size for a in self.atoms]
    )
    return array.reshape(self.shape)


def position(atom: Atom) -> tuple[bool, int, int]:
  """Returns what sorts atoms into the order of the matrix form."""
  return atom.axis < 0, atom.axis, -atom.stride


def make_view(
  stacked: tuple[int, ...],
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  order: tuple[int, ...],
) -> View:
  """Returns the view of a kernel as its model stores it.

  Args:
    stacked: Sizes of the stacked axes.
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    order: As in `Roles`.
  """
  atoms = [Atom(axis, size, 1) for axis, size in enumerate(stacked)]
  for axis, sizes in ((IN, inputs), (OUT, outputs)):
    for i, size in enumerate(sizes):
      atoms.append(Atom(axis, size, math.prod(sizes[i + 1 :])))
  axes = array_axes(order, len(atoms))
  return View(tuple(_group([atoms[axis]]) for axis in axes))


def _group(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
  return tuple(atom for atom in atoms if atom.size > 1)


def reshape(view: View, shape: tuple[int, ...]) -> View | None:
  """Returns the view of the reshaped array.

  Args:
    view: Of the array before.
    shape: Of the array after.

  Returns:
    None where an axis of the result would hold parts of an atom that do not
    lie together.
  """
  rest = view.atoms
  groups = []
  for size in shape:
    group = []
    while size > 1:
      atom = rest.pop(0)
      inner = atom.size // math.gcd(atom.size, size)
      if inner > 1 and atom.size != inner * size:
        return None
      group.append(Atom(atom.axis, atom.size // inner, atom.stride * inner))
      if inner > 1:
        rest.insert(0, atom._replace(size=inner))
      size //= atom.size // inner
    groups.append(tuple(group))
  return View(tuple(groups))


def _transpose(view: View, params: dict[str, Any]) -> View:
  return View(tuple(view.groups[i] for i in params['permutation']))


def _reshape(view: View, params: dict[str, Any]) -> View | None:
  if params['dimensions'] is not None:
    view = View(tuple(view.groups[i] for i in params['dimensions']))
  return reshape(view, params['new_sizes'])


def _squeeze(view: View, params: dict[str, Any]) -> View:
  dropped = params['dimensions']
  kept = [g for i, g in enumerate(view.groups) if i not in dropped]
  return View(tuple(kept))


def _broadcast_in_dim(view: View, params: dict[str, Any]) -> View:
  groups = [_group([Atom(None, size, 0)]) for size in params['shape']]
  for group, axis in zip(
    view.groups, params['broadcast_dimensions'], strict=True
  ):
    groups[axis] = group or groups[axis]
  return View(tuple(groups))


def _same(view: View, params: dict[str, Any]) -> View:
  return view


# Primitives that only change the layout: (view, parameters) -> view or None.
LAYOUT = {
  'broadcast_in_dim': _broadcast_in_dim,
  'copy': _same,
  'copy_p': _same,
  'name': _same,
  'reshape': _reshape,
  'sharding_constraint': _same,
  'squeeze': _squeeze,
  'transpose': _transpose,
}
