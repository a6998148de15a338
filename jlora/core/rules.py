"""One rule a primitive: what it does to a lazy leaf.

A rule takes the evaluator, the equation and its operands, and returns the
results, or None where it does not cover the case: the leaf is then formed in
full and reported. Rules of primitives that hold programs are in `control.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jlora.core import contraction, products
from jlora.core.flow import Cut, Flow, cut
from jlora.core.lazy import RowsArray, in_size
from jlora.core.views import IN, LAYOUT, OUT, Atom, View

Results = Sequence[Any] | None


def layout(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A change of layout changes the view, and costs nothing."""
  kernel = operands[0]
  view = LAYOUT[equation.primitive.name](kernel.view, equation.params)
  return view and [kernel.seen_as(view)]


def convert_element_type(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A cast changes what the kernel is decoded to."""
  (kernel,) = operands
  dtype = equation.params['new_dtype']
  if not jnp.issubdtype(dtype, jnp.floating):
    return None
  return [kernel.with_leaf(kernel.leaf.astype(dtype))]


def optimization_barrier(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A barrier holds the fields of a lazy leaf back, as it would the array."""
  return jax.lax.optimization_barrier(operands)


def slice_(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A slice with fixed bounds cuts the fields."""
  (kernel,) = operands
  p = equation.params
  steps = p['strides'] or (1,) * len(kernel.shape)
  parts = [
    Cut(start, -(-(stop - start) // step), step)
    for start, stop, step in zip(
      p['start_indices'], p['limit_indices'], steps, strict=True
    )
  ]
  found = _cut_all(kernel, parts)
  return found and [found]


def dynamic_slice(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A slice with traced starts cuts the fields likewise."""
  kernel, *starts = operands
  sizes = equation.params['slice_sizes']
  found = _cut_all(kernel, list(map(Cut, starts, sizes)))
  return found and [found]


def split(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A split is one slice for each part."""
  (kernel,) = operands
  axis, start, found = equation.params['axis'], 0, []
  for size in map(int, equation.params['sizes']):
    found.append(cut(kernel, axis, Cut(start, size)))
    start += size
  return None if None in found else found


def _cut_all(kernel: Flow | None, parts: list[Cut]) -> Flow | None:
  for axis, part in enumerate(parts):
    if kernel is not None and part.size != kernel.shape[axis]:
      kernel = cut(kernel, axis, part)
  return kernel


def gather(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """Indexing the first axis looks up rows, or takes layers."""
  kernel, indices = operands
  numbers, mode = equation.params['dimension_numbers'], equation.params['mode']
  if not _is_of_first_axis(
    kernel, numbers, mode, equation.params['slice_sizes']
  ):
    return None
  ids = indices[..., 0]
  kept = 0 if numbers.collapsed_slice_dims else 1  # the row's axis, of size 1
  order = _gathered_order(numbers.offset_dims, ids.ndim)
  if kernel.view.groups[0][0].axis == IN:
    rows = _look_up(kernel, ids, mode)
    if rows is None:
      return None
    return [jnp.expand_dims(rows, [ids.ndim] * kept).transpose(order)]
  return None if kept else _take_layers(kernel, ids, mode, order)


def _is_of_first_axis(
  kernel: Flow, numbers: Any, mode: Any, sizes: Sequence[int]
) -> bool:
  """Whether a gather takes single entries of the first axis, whole otherwise.

  Indices into an axis of which the whole is taken change nothing, unless they
  can be out of bounds.
  """
  starts = tuple(numbers.start_index_map)
  others_ignored = mode != jax.lax.GatherScatterMode.FILL_OR_DROP
  return (
    not numbers.operand_batching_dims
    and len(kernel.view.groups[0]) == 1
    and tuple(numbers.collapsed_slice_dims) in ((), (0,))
    and (starts == (0,) or (starts[:1] == (0,) and others_ignored))
    and tuple(sizes) == (1, *kernel.shape[1:])
  )


def _gathered_order(offset: Sequence[int], ids: int) -> list[int]:
  """Returns the permutation from [*ids, *rest] to the axes of a gather."""
  count = ids + len(offset)
  places = [i for i in range(count) if i not in offset]
  places += offset
  return [places.index(i) for i in range(count)]


def _look_up(kernel: Flow, ids: jax.Array, mode: Any) -> jax.Array | None:
  """Returns rows [*ids, *rest] of a table whose first axis is all of `in`."""
  leaf, (first, *rest) = kernel.leaf, kernel.view.groups
  if leaf.stacked or first[0].size != in_size(leaf):
    return None
  rows = products.look_up(leaf, jnp.clip(ids, 0, first[0].size - 1))
  rows = _as_seen(rows, View(tuple(rest)))
  if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
    inside = (ids >= 0) & (ids < first[0].size)
    inside = jax.lax.broadcast_in_dim(inside, rows.shape, range(ids.ndim))
    rows = jnp.where(inside, rows, jnp.nan)
  return rows


def _as_seen(rows: jax.Array, view: View) -> jax.Array:
  """Returns [..., out] as [..., *what a view of the outputs shows]."""
  arrange = view.arrange
  for _ in range(rows.ndim - 1):
    arrange = jax.vmap(arrange)
  return arrange(rows)


def _take_layers(
  kernel: Flow, ids: jax.Array, mode: Any, order: list[int]
) -> Results:
  """Returns the layers `ids` of a kernel whose first axis is stacked."""
  (group, *rest), added = kernel.view.groups, ids.ndim
  axis = group[0].axis
  if axis is None or axis < 0:
    return None
  whole = (slice(None),) * axis

  def take(field: jax.Array) -> jax.Array:
    return field.at[(*whole, ids)].get(mode=mode)

  names = {k: k + added - 1 for k in range(axis + 1, len(kernel.leaf.stacked))}
  rest = View(tuple(rest)).renamed(names).groups
  taken = [(Atom(axis + i, size, 1),) for i, size in enumerate(ids.shape)]
  groups = [*taken, *rest]
  view = View(tuple(groups[i] for i in order))
  leaf = jax.tree.map(take, kernel.leaf)
  return [Flow(leaf, kernel.path, view).seen_as(view.without_units())]


def dot_general(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """Contracting one side of a kernel is the fused op, a layer at a time."""
  contracted, batch = equation.params['dimension_numbers']
  right = isinstance(operands[1], Flow)
  x, kernel = operands if right else reversed(operands)
  if isinstance(x, Flow):
    return None
  if not right:
    contracted, batch = contracted[::-1], batch[::-1]
  plan = contraction.plan(kernel, contracted, batch)
  if plan is None:
    return None
  run = functools.partial(
    products.multiply,
    dtype=equation.params['preferred_element_type'],
    precision=equation.params['precision'],
    transposed=plan.transposed,
  )
  y = contraction.run(plan, run, x, kernel.leaf, kernel_first=not right)
  return [y.reshape(equation.outvars[0].aval.shape)]


def ragged_dot_general(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """Rows in groups, one expert each, multiply the experts' kernels."""
  x, kernel, sizes = operands
  params = equation.params
  numbers = params['ragged_dot_dimension_numbers']
  (of_x, of_kernel), batch = numbers.dot_dimension_numbers
  plain = (
    isinstance(kernel, Flow)
    and not isinstance(x, Flow)
    and tuple(batch) == ((), ())
    and tuple(of_x) == (1,)
    and tuple(numbers.lhs_ragged_dimensions) == (0,)
    and tuple(numbers.rhs_group_dimensions) == (0,)
    and params['group_offset'] is None
  )
  sides = plain and _sides(kernel.view, tuple(of_kernel))
  if not sides or len(kernel.leaf.stacked) != 1:
    return None
  y = products.multiply_groups(
    x,
    kernel.leaf,
    sizes,
    params['preferred_element_type'],
    params['precision'],
    transposed=sides == (OUT, IN),
  )
  return [y]


def _sides(view: View, contracted: tuple[int, ...]) -> tuple[int, int] | None:
  """Returns what experts' kernels [experts, ·, ·] contract and produce."""
  if contracted not in ((1,), (2,)) or len(view.groups) != 3:
    return None
  groups = [view.groups[i] for i in (0, *contracted, 3 - contracted[0])]
  if any(len(group) != 1 for group in groups):
    return None
  axes = tuple(group[0].axis for group in groups)
  known = axes in ((0, IN, OUT), (0, OUT, IN))
  return axes[1:] if known else None


def conv_general_dilated(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A kernel that sums over its window and its inputs convolves lazily."""
  x, kernel = operands
  params = equation.params
  if isinstance(x, Flow) or params['batch_group_count'] != 1:
    return None
  if isinstance(kernel.leaf, RowsArray) or kernel.leaf.stacked:
    return None
  output = kernel.view.groups[params['dimension_numbers'].rhs_spec[0]]
  if list(output) != kernel.view.of_axis(OUT):
    return None
  return [products.convolve(x, kernel.leaf, kernel.view, params)]


LEAF_RULES: dict[str, Callable[..., Results]] = {
  **dict.fromkeys(LAYOUT, layout),
  'conv_general_dilated': conv_general_dilated,
  'convert_element_type': convert_element_type,
  'dot_general': dot_general,
  'dynamic_slice': dynamic_slice,
  'gather': gather,
  'optimization_barrier': optimization_barrier,
  'ragged_dot_general': ragged_dot_general,
  'slice': slice_,
  'split': split,
}
