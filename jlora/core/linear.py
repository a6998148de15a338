"""The fused op: a frozen kernel and its adapter in one product.

`linear` is what every lifted product becomes. Its derivative is written by
hand for three reasons: no gradient of the frozen kernel is ever formed, the
kernel is kept for the backward pass as it is stored (4-bit codes, or the
model's own array, not a copy in another layout or dtype), and every product in
the backward pass has two axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.core.axes import canonical_axes
from jlora.core.kernels import choice
from jlora.core.quantized import QuantizedArray, decode_matrices


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('array',),
  meta_fields=('inputs', 'outputs', 'order', 'dtype', 'gather'),
)
@dataclasses.dataclass(frozen=True)
class Stored:
  """A dense kernel as its model stores it.

  Attributes:
    array: [*stacked, …], the stacked axes first, the others as `order` says.
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    order: As in `Roles`.
    dtype: What it computes in.
    gather: Applied to the matrix each time before it is used, see `lift`; None
      for nothing. It must be hashable.
  """

  array: jax.Array
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  order: tuple[int, ...]
  dtype: Any
  gather: Callable[[jax.Array], jax.Array] | None = None


Kernel = jax.Array | Stored | QuantizedArray

# The name, for the policies of `jax.checkpoint`, of what an adapter adds to the
# arrays that a product needs again.
ADAPTER = 'adapter'


def matrix_of(kernel: Kernel) -> jax.Array:
  """Returns the dense kernel [*stacked, in, out] in its `dtype`.

  Args:
    kernel: Quantized, as stored, or a plain array that is a matrix already.
  """
  if isinstance(kernel, jax.Array):
    return kernel
  if isinstance(kernel, QuantizedArray):
    return decode_matrices(kernel)
  sides = len(kernel.inputs) + len(kernel.outputs)
  first = kernel.array.ndim - sides
  order = tuple(k for k in kernel.order if k >= -sides)
  axes = [first + i for i in canonical_axes(order, sides)]
  array = kernel.array.transpose(*range(first), *axes)
  sizes = math.prod(kernel.inputs), math.prod(kernel.outputs)
  matrix = array.reshape(*array.shape[:first], *sizes).astype(kernel.dtype)
  return matrix if kernel.gather is None else kernel.gather(matrix)


class Adapter(NamedTuple):
  """The trained branch beside a kernel.

  Attributes:
    a: float32 [in, rank].
    b: float32 [rank, out].
    scale: float32 scalar; a constant.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array


class Settings(NamedTuple):
  """What a product with a kernel is like; static.

  Attributes:
    x_dtype: Of the input.
    dtype: Of the result.
    precision: Of the product with the kernel, as in `jax.lax.dot_general`.
    transposed: Whether the product is with the transposed kernel.
  """

  x_dtype: Any
  dtype: Any
  precision: Any
  transposed: bool


def linear(
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None = None,
  *,
  branch: jax.Array | None = None,
  dtype: Any = None,
  precision: Any = None,
  transposed: bool = False,
) -> jax.Array:
  """Returns `x W + scale * (branch a) b`, with `W` and `scale` constant.

  The adapter is cast to the dtype of `x` at use; its branch accumulates in
  float32, is rounded once and added.

  Args:
    x: [..., in].
    kernel: [in, out] as a matrix. Its gradient is never formed.
    adapter: None for a kernel without one.
    branch: What the adapter reads, [..., in]; None is `x`. Dropout comes in
      here.
    dtype: Of the result; None is that of `x`.
    precision: Of the product with the kernel, as in `jax.lax.dot_general`.
    transposed: Whether `W` is the transposed kernel, `x` being [..., out]. The
      adapter then stands for the transposed one, [out, rank] and [rank, in].

  Returns:
    [..., out]. Derivatives exist for `x`, `branch`, `a` and `b`, in reverse
    mode only.
  """
  out = jnp.dtype(dtype or x.dtype)
  settings = Settings(x.dtype, out, precision, transposed)
  return _linear(settings, x, kernel, adapter, branch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
  settings: Settings,
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None,
  branch: jax.Array | None,
) -> jax.Array:
  return _forward(settings, x, kernel, adapter, branch)[0]


def _forward(
  settings: Settings,
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None,
  branch: jax.Array | None,
) -> tuple[jax.Array, Any]:
  # The barrier is for the products alone. What is kept is `x` itself, so that
  # kernels with the same input keep it once between them.
  rows = jax.lax.optimization_barrier(_rows(x))
  y = _product(rows, kernel, settings)
  if adapter is None:
    return _unrows(y, x), (kernel, None, None, None)
  separate = branch is not None
  read, rows = (branch, _rows(branch)) if separate else (x, rows)
  low = checkpoint_name(_dot(rows, adapter.a.astype(x.dtype)), ADAPTER)
  b = adapter.b.astype(x.dtype).astype(jnp.float32)
  y = y + (adapter.scale * _dot(low, b)).astype(settings.dtype)
  return _unrows(y, x), (kernel, adapter, (read, low), separate)


