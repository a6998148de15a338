"""What the axes of a kernel are for: stacked, input or output.

Roles read `'stacked | input -> output'`, each side one or more names, such as
`'layers | embed -> heads head_dim'`. Where the array has its axes in another
order, they are named first: `'out in: in -> out'`. Everything else in `core`
sees a kernel as `[..., in, out]`, with the axes of each side flattened.
"""

import dataclasses
import math
import re
from typing import Any

from jlora.errors import ConfigError

Axes = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Roles:
  """Names of a kernel's axes by what they are for.

  The canonical order is `[*stacked, *inputs, *outputs]`.

  Attributes:
    stacked: Axes over layers or experts, each of which is adapted alone.
    inputs: Axes that a linear layer sums over.
    outputs: Axes that it produces; a single `vocab` marks an output head.
    order: For each axis of the array, its place in the canonical order,
      counted from the end (-1 is the last output); empty where the array is
      in the canonical order.
  """

  stacked: tuple[str, ...]
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  order: tuple[int, ...] = ()

  @property
  def is_head(self) -> bool:
    """Whether the kernel makes logits."""
    return self.outputs == ('vocab',)

  @property
  def is_embedding(self) -> bool:
    """Whether the kernel is a table whose rows are looked up."""
    return self.inputs == ('vocab',)

  @property
  def names(self) -> tuple[str, ...]:
    """All names in the canonical order."""
    return (*self.stacked, *self.inputs, *self.outputs)

  @property
  def text(self) -> str:
    """What `parse_roles` reads these roles from."""
    stacked = f'{" ".join(self.stacked)} | ' if self.stacked else ''
    sides = f'{" ".join(self.inputs)} -> {" ".join(self.outputs)}'
    layout = ' '.join(self.names[k] for k in self.order)
    return f'{layout}: {stacked}{sides}' if layout else stacked + sides

  def split(
    self, shape: tuple[int, ...]
  ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of the stacked, the input and the output axes."""
    shape = tuple(shape[i] for i in canonical_axes(self.order, len(shape)))
    first, last = len(self.stacked), len(shape) - len(self.outputs)
    return shape[:first], shape[first:last], shape[last:]


def canonical_axes(order: tuple[int, ...], ndim: int) -> tuple[int, ...]:
  """Returns the permutation that transposes an array to the canonical order.

  Args:
    order: As in `Roles`. An array that lost leading stacked axes keeps the
      order of the whole one.
    ndim: Number of axes of the array.
  """
  kept = [k for k in order if k >= -ndim]
  return tuple(kept.index(k) if kept else ndim + k for k in range(-ndim, 0))


def array_axes(order: tuple[int, ...], ndim: int) -> tuple[int, ...]:
  """Returns the permutation that transposes back from the canonical order.

  Args:
    order: As in `Roles`.
    ndim: Number of axes of the array.
  """
  return tuple(ndim + k for k in order if k >= -ndim) or tuple(range(ndim))


def to_matrices(array: Any, roles: Roles) -> Any:
  """Returns a kernel as its model stores it in the form [*stacked, in, out].

  Args:
    array: The kernel; a NumPy or JAX array.
    roles: Roles of its axes.
  """
  stacked, inputs, outputs = roles.split(array.shape)
  array = array.transpose(canonical_axes(roles.order, array.ndim))
  return array.reshape(*stacked, math.prod(inputs), math.prod(outputs))


def from_matrices(
  matrices: Any,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  order: tuple[int, ...],
) -> Any:
  """Returns a kernel [*stacked, in, out] as its model stores it.

  Args:
    matrices: The kernel; a NumPy or JAX array.
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    order: As in `Roles`.
  """
  array = matrices.reshape(*matrices.shape[:-2], *inputs, *outputs)
  return array.transpose(array_axes(order, array.ndim))


def parse_roles(text: str) -> Roles:
  """Reads `'stacked | input -> output'`; the stacked part may be missing.

  Args:
    text: Roles as above, behind `'names in the order of the array:'` where
      that is another one.

  Raises:
    ConfigError: A side is empty, or the text has another form.
  """
  layout, colon, roles = text.rpartition(':')
  stacked, bar, sides = roles.rpartition('|')
  inputs, arrow, outputs = sides.partition('->')
  names = (stacked.split(), inputs.split(), outputs.split())
  whole = arrow and names[1] and names[2] and (names[0] or not bar)
  if not whole or '->' in outputs:
    raise ConfigError(
      f"axis roles {text!r} must read 'stacked | input -> output', such as"
      " 'layers | embed -> heads head_dim'"
    )
  flat = [name for side in names for name in side]
  order = _order(layout.split(), flat, text) if colon else ()
  return Roles(*map(tuple, names), order=order)


def _order(layout: list[str], names: list[str], text: str) -> tuple[int, ...]:
  """Returns `Roles.order` for axes that lie as `layout` names them."""
  if sorted(layout) != sorted(names) or len(set(names)) < len(names):
    raise ConfigError(
      f'axis roles {text!r} must name the same axes, each once, before and'
      " behind the colon, such as 'out in: in -> out'"
    )
  order = tuple(names.index(name) - len(names) for name in layout)
  return () if layout == names else order


def roles_of(path: str, shape: tuple[int, ...], axes: Axes) -> Roles:
  """Returns the roles of one kernel: the first entry of `axes` that matches.

  Args:
    path: The kernel's path.
    shape: The kernel's shape. Two axes need no entry: they are `in -> out`,
      or `vocab -> embed` in a leaf named `embedding`.
    axes: Ordered pairs of a pattern over whole paths and roles.

  Raises:
    ConfigError: No entry matches a kernel of three axes or more, the kernel
      has fewer than two, or the matched roles name another number of axes.
  """
  if len(shape) < 2:
    raise ConfigError(
      f'{path!r} of shape {shape} is no kernel: an adapter or 4-bit codes need'
      ' an input and an output axis; exclude it, or train it with train_full'
    )
  for pattern, text in axes:
    if re.fullmatch(pattern, path):
      return _checked(path, shape, text)
  if len(shape) == 2 and path.rpartition('/')[2] == 'embedding':
    return Roles((), ('vocab',), ('embed',))
  if len(shape) == 2:
    return Roles((), ('in',), ('out',))
  raise ConfigError(
    f'{path!r} of shape {shape} has {len(shape)} axes, and nothing says which'
    f' are inputs; add axes=(({re.escape(path)!r}, {_example(len(shape))!r}),)'
    ' with the names in the order of the shape'
  )


def _checked(path: str, shape: tuple[int, ...], text: str) -> Roles:
  roles = parse_roles(text)
  named = len(roles.names)
  if named != len(shape):
    raise ConfigError(
      f'axis roles {text!r} name {named} axes, but {path!r} has shape {shape}'
    )
  return roles


def _example(axes: int) -> str:
  return f'{" ".join(["layers"] * (axes - 2))} | in -> out'


def matrix_shape(
  shape: tuple[int, ...], roles: Roles
) -> tuple[tuple[int, ...], int, int]:
  """Returns the stacked sizes and the flattened `in` and `out` of a kernel."""
  stacked, inputs, outputs = roles.split(shape)
  return stacked, math.prod(inputs), math.prod(outputs)
