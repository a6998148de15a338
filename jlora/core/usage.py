"""What a traced program does with its parameters' axes.

`infer_axes` follows each parameter through changes of layout, loops and calls
to the first product that uses it, and reads there which axes are summed over.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core as jex

from jlora.core.axes import Axes
from jlora.core.tracing import trace
from jlora.core.tracks import (
  Track,
  Use,
  axes_of,
  make_track,
  part_of,
  relaid,
)
from jlora.core.views import LAYOUT, Atom, View


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any) -> Axes:
  """Returns the axis roles of the kernels of a model that is not ours.

  Args:
    fn: A function of `params` and `args`, such as
      `lambda params, x: model.apply({'params': params}, x)`.
    params: Tree of arrays or ShapeDtypeStructs.
    *args: What else it takes. Arrays are traced; nothing is computed.

  Returns:
    Pairs of a path, as a pattern, and roles, for `LoraSpec.axes` and
    `QuantSpec.axes`: one for each leaf of two axes or more that is multiplied,
    convolved or looked up. A loop's axis is called `layers`, one that goes in
    parallel `experts`; of a table that is looked up, the roles are `vocab ->
    embed`. That an output is a head cannot be seen: exclude it by its path.

  Example:
    >>> axes = jlora.infer_axes(fn, params, tokens)
    >>> spec = jlora.LoraSpec(targets='.*kernel', axes=axes)
  """
  program = trace(fn, (params, *args), {})
  tracks = [
    make_track(path.removeprefix('0/'), leaf.shape)
    if path.startswith('0/') and len(leaf.shape) > 1
    else None
    for path, leaf in zip(program.paths, program.inputs, strict=True)
  ]
  reader = _Reader()
  reader.read(program.closed.jaxpr, tracks)
  return tuple(
    (re.escape(track.path), reader.found[track.path].roles.text)
    for track in tracks
    if track is not None and track.path in reader.found
  )


class _Reader:
  """Follows parameters through a program and notes how each is used.

  Attributes:
    found: The first use of each parameter, or the lookup where there is one.
  """

  def __init__(self) -> None:
    self.found: dict[str, Use] = {}

  def read(
    self, jaxpr: jex.Jaxpr, tracks: Sequence[Track | None]
  ) -> list[Track | None]:
    """Reads a program whose inputs are the parameters `tracks`."""
    known = dict(zip(jaxpr.invars, tracks, strict=True))

    def of(atom: Any) -> Track | None:
      return None if isinstance(atom, jex.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
      operands = [of(atom) for atom in equation.invars]
      if any(operands):
        results = self._follow(equation, operands)
        known.update(zip(equation.outvars, results, strict=False))
    return [of(atom) for atom in jaxpr.outvars]

  def note(
    self,
    track: Track,
    inputs: Iterable[int],
    parallel: Iterable[int],
    *,
    is_lookup: bool = False,
  ) -> None:
    """Notes a use of a parameter unless it has one already.

    Args:
      track: The parameter.
      inputs: Its axes that are summed over.
      parallel: Those that go in parallel.
      is_lookup: Whether its rows are looked up.
    """
    looped, parallel, inputs = map(frozenset, (track.looped, parallel, inputs))
    use = Use(track.ndim, looped, parallel, inputs, is_lookup)
    if not use.roles.inputs or not use.roles.outputs:
      return
    if track.path not in self.found or use.is_lookup:
      self.found[track.path] = use

  def _follow(
    self, equation: jex.JaxprEqn, operands: list[Track | None]
  ) -> Sequence[Track | None]:
    name = equation.primitive.name
    if name in LAYOUT:
      return [relaid(operands[0], name, equation.params)]
    if name in _PASSING:
      return operands
    if name in _PARTS:
      return [part_of(operands[0], var.aval.shape) for var in equation.outvars]
    if name in _USES:
      return _USES[name](self, equation, operands)
    return self._enter(equation, operands)

  def _enter(
    self, equation: jex.JaxprEqn, operands: list[Track | None]
  ) -> Sequence[Track | None]:
    """Reads the programs that an equation holds."""
    params = equation.params
    match equation.primitive.name:
      case 'scan':
        first = params['num_consts'] + params['num_carry']
        loops = [x and x.enters(0) for x in operands[first:]]
        self.read(params['jaxpr'].jaxpr, [*operands[:first], *loops])
      case 'while':
        first, count = params['cond_nconsts'], params['body_nconsts']
        carry = operands[first + count :]
        self.read(params['cond_jaxpr'].jaxpr, [*operands[:first], *carry])
        self.read(params['body_jaxpr'].jaxpr, operands[first:])
      case 'cond':
        for branch in params['branches']:
          self.read(branch.jaxpr, operands[1:])
      case _:
        inner = params.get('jaxpr', params.get('call_jaxpr'))
        inner = getattr(inner, 'jaxpr', inner)
        if isinstance(inner, jex.Jaxpr) and len(inner.invars) == len(operands):
          return self.read(inner, operands)
    return []


# Primitives that return their operands, and those that return parts of one.
_PASSING = ('convert_element_type', 'optimization_barrier', 'rev')
_PARTS = ('dynamic_slice', 'slice', 'split')


Results = Sequence[Track | None]


def _dot_general(
  reader: _Reader, equation: jex.JaxprEqn, operands: list[Track | None]
) -> Results:
  contracted, batch = equation.params['dimension_numbers']
  for side, track in enumerate(operands):
    if track is not None:
      _note_product(reader, track, contracted[side], batch[side])
  return []


def _note_product(
  reader: _Reader, track: Track, summed: Sequence[int], batch: Sequence[int]
) -> None:
  groups = track.view.groups
  inputs = [a for axis in summed for a in axes_of(groups[axis])]
  parallel = [a for axis in batch for a in axes_of(groups[axis])]
  reader.note(track, inputs, parallel)


def _ragged_dot(
  reader: _Reader, equation: jex.JaxprEqn, operands: list[Track | None]
) -> Results:
  numbers = equation.params['ragged_dot_dimension_numbers']
  (_, summed), _ = numbers.dot_dimension_numbers
  if operands[1] is not None:
    _note_product(reader, operands[1], summed, numbers.rhs_group_dimensions)
  return []


def _convolution(
  reader: _Reader, equation: jex.JaxprEqn, operands: list[Track | None]
) -> Results:
  _, *summed = equation.params['dimension_numbers'].rhs_spec
  if operands[1] is not None:
    _note_product(reader, operands[1], summed, ())
  return []


def _gather(
  reader: _Reader, equation: jex.JaxprEqn, operands: list[Track | None]
) -> Results:
  """Of a table, a row is looked up; of more axes, a layer is taken."""
  track, numbers = operands[0], equation.params['dimension_numbers']
  if track is None:
    return []
  groups, batch = track.view.groups, numbers.operand_batching_dims
  axis = numbers.start_index_map[0]
  if len(groups) - len(batch) == 2:
    parallel = [a for i in batch for a in axes_of(groups[i])]
    rows = axes_of(groups[axis])
    reader.note(track, rows, parallel, is_lookup=True)
    return []
  if batch or tuple(numbers.collapsed_slice_dims) != (axis,):
    return []
  layer = track.enters(axis)
  taken = iter(layer.view.groups)
  (out,) = equation.outvars
  view = View(
    tuple(
      next(taken) if i in numbers.offset_dims else (Atom(None, size, 0),)
      for i, size in enumerate(out.aval.shape)
    )
  )
  return [dataclasses.replace(layer, view=view)]


_USES: dict[str, Callable[..., Results]] = {
  'conv_general_dilated': _convolution,
  'dot_general': _dot_general,
  'gather': _gather,
  'ragged_dot_general': _ragged_dot,
}
