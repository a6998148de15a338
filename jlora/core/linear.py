"""The fused op: a frozen kernel and its adapter in one product.

`linear` is what every lifted product becomes. Its derivative is written by
hand for three reasons: no gradient of the frozen kernel is ever formed, the
4-bit codes rather than the dense kernel are kept for the backward pass, and
every product in the backward pass has two axes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.core.quantized import QuantizedArray, decode_matrix

Kernel = jax.Array | QuantizedArray


class Adapter(NamedTuple):
  """The trained branch beside a kernel.

  Attributes:
    a: float32 [in, rank].
    b: float32 [rank, out].
    scale: float32 scalar, alpha / rank; a constant.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array


def linear(
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None = None,
  *,
  branch: jax.Array | None = None,
  dtype: Any = None,
  precision: Any = None,
) -> jax.Array:
  """Returns `x W + scale * (branch a) b`, with `W` and `scale` constant.

  The adapter is cast to the dtype of `x` at use; its branch accumulates in
  float32, is rounded once and added.

  Args:
    x: [..., in].
    kernel: [in, out], dense or quantized. Its gradient is never formed.
    adapter: None for a kernel without one.
    branch: What the adapter reads, [..., in]; None is `x`. Dropout comes in
      here.
    dtype: Of the result; None is that of `x`.
    precision: Of the product with the kernel, as in `jax.lax.dot_general`.

  Returns:
    [..., out]. Derivatives exist for `x`, `branch`, `a` and `b`, in reverse
    mode only.
  """
  rows = functools.partial(jnp.reshape, shape=(-1, x.shape[-1]))
  settings = (x.dtype, jnp.dtype(dtype or x.dtype), precision)
  branch = branch if branch is None else rows(branch)
  y = _linear(settings, rows(x), kernel, adapter, branch)
  return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
  settings: tuple[Any, Any, Any],
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None,
  branch: jax.Array | None,
) -> jax.Array:
  return _forward(settings, x, kernel, adapter, branch)[0]


def _forward(
  settings: tuple[Any, Any, Any],
  x: jax.Array,
  kernel: Kernel,
  adapter: Adapter | None,
  branch: jax.Array | None,
) -> tuple[jax.Array, Any]:
  _, dtype, precision = settings
  x = jax.lax.optimization_barrier(x)
  y = _dot(x, _dense(kernel), dtype, precision)
  if adapter is None:
    return y, (kernel, None, None, None)
  read = x if branch is None else branch
  low = _dot(read, adapter.a.astype(x.dtype))
  b = adapter.b.astype(x.dtype).astype(jnp.float32)
  y = y + (adapter.scale * _dot(low, b)).astype(dtype)
  separate = branch is not None
  return y, (kernel, adapter, (read, low), separate)


def _backward(
  settings: tuple[Any, Any, Any], saved: Any, g: jax.Array
) -> tuple[Any, ...]:
  x_dtype, _, precision = settings
  kernel, adapter, reads, separate = saved
  # Decode the codes again: the barrier keeps a compiler from sharing the
  # forward pass's dense kernel with this second use, which would keep it alive.
  g, kernel = jax.lax.optimization_barrier((g, kernel))
  dense = _dense(kernel)
  dx = _dot(g, dense.T, x_dtype, precision)
  if adapter is None:
    return jax.lax.optimization_barrier(dx), None, None, None
  read, low = reads
  b = adapter.b.astype(x_dtype).astype(jnp.float32)
  low_g = adapter.scale * _dot(g.astype(jnp.float32), b.T)
  db = adapter.scale * _dot(low.T, g.astype(jnp.float32))
  da = _dot(read.astype(jnp.float32).T, low_g)
  a = adapter.a.astype(x_dtype).astype(jnp.float32)
  dread = _dot(low_g, a.T).astype(read.dtype)
  if not separate:
    dx, dread = dx + dread, None
  dx = jax.lax.optimization_barrier(dx)
  return dx, None, Adapter(da, db, None), dread


_linear.defvjp(_forward, _backward)


def _dense(kernel: Kernel) -> jax.Array:
  if isinstance(kernel, QuantizedArray):
    return decode_matrix(kernel)
  return kernel


def _dot(
  x: jax.Array, y: jax.Array, dtype: Any = jnp.float32, precision: Any = None
) -> jax.Array:
  return jnp.dot(x, y, precision=precision, preferred_element_type=dtype)
