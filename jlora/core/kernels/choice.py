"""Which products with a quantized kernel decode it while they multiply.

Shapes decide when a product is traced, platform and devices when it is lowered:
on one GPU `few_rows` does it, elsewhere the kernel is decoded first, which is
the reference. A compiler that shards a program over several devices could not
split what `few_rows` does, and would bring all codes together first.

That needs a primitive of its own: what a program is lowered for is known to
lowering rules alone. A step that is compiled ahead of time, for GPUs that are
not here, so gets what it will get there.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import batching, mlir

from jlora.core.quantized import QuantizedArray, decode_matrix

ROWS = 32  # above, decoding first costs little beside the product
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_MULTIPLE = 32  # of columns that a program of `few_rows` takes at a time


class Way(NamedTuple):
  """What a product is like; static.

  Attributes:
    x_dtype: Of the input.
    dtype: Of the result.
    precision: As in `jax.lax.dot_general`.
    transposed: Whether the product is with the transposed kernel.
  """

  x_dtype: Any
  dtype: Any
  precision: Any
  transposed: bool

  @property
  def back(self) -> 'Way':
    """Of the input's derivative."""
    return Way(self.dtype, self.x_dtype, self.precision, not self.transposed)


def takes(rows: int, kernel: Any, way: Way) -> bool:
  """Whether `multiply` takes a product: by shapes and dtypes, for any device.

  Args:
    rows: How many rows the input has.
    kernel: Any kernel.
    way: How it is multiplied.
  """
  return (
    isinstance(kernel, QuantizedArray)
    and kernel.codes_per_byte == 2
    and 0 < rows <= ROWS
    and kernel.block_size >= 32
    and kernel.block_size & (kernel.block_size - 1) == 0
    and kernel.codes.shape[-1] % _MULTIPLE == 0
    and {way.x_dtype, jnp.dtype(kernel.dtype)} <= set(map(jnp.dtype, _FLOATS))
    and _is_plain(way.precision)
    and _is_alone()
  )


