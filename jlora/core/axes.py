"""What the axes of a kernel are for: stacked, input or output.

Roles read `'stacked | input -> output'`, each side one or more names, such as
`'layers | embed -> heads head_dim'`. Everything else in `core` sees a kernel
as `[..., in, out]`, with the axes of each side flattened.
"""

import dataclasses
import math
import re

from jlora.errors import ConfigError

Axes = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Roles:
  """Names of a kernel's axes, in the kernel's order.

  Attributes:
    stacked: Axes over layers or experts, each of which is adapted alone.
    inputs: Axes that a linear layer sums over.
    outputs: Axes that it produces; a single `vocab` marks an output head.
  """

  stacked: tuple[str, ...]
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]

  @property
  def is_head(self) -> bool:
    """Whether the kernel makes logits."""
    return self.outputs == ('vocab',)

  def split(
    self, shape: tuple[int, ...]
  ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of the stacked, the input and the output axes."""
    first, last = len(self.stacked), len(shape) - len(self.outputs)
    return shape[:first], shape[first:last], shape[last:]


def parse_roles(text: str) -> Roles:
  """Reads `'stacked | input -> output'`; the stacked part may be missing.

  Args:
    text: Roles as above.

  Raises:
    ConfigError: A side is empty, or the text has another form.
  """
  stacked, bar, sides = text.rpartition('|')
  inputs, arrow, outputs = sides.partition('->')
  names = (stacked.split(), inputs.split(), outputs.split())
  whole = arrow and names[1] and names[2] and (names[0] or not bar)
  if not whole or '->' in outputs:
    raise ConfigError(
      f"axis roles {text!r} must read 'stacked | input -> output', such as"
      " 'layers | embed -> heads head_dim'"
    )
  return Roles(*map(tuple, names))


def roles_of(path: str, shape: tuple[int, ...], axes: Axes) -> Roles:
  """Returns the roles of one kernel: the first entry of `axes` that matches.

  Args:
    path: The kernel's path.
    shape: The kernel's shape. Two axes need no entry: they are `in -> out`.
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
  if len(shape) == 2:
    return Roles((), ('in',), ('out',))
  raise ConfigError(
    f'{path!r} of shape {shape} has {len(shape)} axes, and nothing says which'
    f' are inputs; add axes=(({re.escape(path)!r}, {_example(len(shape))!r}),)'
    ' with the names in the order of the shape'
  )


def _checked(path: str, shape: tuple[int, ...], text: str) -> Roles:
  roles = parse_roles(text)
  named = len(roles.stacked) + len(roles.inputs) + len(roles.outputs)
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
