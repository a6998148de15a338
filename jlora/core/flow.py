"""A lazy leaf on its way through a traced program, and parts of it."""

import dataclasses
import functools
from typing import Any

import jax

from jlora.core.lazy import (
  LazyArray,
  RowsArray,
  dense_matrix,
  in_size,
  out_size,
)
from jlora.core.linear import matrix_of
from jlora.core.quantized import QuantizedArray, single_level
from jlora.core.views import IN, OUT, Atom, View, make_view


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('leaf',),
  meta_fields=('path', 'view'),
)
@dataclasses.dataclass(frozen=True)
class Flow:
  """A lazy leaf and the layout in which the program sees it.

  Every stacked axis of the leaf is one whole atom of the view; one of size 1
  is gone from both.

  Attributes:
    leaf: The kernel.
    path: Where it stood in the arguments, for reports.
    view: The layout.
  """

  leaf: LazyArray
  path: str
  view: View

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the program sees."""
    return self.view.shape

  def dense(self) -> jax.Array:
    """Returns that array."""
    return self.view.arrange(dense_matrix(self.leaf))

  def with_leaf(self, leaf: LazyArray) -> 'Flow':
    """Returns another kernel of the same sizes in the same layout."""
    return dataclasses.replace(self, leaf=leaf)

  def seen_as(self, view: View) -> 'Flow':
    """Returns the same kernel in another layout.

    Args:
      view: May split a stacked axis, as into groups of layers: the leaf is
        then stacked likewise.
    """
    before = self.leaf.stacked
    atoms = [a for axis in range(len(before)) for a in view.of_axis(axis)]
    names = {atom: Atom(i, atom.size, 1) for i, atom in enumerate(atoms)}
    view = View(tuple(tuple(names.get(a, a) for a in g) for g in view.groups))
    leaf, after = self.leaf, tuple(atom.size for atom in atoms)
    if after != before:
      leaf = jax.tree.map(
        lambda x: x.reshape(*after, *x.shape[len(before) :]), leaf
      )
    return Flow(leaf, self.path, view)


def make_flow(leaf: LazyArray, path: str) -> Flow:
  """Returns a leaf as the program first sees it.

  Args:
    leaf: A lazy leaf.
    path: Where it stands in the arguments.
  """
  view = make_view(leaf.stacked, leaf.inputs, leaf.outputs, leaf.order)
  return Flow(leaf, path, view).seen_as(view)


def unstack(flow: Flow) -> tuple[LazyArray, View] | None:
  """Takes the first axis of what the program sees as one to loop over.

  Args:
    flow: A kernel.

  Returns:
    The leaf with that stacked axis first in every field, and what the program
    sees of one layer; None where that axis is not a stacked one.
  """
  (group, *rest), leaf = flow.view.groups, flow.leaf
  if len(group) != 1 or (axis := group[0].axis) is None or axis < 0:
    return None
  leaf = jax.tree.map(lambda x: jax.numpy.moveaxis(x, axis, 0), leaf)
  names = {k: k - 1 for k in range(axis + 1, len(leaf.stacked))}
  return leaf, View(tuple(rest)).renamed(names)


@dataclasses.dataclass(frozen=True)
class Cut:
  """A part of an axis.

  Attributes:
    start: Its first entry; traced, for a dynamic one.
    size: Number of entries.
    step: From one entry to the next.
  """

  start: Any
  size: int
  step: int = 1

  def __call__(self, array: jax.Array, axis: int) -> jax.Array:
    """Returns the part of an array along one axis."""
    if not isinstance(self.start, int):
      return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis)
    stop = self.start + (self.size - 1) * self.step + 1
    return jax.lax.slice_in_dim(array, self.start, stop, self.step, axis)


def cut(flow: Flow, axis: int, part: Cut) -> Flow | None:
  """Returns a part of a kernel along one axis of what the program sees.

  Args:
    flow: A kernel.
    axis: Of the array that the program sees.
    part: Which part; below the axis' size.

  Returns:
    None where the part cannot be had without forming the kernel: of several
    axes at once, or of 4-bit codes within a block.
  """
  group = flow.view.groups[axis]
  if len(group) > 1:
    return None
  (atom,) = group or (Atom(None, 1, 0),)
  smaller = resized(flow.view, axis, atom, part.size)
  if atom.axis is None:
    return flow.seen_as(smaller)
  if atom.axis >= 0:
    leaf = jax.tree.map(lambda x: part(x, atom.axis), flow.leaf)
    return Flow(leaf, flow.path, flow.view).seen_as(smaller)
  matrix_part = MatrixPart(atom, part)
  if not matrix_part.is_possible(flow.leaf):
    return None
  return Flow(matrix_part.of_leaf(flow.leaf), flow.path, smaller)


def resized(view: View, axis: int, atom: Atom, size: int) -> View:
  """Returns the view once an atom, alone on its axis, has another size.

  Args:
    view: Before.
    axis: Where the atom is.
    atom: Before.
    size: Its new number of entries.
  """

  def visit(other: Atom) -> Atom:
    if other.axis != atom.axis or other.stride <= atom.stride:
      return other
    return other._replace(stride=other.stride // atom.size * size)

  groups = [tuple(map(visit, group)) for group in view.groups]
  groups[axis] = (atom._replace(size=size),) if size > 1 else ()
  return View(tuple(groups))


@dataclasses.dataclass(frozen=True)
class MatrixPart:
  """A part of `in` or `out` of a kernel in matrix form.

  Attributes:
    atom: What is cut, one of the factors of that axis.
    part: Which of its entries stay.
  """

  atom: Atom
  part: Cut

  def is_possible(self, leaf: LazyArray) -> bool:
    """Whether the part can be had without forming the kernel."""
    if isinstance(leaf, RowsArray):
      return False
    if self.atom.axis == OUT:
      return True
    if isinstance(leaf, QuantizedArray):
      return self._is_of_whole_blocks(leaf)
    if leaf.magnitude is not None:
      return False  # a column's length is that of the whole column
    quantized = isinstance(leaf.base, QuantizedArray)
    return not quantized or self._is_of_whole_blocks(leaf.base)

  def _is_of_whole_blocks(self, leaf: QuantizedArray) -> bool:
    part, (_, size, stride) = self.part, self.atom
    if not isinstance(part.start, int) or part.step > 1:
      return False
    first, stop = part.start * stride, (part.start + part.size) * stride
    slowest = size * stride == in_size(leaf)
    ends = stop % leaf.block_size == 0 or stop == in_size(leaf)
    return slowest and first % leaf.block_size == 0 and ends

  def of_leaf(self, leaf: Any) -> Any:
    """Returns a leaf with that part only, in matrix form."""
    inputs, outputs = in_size(leaf), out_size(leaf)
    if self.atom.axis == IN:
      inputs = inputs // self.atom.size * self.part.size
    else:
      outputs = outputs // self.atom.size * self.part.size
    sizes = {'inputs': (inputs,), 'outputs': (outputs,), 'order': ()}
    if isinstance(leaf, QuantizedArray):
      leaf = single_level(leaf)
      fields = {
        'codes': self.of_field(leaf.codes, leaf.codes_per_byte),
        'scales': self.of_field(leaf.scales, leaf.block_size),
      }
      return dataclasses.replace(leaf, **fields, **sizes)
    names = ('a',) if self.atom.axis == IN else ('b', 'magnitude')
    fields = {name: getattr(leaf, name) for name in names}
    fields = {
      k: v if v is None else self.of_field(v) for k, v in fields.items()
    }
    if isinstance(leaf.base, QuantizedArray):
      fields['base'] = self.of_leaf(leaf.base)
    else:
      fields['base'] = self.of_field(matrix_of(leaf.kernel))
    return dataclasses.replace(leaf, **fields, **sizes)

  def of_field(self, array: jax.Array, rows: int = 1) -> jax.Array:
    """Returns the part of a field along the axis that is cut.

    Args:
      array: [..., in, out], or [..., in / rows, out].
      rows: Of the kernel for each of the array's, where `in` is cut.
    """
    part, (axis, size, stride) = self.part, self.atom
    if axis == IN and rows > 1:
      count = -(-part.size * stride // rows)
      return Cut(part.start * stride // rows, count)(array, IN)
    axis += array.ndim
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    factors = array.reshape(*before, -1, size, stride, *after)
    return part(factors, axis + 1).reshape(*before, -1, *after)
