"""Lazy leaves: kernels that are not there as plain arrays.

`LoraArray` stands for a frozen kernel with an adapter, `RowsArray` for a
frozen table of which some rows are trained, `QuantizedArray` (`quantized.py`)
for a kernel in a few bits. Code that takes plain arrays runs on them through
`lift`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.axes import from_matrices
from jlora.core.leaf import LazyLeaf
from jlora.core.linear import Stored, matrix_of
from jlora.core.quantized import QuantizedArray, dequantize_leaf


class _OnBase(LazyLeaf):
  """A leaf that stands on a frozen kernel, its field `base`."""

  @property
  def kernel(self) -> Stored | QuantizedArray:
    """The base as the fused op takes it."""
    if isinstance(self.base, QuantizedArray):
      base = self.base.astype(self.dtype)
      return dataclasses.replace(base, gather=self.gather)
    sizes = self.inputs, self.outputs
    return Stored(self.base, *sizes, self.order, self.dtype, self.gather)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'a', 'b', 'scale', 'magnitude', 'key'),
  meta_fields=('inputs', 'outputs', 'order', 'dtype', 'dropout', 'gather'),
)
@dataclasses.dataclass(frozen=True)
class LoraArray(_OnBase):
  """A frozen kernel with an adapter, as a pytree node.

  It stands for `W + scale * a @ b`, with a magnitude for that kernel with
  columns of length `magnitude` (DoRA). Every field keeps the stacked axes in
  front, so a scan over layers slices them all.

  Attributes:
    base: The kernel: quantized, or dense with the stacked axes in front.
    a: float32 [..., in, rank].
    b: float32 [..., rank, out].
    scale: float32 [...]; where it is zero, the leaf is its base.
    magnitude: float32 [..., out], or None.
    key: PRNG keys [...] of the dropout, or None for none.
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    order: As in `Roles`.
    dtype: What the kernel computes in.
    dropout: Share of the adapter's inputs to drop where there is a key.
    gather: Applied to the base and to the adapter of one layer each time before
      they are used, see `lift`; None for nothing. It must be hashable.
  """

  base: jax.Array | QuantizedArray
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  magnitude: jax.Array | None
  key: jax.Array | None
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  order: tuple[int, ...]
  dtype: Any
  dropout: float
  gather: Callable[[Any], Any] | None = None

  @property
  def stacked(self) -> tuple[int, ...]:
    """Sizes of the stacked axes."""
    return self.a.shape[:-2]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'rows'),
  meta_fields=(
    'ids',
    'axis',
    'inputs',
    'outputs',
    'order',
    'dtype',
    'gather',
  ),
)
@dataclasses.dataclass(frozen=True)
class RowsArray(_OnBase):
  """A frozen table of which some entries are trained, as a pytree node.

  Attributes:
    base: The table, dense or quantized, without stacked axes.
    rows: float32 [n, dim], in the place of the base's.
    ids: Their n indices, sorted.
    axis: What the indices count: 'in', the rows of an embedding [vocab, embed],
      or 'out', the columns of an output head [embed, vocab].
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    order: As in `Roles`.
    dtype: What the table computes in.
    gather: As in `LoraArray`, of the base.
  """

  base: jax.Array | QuantizedArray
  rows: jax.Array
  ids: tuple[int, ...]
  axis: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  order: tuple[int, ...]
  dtype: Any
  gather: Callable[[Any], Any] | None = None

  @property
  def stacked(self) -> tuple[int, ...]:
    """Sizes of the stacked axes: there are none."""
    return ()


LazyArray = QuantizedArray | LoraArray | RowsArray


def is_lazy(leaf: Any) -> bool:
  """Whether a leaf stands for a kernel that is not there as a plain array."""
  return isinstance(leaf, LazyArray)


def densify(leaf: Any, dtype: Any = None) -> Any:
  """Returns the plain array that a leaf stands for.

  Args:
    leaf: A lazy leaf, or an array, which is returned as it is.
    dtype: Of the result; None is the leaf's. Sums are formed in float32 and
      rounded once.
  """
  if not is_lazy(leaf):
    return leaf if dtype is None else leaf.astype(dtype)
  if isinstance(leaf, QuantizedArray):
    return dequantize_leaf(leaf, dtype)
  matrices = dense_matrix(leaf, dtype)
  return from_matrices(matrices, leaf.inputs, leaf.outputs, leaf.order)


def dense_matrix(leaf: LazyArray, dtype: Any = None) -> jax.Array:
  """Returns a lazy leaf in matrix form: this is the definition of `merge`.

  With a magnitude m it is `m / n * (W + scale * a @ b)`, where n is the length
  of each column and counts as a constant.

  Args:
    leaf: A lazy leaf.
    dtype: Of the result; None is the leaf's.

  Returns:
    [*stacked, in, out].
  """
  dtype = dtype or leaf.dtype
  if isinstance(leaf, QuantizedArray):
    return matrix_of(leaf.astype(dtype))
  base = matrix_of(leaf.astype(jnp.float32).kernel)
  if isinstance(leaf, RowsArray):
    return _with_rows(base, leaf).astype(dtype)
  update = jnp.matmul(leaf.a, leaf.b, precision='highest')
  kernel = base + leaf.scale[..., None, None] * update
  if leaf.magnitude is not None:
    length = column_lengths(kernel)
    gain = gain_of(leaf.magnitude, length, leaf.scale)
    kernel = kernel * gain[..., None, :]
  return kernel.astype(dtype)


def _with_rows(table: jax.Array, leaf: RowsArray) -> jax.Array:
  table, ids = jnp.asarray(table), jnp.array(leaf.ids)
  if leaf.axis == 'in':
    return table.at[ids].set(leaf.rows)
  return table.at[:, ids].set(leaf.rows.T)


def column_lengths(kernel: jax.Array) -> jax.Array:
  """Returns the length of each column [..., out] of kernels [..., in, out]."""
  return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def gain_of(
  magnitude: jax.Array, length: jax.Array, scale: jax.Array
) -> jax.Array:
  """Returns what DoRA multiplies each output by.

  Args:
    magnitude: [..., out], trained.
    length: [..., out], of the adapted kernel's columns; a constant.
    scale: [...]; a layer with scale zero is not adapted, and its gain is 1.
  """
  length = jax.lax.stop_gradient(length)
  gain = magnitude / jnp.where(length > 0, length, 1)
  return jnp.where(scale[..., None] > 0, gain, 1)


def in_size(leaf: LazyArray) -> int:
  """Returns `in` of the matrix form."""
  return math.prod(leaf.inputs)


def out_size(leaf: LazyArray) -> int:
  """Returns `out` of the matrix form."""
  return math.prod(leaf.outputs)