def _is_alone() -> bool:
  """Whether no mesh is in sight of what is traced: no shards, no parts."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.size < 2 and not mesh.manual_axes


def _is_plain(precision: Any) -> bool:
  """Whether a precision is one for both operands or a pair: no algorithm."""
  pair = precision if isinstance(precision, tuple) else (precision,)
  return all(p is None or isinstance(p, jax.lax.Precision) for p in pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(way: Way, rows: jax.Array, kernel: QuantizedArray) -> jax.Array:
  """Returns `rows W`, or `rows W.T`, with a constant kernel.

  Args:
    way: How. `takes` says whether it can be done.
    rows: [rows, in], or [rows, out] where transposed.
    kernel: Unstacked.

  Returns:
    [rows, out], or [rows, in], in `way.dtype`. Only the input has a derivative.
  """
  if kernel.gather is not None:
    kernel = dataclasses.replace(kernel.gather(kernel), gather=None)
  return _bind(way, rows, kernel)


def _forward(
  way: Way, rows: jax.Array, kernel: QuantizedArray
) -> tuple[jax.Array, QuantizedArray]:
  return multiply(way, rows, kernel), kernel


def _backward(
  way: Way, kernel: QuantizedArray, g: jax.Array
) -> tuple[jax.Array, None]:
  return multiply(way.back, g, kernel), None


multiply.defvjp(_forward, _backward)

product_p = jex.Primitive('few_rows_product')


def _bind(
  way: Way, rows: jax.Array, kernel: QuantizedArray, depth: int = 0
) -> jax.Array:
  """Multiplies [*stacked, rows, n] by kernels with as many stacked axes."""
  leaves, tree = jax.tree.flatten(kernel)
  settings = {'way': way, 'tree': tree, 'depth': depth}
  if takes(rows.shape[-2], kernel, way):
    return product_p.bind(rows, *leaves, **settings)
  return _decoded(rows, *leaves, **settings)


def _stacked(product: Any, tree: Any, depth: int) -> Any:
  """Returns a product of rows and flat kernels, mapped over stacked axes."""

  def run(rows: jax.Array, *leaves: jax.Array) -> jax.Array:
    return product(rows, jax.tree.unflatten(tree, leaves))

  for _ in range(depth):
    run = jax.vmap(run)
  return run


def _decoded(
  *operands: jax.Array, way: Way, tree: Any, depth: int
) -> jax.Array:
  """Decodes first: the reference."""

  def product(rows: jax.Array, kernel: QuantizedArray) -> jax.Array:
    dense = decode_matrix(kernel)
    return jnp.dot(
      rows,
      dense.T if way.transposed else dense,
      precision=way.precision,
      preferred_element_type=way.dtype,
    )

  return _stacked(product, tree, depth)(*operands)


def _fused(*operands: jax.Array, way: Way, tree: Any, depth: int) -> jax.Array:
  """Decodes on the way."""
  # Pallas is imported where it is used: with it, jlora would load longer.
  from jlora.core.kernels import few_rows

  product = functools.partial(
    few_rows.multiply,
    dtype=way.dtype,
    precision=way.precision,
    transposed=way.transposed,
  )
  return _stacked(product, tree, depth)(*operands)


@functools.partial(jax.jit, static_argnames=('way', 'tree', 'depth'))
def _run(*operands: jax.Array, **settings: Any) -> jax.Array:
  return product_p.bind(*operands, **settings)


product_p.def_impl(_run)


@product_p.def_abstract_eval
def _shape(rows: Any, *leaves: Any, way: Way, tree: Any, depth: int) -> Any:
  del depth
  kernel = jax.tree.unflatten(tree, leaves)
  made = kernel.codes.shape[-1]
  if way.transposed:
    made = math.prod(kernel.inputs)
  shape = *rows.shape[:-1], made
  return rows.update(shape=shape, dtype=jnp.dtype(way.dtype), weak_type=False)


def _lower_for_gpu(ctx: Any, *operands: Any, **settings: Any) -> Any:
  context = ctx.module_context.axis_context
  # What several devices run together, mapped or sharded, has more or no number.
  alone = getattr(context, 'num_devices', None) == 1
  # A grid has three axes, two of which are taken.
  fits = alone and settings['depth'] < 2 and _runs_triton()
  run = _fused if fits else _decoded
  return mlir.lower_fun(run, multiple_results=False)(ctx, *operands, **settings)


def _runs_triton() -> bool:
  """Returns whether the GPUs here do, as from Ampere on; True if none is."""
  try:
    (gpu, *_) = jax.local_devices(backend='cuda')
  except RuntimeError:  # compiled for one that is elsewhere
    return True
  return float(gpu.compute_capability) >= 8


mlir.register_lowering(
  product_p, mlir.lower_fun(_decoded, multiple_results=False)
)
mlir.register_lowering(product_p, _lower_for_gpu, platform='cuda')


def _batch(
  operands: Sequence[jax.Array],
  axes: Sequence[int | None],
  *,
  way: Way,
  tree: Any,
  depth: int,
) -> tuple[jax.Array, int]:
  """Maps over one more axis: of rows alone, which are more rows, or of all."""
  rows, *leaves = operands
  if all(axis is None for axis in axes[1:]):
    kernel = jax.tree.unflatten(tree, leaves)
    rows = jnp.moveaxis(rows, axes[0], depth)
    *stacked, size, count, length = rows.shape
    y = _bind(way, rows.reshape(*stacked, -1, length), kernel, depth)
    return y.reshape(*stacked, size, count, -1), depth
  size = next(
    x.shape[axis]
    for x, axis in zip(operands, axes, strict=True)
    if axis is not None
  )
  rows, *leaves = (
    jnp.broadcast_to(x, (size, *x.shape))
    if axis is None
    else jnp.moveaxis(x, axis, 0)
    for x, axis in zip(operands, axes, strict=True)
  )
  return _bind(way, rows, jax.tree.unflatten(tree, leaves), depth + 1), 0


batching.primitive_batchers[product_p] = _batch
