"""Products with a lazy kernel that do not form it.

Each function is one use that models make of a kernel: `multiply` (linear
layers, tied heads), `look_up` (embeddings), `convolve`, and `multiply_groups`
(experts). The kernel's own part is frozen; the adapter's branch is added.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jlora.core.lazy import (
  LazyArray,
  LoraArray,
  RowsArray,
  column_lengths,
  gain_of,
)
from jlora.core.linear import (
  ADAPTER,
  Adapter,
  frozen_product,
  linear,
  matrix_of,
)
from jlora.core.quantized import QuantizedArray, decode_rows
from jlora.core.views import OUT, Atom, View


def multiply(
  x: jax.Array,
  leaf: LazyArray,
  dtype: Any = None,
  precision: Any = None,
  *,
  transposed: bool = False,
) -> jax.Array:
  """Multiplies by an unstacked kernel in matrix form.

  Args:
    x: [..., in], or [..., out] where transposed.
    leaf: A kernel without stacked axes.
    dtype: Of the result; None is that of `x`.
    precision: As in `jax.lax.dot_general`.
    transposed: Whether the product is with the transposed kernel.

  Returns:
    [..., out], or [..., in] where transposed.
  """
  settings = {'dtype': dtype, 'precision': precision, 'transposed': transposed}
  if isinstance(leaf, QuantizedArray):
    return linear(x, leaf, **settings)
  if isinstance(leaf, RowsArray):
    return _multiply_rows(x, leaf, settings)
  leaf = _gathered(leaf)
  a, b = leaf.a, leaf.b
  adapter = Adapter(*((b.T, a.T) if transposed else (a, b)), leaf.scale)
  gain = column_gain(leaf)
  if gain is not None and transposed:
    x = _scaled(x, gain)
  branch = _dropped(x, leaf)
  y = linear(x, leaf.kernel, adapter, branch=branch, **settings)
  if gain is not None:
    y = checkpoint_name(y, ADAPTER)
  return y if gain is None or transposed else _scaled(y, gain)


def _gathered(leaf: LoraArray) -> LoraArray:
  """Returns a leaf whose adapter is where it is used, see `lift`."""
  if leaf.gather is None:
    return leaf
  moved = leaf.gather(Adapter(leaf.a, leaf.b, leaf.scale))
  return dataclasses.replace(leaf, a=moved.a, b=moved.b)


def _multiply_rows(
  x: jax.Array, leaf: RowsArray, settings: dict[str, Any]
) -> jax.Array:
  """Multiplies by a table, with the trained rows in the place of its own."""
  ids = jnp.array(leaf.ids)
  rows = leaf.rows.astype(leaf.dtype)
  dot = functools.partial(
    jnp.matmul,
    precision=settings['precision'],
    preferred_element_type=settings['dtype'],
  )
  if (leaf.axis == 'out') != settings['transposed']:  # the ids count outputs
    y = linear(x, leaf.kernel, **settings)
    return y.at[..., ids].set(dot(x, rows.T).astype(y.dtype))
  without = x.at[..., ids].set(0)
  return linear(without, leaf.kernel, **settings) + dot(x[..., ids], rows)


def _dropped(x: jax.Array, leaf: LoraArray) -> jax.Array | None:
  """Returns what the adapter reads where there is dropout, else None."""
  if leaf.key is None or not leaf.dropout:
    return None
  share = 1 - leaf.dropout
  kept = jax.random.bernoulli(leaf.key, share, x.shape)
  return jnp.where(kept, x * np.asarray(1 / share, x.dtype), 0)


def column_gain(leaf: LoraArray) -> jax.Array | None:
  """Returns DoRA's gain [..., out] in float32, or None for plain LoRA.

  The columns' lengths come without forming a @ b, as
  |W|^2 + 2 s <W, a b> + s^2 |a b|^2.
  """
  if leaf.magnitude is None:
    return None
  exact = leaf.astype(jnp.float32)
  fixed = jax.lax.stop_gradient((exact.kernel, leaf.a, leaf.b, leaf.scale))
  kernel, a, b, scale = fixed
  w = matrix_of(kernel)
  dot = functools.partial(jnp.matmul, precision='highest')
  scale = scale[..., None]
  cross = jnp.sum(dot(a.mT, w) * b, axis=-2)
  square = jnp.sum(dot(dot(a.mT, a), b) * b, axis=-2)
  added = scale * (2 * cross + scale * square)
  length = jnp.sqrt(jnp.maximum(jnp.square(column_lengths(w)) + added, 0))
  length = checkpoint_name(length, ADAPTER)
  return gain_of(leaf.magnitude, length, leaf.scale)


def _scaled(y: jax.Array, gain: jax.Array) -> jax.Array:
  gain = jnp.broadcast_to(gain, y.shape)
  return (y.astype(jnp.float32) * gain).astype(y.dtype)


def look_up(leaf: LazyArray, ids: jax.Array) -> jax.Array:
  """Returns rows of an unstacked kernel in matrix form.

  Args:
    leaf: A kernel without stacked axes.
    ids: int [...], each below `in`.

  Returns:
    [..., out] in the kernel's dtype.
  """
  if isinstance(leaf, QuantizedArray):
    return decode_rows(leaf, ids)
  if isinstance(leaf.kernel, QuantizedArray):
    rows = decode_rows(leaf.kernel, ids)
  else:
    rows = _take(matrix_of(leaf.kernel), ids)
  if isinstance(leaf, RowsArray):
    return _trained_rows(rows, ids, leaf)
  leaf = _gathered(leaf)
  low = _take(leaf.a.astype(leaf.dtype), ids)
  update = leaf.scale * jnp.matmul(
    low, leaf.b.astype(leaf.dtype), preferred_element_type=jnp.float32
  )
  rows = rows + update.astype(leaf.dtype)
  gain = column_gain(leaf)
  return rows if gain is None else _scaled(rows, gain)


def _take(matrix: jax.Array, ids: jax.Array) -> jax.Array:
  return jnp.take(matrix, ids, axis=0, mode='clip')


def _trained_rows(
  rows: jax.Array, ids: jax.Array, leaf: RowsArray
) -> jax.Array:
  known = jnp.array(leaf.ids)
  trained = leaf.rows.astype(leaf.dtype)
  if leaf.axis == 'out':
    return rows.at[..., known].set(_take(trained.T, ids))
  place = jnp.minimum(jnp.searchsorted(known, ids), len(known) - 1)
  found = jnp.expand_dims(known[place] == ids, -1)
  return jnp.where(found, _take(trained, place), rows)


def convolve(
  x: jax.Array, leaf: LoraArray | QuantizedArray, view: View, params: Any
) -> jax.Array:
  """Convolves with a lazy kernel.

  An adapter is a convolution of the kernel's window to `rank` channels, then a
  product with `b` at each place; with groups, each group has its own outputs.

  Args:
    x: The image.
    leaf: A kernel without stacked axes.
    view: The layout in which the program sees it.
    params: Those of `conv_general_dilated`.

  References:
    PEFT's `lora.Conv2d` is the same function.
  """
  run = functools.partial(_convolution, params=params)

  def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return run(x, view.arrange(matrix), params['preferred_element_type'])

  if isinstance(leaf, QuantizedArray):
    return frozen_product(product, x, leaf)
  leaf = _gathered(leaf)
  y = frozen_product(product, x, leaf.kernel)
  groups, rank = params['feature_group_count'], leaf.a.shape[-1]
  read = _dropped(x, leaf)
  a = jnp.tile(leaf.a.astype(x.dtype), (1, groups))
  numbers = params['dimension_numbers']
  narrow = _with_outputs(view, numbers.rhs_spec[0], groups * rank)
  low = run(x if read is None else read, narrow.arrange(a), jnp.float32)
  feature = numbers.out_spec[1]
  low = jnp.moveaxis(low, feature, -1)
  low = low.reshape(*low.shape[:-1], groups, rank)
  b = leaf.b.astype(x.dtype).astype(jnp.float32).reshape(rank, groups, -1)
  update = leaf.scale * jnp.einsum('...gr,rgo->...go', low, b)
  update = update.reshape(*update.shape[:-2], -1).astype(y.dtype)
  y = jnp.moveaxis(y, feature, -1) + update
  gain = column_gain(leaf)
  return jnp.moveaxis(y if gain is None else _scaled(y, gain), -1, feature)


def _convolution(
  x: jax.Array, kernel: jax.Array, dtype: Any, *, params: dict[str, Any]
) -> jax.Array:
  names = (
    'window_strides',
    'padding',
    'lhs_dilation',
    'rhs_dilation',
    'dimension_numbers',
    'feature_group_count',
    'precision',
  )
  settings = {name: params[name] for name in names}
  return jax.lax.conv_general_dilated(
    x, kernel, **settings, preferred_element_type=dtype
  )


def _with_outputs(view: View, axis: int, size: int) -> View:
  """Returns a view whose outputs, all on one axis, are `size` many."""
  group = (Atom(OUT, size, 1),) if size > 1 else ()
  return View((*view.groups[:axis], group, *view.groups[axis + 1 :]))


def multiply_groups(
  x: jax.Array,
  leaf: LoraArray | QuantizedArray,
  sizes: jax.Array,
  dtype: Any = None,
  precision: Any = None,
  *,
  transposed: bool = False,
) -> jax.Array:
  """Multiplies consecutive rows by consecutive experts (`ragged_dot`).

  Args:
    x: [rows, in], or [rows, out] where transposed.
    leaf: A kernel with one stacked axis, the experts.
    sizes: int [experts], how many rows each expert has.
    dtype: Of the result; None is that of `x`.
    precision: As in `jax.lax.ragged_dot`.
    transposed: Whether the products are with the transposed kernels.

  Returns:
    [rows, out], or [rows, in] where transposed.
  """
  settings = {'precision': precision, 'preferred_element_type': dtype}

  def product(x: jax.Array, matrix: jax.Array, sizes: jax.Array) -> jax.Array:
    kernels = matrix.mT if transposed else matrix
    return jax.lax.ragged_dot(x, kernels, sizes, **settings)

  if isinstance(leaf, QuantizedArray):
    return frozen_product(product, x, leaf, (sizes,))
  leaf = _gathered(leaf)
  gain = column_gain(leaf)
  if gain is not None:
    experts = jnp.arange(len(sizes))
    of_row = jnp.repeat(experts, sizes, total_repeat_length=len(x))
    gain = gain[of_row]
  if gain is not None and transposed:
    x = _scaled(x, gain)
  y = frozen_product(product, x, leaf.kernel, (sizes,))
  scaled = leaf.scale[:, None, None] * leaf.b
  a, b = (scaled.mT, leaf.a.mT) if transposed else (leaf.a, scaled)
  ragged = functools.partial(
    jax.lax.ragged_dot, preferred_element_type=jnp.float32
  )
  if leaf.key is not None:  # one mask for all rows, whichever their expert
    leaf = dataclasses.replace(leaf, key=leaf.key[0])
  read = _dropped(x, leaf)
  low = ragged(x if read is None else read, a.astype(x.dtype), sizes)
  low = checkpoint_name(low, ADAPTER)
  y = y + ragged(low, b.astype(jnp.float32), sizes).astype(y.dtype)
  return y if gain is None or transposed else _scaled(y, gain)
