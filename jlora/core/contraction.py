"""Any `dot_general` with a lazy kernel as products of matrices.

The axes of the input are named by what they meet in the kernel, brought into
the order that the fused op takes, and those of its result into the order that
`dot_general` promises.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.core.flow import Flow
from jlora.core.lazy import LazyArray, in_size, out_size
from jlora.core.views import IN, OUT, Atom, position


class Row(NamedTuple):
  """The name of an axis that only one of both operands has.

  Attributes:
    source: 'x', or 'kernel' for one that the kernel is broadcast over.
    place: Where it stands there.
    size: Number of entries.
  """

  source: str
  place: tuple[int, ...]
  size: int


Name = Atom | Row
Names = list[tuple[Name, ...]]  # what each axis of an array runs over


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a `dot_general` becomes products of matrices.

  Attributes:
    kernel: What each of the kernel's axes runs over.
    contracted: Axes of the input and of the kernel that are summed over.
    batch: Axes of the input and of the kernel that go in parallel.
    transposed: Whether the kernel's outputs are summed over.
  """

  kernel: Names
  contracted: tuple[Sequence[int], Sequence[int]]
  batch: tuple[Sequence[int], Sequence[int]]
  transposed: bool

  @property
  def atoms(self) -> list[Atom]:
    """All atoms of the kernel in the order of the matrix form."""
    found = [n for names in self.kernel for n in names if isinstance(n, Atom)]
    return sorted(found, key=position)

  @property
  def stacked(self) -> list[Atom]:
    """The kernel's stacked axes."""
    return [atom for atom in self.atoms if atom.axis >= 0]

  def side(self, *, summed: bool) -> list[Atom]:
    """Returns the atoms that are summed over, or the ones produced."""
    axis = OUT if summed == self.transposed else IN
    return [atom for atom in self.atoms if atom.axis == axis]


def plan(
  kernel: Flow,
  contracted: tuple[Sequence[int], Sequence[int]],
  batch: tuple[Sequence[int], Sequence[int]],
) -> Plan | None:
  """Returns how to do a `dot_general`, the kernel's axes named second.

  Args:
    kernel: The lazy operand.
    contracted: Axes of the other operand and of the kernel.
    batch: Likewise.

  Returns:
    None unless exactly one side of the kernel is summed over, and what goes in
    parallel is stacked or broadcast.
  """
  groups = kernel.view.groups
  names: Names = [
    tuple(
      Row('kernel', (axis, i), atom.size) if atom.axis is None else atom
      for i, atom in enumerate(group)
    )
    for axis, group in enumerate(groups)
  ]
  summed = [name for axis in contracted[1] for name in names[axis]]
  parallel = [name for axis in batch[1] for name in names[axis]]
  if any(isinstance(n, Row) for n in summed):
    return None
  if any(isinstance(n, Atom) and n.axis < 0 for n in parallel):
    return None
  sizes = {IN: in_size(kernel.leaf), OUT: out_size(kernel.leaf)}
  size = math.prod(name.size for name in summed)
  axes = {name.axis for name in summed} or {
    axis for axis in (OUT, IN) if sizes[axis] == 1
  }
  axis = min(axes, default=0)
  if (
    axis not in sizes
    or len({n.axis for n in summed}) > 1
    or sizes[axis] != size
  ):
    return None
  return Plan(names, contracted, batch, transposed=axis == OUT)


def run(
  plan: Plan,
  multiply: Callable[[jax.Array, LazyArray], jax.Array],
  x: jax.Array,
  leaf: LazyArray,
  *,
  kernel_first: bool,
) -> jax.Array:
  """Does what a plan says.

  Args:
    plan: From `plan`.
    multiply: Multiplies rows by one unstacked kernel.
    x: The other operand.
    leaf: The kernel.
    kernel_first: Whether the kernel is the first operand.

  Returns:
    The result, its axes split into what the kernel's axes run over.
  """
  names = _names_of_x(plan, x)
  every = [name for axis in names for name in axis]
  batched = [atom for atom in plan.stacked if atom in every]
  rows = [name for name in every if isinstance(name, Row)]
  x = _arrange(
    x.reshape([n.size for n in every]),
    every,
    [*batched, *rows, *plan.side(summed=True)],
  )
  size = math.prod(atom.size for atom in plan.side(summed=True))
  x = x.reshape(*x.shape[: len(batched) + len(rows)], size)
  for atom in reversed(plan.stacked):
    multiply = jax.vmap(multiply, (0 if atom in batched else None, 0))
  y = multiply(x, leaf)
  made = plan.side(summed=False)
  y = y.reshape(*y.shape[:-1], *(atom.size for atom in made))
  return _arrange(
    y, [*plan.stacked, *rows, *made], _result(plan, names, kernel_first)
  )


def _names_of_x(plan: Plan, x: jax.Array) -> Names:
  """Returns what each axis of the input runs over."""
  names: Names = [(Row('x', (i,), size),) for i, size in enumerate(x.shape)]
  for pairs in (plan.contracted, plan.batch):
    for of_x, of_kernel in zip(*pairs, strict=True):
      names[of_x] = plan.kernel[of_kernel]
  return names


def _result(plan: Plan, names: Names, kernel_first: bool) -> list[Name]:
  """Returns what the axes of a `dot_general` run over, one after the other."""
  parallel = [names[axis] for axis in plan.batch[0]]
  used = {*plan.contracted[0], *plan.batch[0]}
  of_x = [n for axis, n in enumerate(names) if axis not in used]
  used = {*plan.contracted[1], *plan.batch[1]}
  of_kernel = [n for axis, n in enumerate(plan.kernel) if axis not in used]
  free = [*of_kernel, *of_x] if kernel_first else [*of_x, *of_kernel]
  return [name for axis in (*parallel, *free) for name in axis]


def _arrange(x: jax.Array, names: list[Name], order: list[Name]) -> jax.Array:
  """Transposes to another order of names; one that is new is broadcast."""
  new = [name for name in order if name not in names]
  x = jnp.broadcast_to(x, (*(name.size for name in new), *x.shape))
  names = [*new, *names]
  return x.transpose([names.index(name) for name in order])
