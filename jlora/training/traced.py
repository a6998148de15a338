"""What can be read off a traced program, before a compiler has seen it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core


def count_flops(jaxpr: Any) -> int:
  """Returns the floating-point operations of all matrix products.

  A product of [m, k] and [k, n] counts 2 m k n, as often as the loop around it
  runs; what is recomputed for a backward pass counts again. Everything else,
  some percent of a decoder's, is left out, and so is what cuDNN does within
  one primitive. Of a kernel whose loops depend on what it reads, such as
  Triton's attention, each loop counts once.

  Args:
    jaxpr: Of a traced function; loops whose length is not known count once.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      left = equation.invars[0].aval.shape
      (contracted, _), _ = params['dimension_numbers']
      depth = math.prod(left[axis] for axis in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
      continue
    if name == 'few_rows_product':
      depth = equation.invars[0].aval.shape[-1]
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
      continue
    if name == 'ragged_dot_general':
      total += _grouped_flops(equation)
      continue
    inner = [count_flops(sub) for sub in _inner(params)]
    if name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * _times(params)
  return total


def _grouped_flops(equation: Any) -> int:
  """Returns what groups take of which each row, or each summand, is in one."""
  how = equation.params['ragged_dot_dimension_numbers']
  (contracted, _), _ = how.dot_dimension_numbers
  left, _, sizes = (x.aval.shape for x in equation.invars[:3])
  depth = math.prod(left[axis] for axis in contracted)
  made = math.prod(equation.outvars[0].aval.shape)
  if set(how.lhs_ragged_dimensions) <= set(contracted):
    made //= sizes[-1]  # a result for each group, of its own summands
  return 2 * depth * made


def count_kept(jaxpr: Any, size: Callable[[Any], float]) -> float:
  """Returns the bytes that the loop over layers keeps for the backward pass.

  They are what a scan gives beside its carry. Of several scans the one that
  keeps most is meant: its bytes are there while the others run.

  Args:
    jaxpr: Of a traced function.
    size: Returns the bytes that one of the arrays, given by its shape and
      dtype, has on a device.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  most = 0.0
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == 'scan' and not params['reverse']:
      kept = equation.outvars[params['num_carry'] :]
      most = max(most, sum(size(variable.aval) for variable in kept))
    most = max([most, *(count_kept(sub, size) for sub in _inner(params))])
  return most


def _times(params: dict[str, Any]) -> int:
  """Returns how often a scan, a Pallas kernel or a part of a mesh is run."""
  grid = getattr(params.get('grid_mapping'), 'grid', ())
  parts = [params['mesh'].shape[a] for a in params.get('newly_manual_axes', ())]
  return params.get('length', 1) * math.prod(grid) * math.prod(parts)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the programs that an equation holds."""
  for value in params.values():
    for part in value if isinstance(value, tuple | list) else (value,):
      if isinstance(part, core.Jaxpr | core.ClosedJaxpr):
        yield part