def _backward(settings: Settings, saved: Any, g: jax.Array) -> tuple[Any, ...]:
  kernel, adapter, reads, separate = saved
  # Decode the codes again: the barrier keeps a compiler from sharing the
  # forward pass's dense kernel with this second use, which would keep it alive.
  rows, kernel = jax.lax.optimization_barrier((_rows(g), kernel))
  dx = _product(rows, kernel, settings, back=True)
  if adapter is None:
    dx = jax.lax.optimization_barrier(dx)
    return _unrows(dx, g), None, None, None
  read, low = reads
  rows = rows.astype(jnp.float32)
  b = adapter.b.astype(settings.x_dtype).astype(jnp.float32)
  low_g = adapter.scale * _dot(rows, b.T)
  db = adapter.scale * _dot(low.T, rows)
  da = _dot(_rows(read).astype(jnp.float32).T, low_g)
  a = adapter.a.astype(settings.x_dtype).astype(jnp.float32)
  dread = _dot(low_g, a.T).astype(read.dtype)
  if separate:
    dread = _unrows(dread, g)
  else:
    dx, dread = dx + dread, None
  dx = _unrows(jax.lax.optimization_barrier(dx), g)
  return dx, None, Adapter(da, db, None), dread


_linear.defvjp(_forward, _backward)


def _rows(x: jax.Array) -> jax.Array:
  """Returns [..., n] as [rows, n]."""
  return x.reshape(-1, x.shape[-1])


def _unrows(rows: jax.Array, like: jax.Array) -> jax.Array:
  """Returns [rows, n] as [..., n], the leading axes being those of `like`."""
  return rows.reshape(*like.shape[:-1], rows.shape[-1])


def _product(
  rows: jax.Array, kernel: Kernel, settings: Settings, *, back: bool = False
) -> jax.Array:
  """Returns the frozen part of a result, or of the input's derivative."""
  way = choice.Way(*settings)
  way = way.back if back else way
  if choice.takes(len(rows), kernel, way):
    return choice.multiply(way, rows, kernel)
  dense = _dense(kernel, way.transposed)
  return _dot(rows, dense, way.dtype, way.precision)


def _dense(kernel: Kernel, transposed: bool) -> jax.Array:
  dense = matrix_of(kernel)
  return dense.T if transposed else dense


def _dot(
  x: jax.Array, y: jax.Array, dtype: Any = jnp.float32, precision: Any = None
) -> jax.Array:
  return jnp.dot(x, y, precision=precision, preferred_element_type=dtype)


Product = Callable[..., jax.Array]


def frozen_product(
  product: Product,
  x: jax.Array,
  kernel: Kernel,
  rest: tuple[jax.Array, ...] = (),
) -> jax.Array:
  """Returns any product that is linear in `x`, with a constant kernel.

  Convolutions and grouped products go through here. As in `linear`, the
  backward pass reads the stored kernel again and forms no gradient of it.

  Args:
    product: Of `x`, the dense kernel [*stacked, in, out] and `rest`.
    x: The only input that has a derivative.
    kernel: The frozen kernel.
    rest: Integers that the product needs, such as the sizes of groups.
  """
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return _frozen((product, shape), x, kernel, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(
  static: tuple[Product, jax.ShapeDtypeStruct],
  x: jax.Array,
  kernel: Kernel,
  rest: tuple[jax.Array, ...],
) -> jax.Array:
  return _frozen_forward(static, x, kernel, rest)[0]


def _frozen_forward(
  static: tuple[Product, jax.ShapeDtypeStruct],
  x: jax.Array,
  kernel: Kernel,
  rest: tuple[jax.Array, ...],
) -> tuple[jax.Array, Any]:
  product, _ = static
  return product(x, matrix_of(kernel), *rest), (kernel, rest)


def _frozen_backward(
  static: tuple[Product, jax.ShapeDtypeStruct], saved: Any, g: jax.Array
) -> tuple[Any, ...]:
  product, shape = static
  kernel, rest = saved
  g, kernel = jax.lax.optimization_barrier((g, kernel))
  dense = matrix_of(kernel)
  transposed = jax.linear_transpose(lambda x: product(x, dense, *rest), shape)
  (dx,) = transposed(g)
  return dx, None, tuple(None for _ in rest)


_frozen.defvjp(_frozen_forward, _frozen_backward)
