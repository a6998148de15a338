"""Quantized weights: the array that holds their codes, and how it decodes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import formats
from jlora.core.axes import from_matrices
from jlora.core.leaf import LazyLeaf

NESTED_BLOCK = 256  # scales that share a second-level scale


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scales', 'scales2', 'offset'),
  meta_fields=(
    'format',
    'block_size',
    'inputs',
    'outputs',
    'dtype',
    'order',
    'gather',
  ),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray(LazyLeaf):
  """A kernel in 4 or 8 bits, as a pytree node.

  With the kernel in matrix form [..., in, out] and codes unpacked likewise,

    kernel[..., i, o] = levels[code[..., i, o]] * absmax[..., i // block, o]

  and absmax = scales, or with double quantization, for scale block j of `in`,

    absmax[..., j, o] = dynamic[scales[..., j, o]] * scales2[..., n] + offset
    n = (o * in / block + j) // 256

  which is the order of bitsandbytes on the transposed kernel. Every field
  keeps the stacked axes, so a scan over layers slices them all.

  Attributes:
    codes: uint8 [..., in / 2, out] of 4-bit codes, the even row in the high
      nibble; [..., in, out] of 8-bit ones.
    scales: [..., in / block, out]; float32, or uint8 when double-quantized.
    scales2: float32 [..., ceil(in * out / (256 * block))], or None.
    offset: float32 [...]; the mean absmax, or None.
    format: Name of the number format.
    block_size: Weights along `in` that share a scale.
    inputs: True sizes of the input axes; `in` is their product, padded with
      codes of zero to a multiple of `block_size`.
    outputs: Sizes of the output axes.
    dtype: What the kernel is dequantized to.
    order: How the kernel's own axes lie in [*stacked, *inputs, *outputs], as
      in `Roles`; empty where they lie so.
    gather: Applied to one layer each time before it is decoded, see `lift`;
      None for nothing. It must be hashable.
  """

  codes: jax.Array
  scales: jax.Array
  scales2: jax.Array | None
  offset: jax.Array | None
  format: str
  block_size: int
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  dtype: Any
  order: tuple[int, ...] = ()
  gather: Callable[['QuantizedArray'], 'QuantizedArray'] | None = None

  @property
  def stacked(self) -> tuple[int, ...]:
    """Sizes of the stacked axes."""
    return self.codes.shape[:-2]

  @property
  def nbytes(self) -> int:
    """Bytes that all fields take together."""
    fields = (self.codes, self.scales, self.scales2, self.offset)
    return sum(x.size * x.dtype.itemsize for x in fields if x is not None)

  @property
  def codes_per_byte(self) -> int:
    """How many codes a byte of `codes` holds: 2 or 1."""
    return formats.FORMATS[self.format].codes_per_byte


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf is a QuantizedArray."""
  return isinstance(leaf, QuantizedArray)


def dequantize(params: Any) -> Any:
  """Replaces every QuantizedArray of a tree by the kernel it stands for.

  Args:
    params: Any tree, or one QuantizedArray.

  Returns:
    The tree with plain arrays in each leaf's `dtype`.
  """

  def visit(leaf: Any) -> Any:
    return dequantize_leaf(leaf) if is_quantized(leaf) else leaf

  return jax.tree.map(visit, params, is_leaf=is_quantized)


def dequantize_leaf(x: QuantizedArray, dtype: Any = None) -> jax.Array:
  """Returns the kernel that `x` stands for, by the equations of its class.

  Args:
    x: A quantized kernel.
    dtype: Result's dtype; None is `x.dtype`. Levels and scales are multiplied
      in float32 and rounded once.

  Returns:
    The kernel in `x.shape`. A block of zeros comes back as zeros.
  """
  return _decode_stack(x.astype(dtype or x.dtype))


@jax.jit  # operation by operation it would hold several times the kernel
def _decode_stack(x: QuantizedArray) -> jax.Array:
  return from_matrices(decode_matrices(x), x.inputs, x.outputs, x.order)


def single_level(x: QuantizedArray) -> QuantizedArray:
  """Returns the same kernel with float32 scales, whatever theirs are.

  Args:
    x: A quantized kernel. What takes a part of its input or output axis must
      expand the second level first: its blocks run over the whole kernel.

  Returns:
    `x` with `scales` the absmax, without `scales2` and `offset`.
  """
  if x.scales2 is None:
    return x
  scales = _of_each_layer(expand_scales, x)
  return dataclasses.replace(x, scales=scales, scales2=None, offset=None)


def _of_each_layer(
  function: Callable[[QuantizedArray], jax.Array], x: QuantizedArray
) -> jax.Array:
  """Maps a function of unstacked kernels over the stacked axes."""
  for _ in x.stacked:
    function = jax.vmap(function)
  return function(x)


def decode_matrices(x: QuantizedArray) -> jax.Array:
  """Returns a kernel as [*stacked, in, out] in `x.dtype`, padding removed."""
  return _of_each_layer(decode_matrix, x)


def decode_matrix(x: QuantizedArray) -> jax.Array:
  """Returns an unstacked kernel as [in, out] in `x.dtype`, padding removed."""
  x = x if x.gather is None else x.gather(x)
  of = {'number_format': formats.FORMATS[x.format], 'dtype': x.dtype}
  kernel = jax.lax.platform_dependent(
    x.codes,
    expand_scales(x),
    tpu=functools.partial(
      decode_planes if x.codes_per_byte > 1 else decode_codes, **of
    ),
    default=functools.partial(decode_codes, **of),
  )
  return kernel[: math.prod(x.inputs)]


def decode_codes(
  packed: jax.Array,
  absmax: jax.Array,
  *,
  number_format: formats.Format,
  dtype: Any,
) -> jax.Array:
  """Returns what packed codes stand for.

  Args:
    packed: uint8, `codes` of an unstacked kernel.
    absmax: float32 [in / block, out], from `expand_scales`.
    number_format: Of the codes.
    dtype: Of the result, which is rounded to once.

  Returns:
    [in, out], the padding included.
  """
  values = number_format.decode(number_format.unpack(packed))
  return _scaled(values, absmax, dtype)


def decode_planes(
  packed: jax.Array,
  absmax: jax.Array,
  *,
  number_format: formats.Format,
  dtype: Any,
) -> jax.Array:
  """Returns what `decode_codes` does, in the order that suits a TPU.

  Its compiler fuses selects but no look-ups, and nothing across rows that
  interleave: so these are interleaved last, when they are values of `dtype`.
  Without the barrier it would lay out the codes for that step too, and copy
  those of all layers. CPUs and GPUs fuse all of it, and would decode twice.

  Args:
    packed: As in `decode_codes`, two codes a byte.
    absmax: As in `decode_codes`.
    number_format: As in `decode_codes`.
    dtype: As in `decode_codes`.
  """
  planes = [
    _scaled(number_format.select(codes), absmax, dtype)
    for codes in number_format.planes(packed)
  ]
  return formats.interleave(jax.lax.optimization_barrier(planes))


def _scaled(values: jax.Array, absmax: jax.Array, dtype: Any) -> jax.Array:
  """Returns [rows, out] times the absmax of the blocks that rows lie in."""
  count, out = absmax.shape
  blocks = values.reshape(count, -1, out)
  return (blocks * absmax[:, None]).astype(dtype).reshape(-1, out)


def decode_rows(x: QuantizedArray, rows: jax.Array) -> jax.Array:
  """Returns rows of an unstacked kernel without decoding the others.

  Args:
    x: A quantized kernel without stacked axes.
    rows: int [...], all in [0, in).

  Returns:
    [..., out] in `x.dtype`: the bits of `decode_matrix(x)[rows]`.
  """
  number_format = formats.FORMATS[x.format]
  flat = jnp.asarray(rows, jnp.int32).reshape(-1)
  codes = number_format.unpack_rows(x.codes, flat)
  scales = expand_scales(x, flat // x.block_size)
  values = (number_format.decode(codes) * scales).astype(x.dtype)
  return values.reshape(*jnp.shape(rows), codes.shape[1])


def expand_scales(
  x: QuantizedArray, blocks: jax.Array | None = None
) -> jax.Array:
  """Returns the float32 absmax of an unstacked kernel's blocks.

  The product is rounded before the offset is added, as bitsandbytes does: a
  maximum that changes no finite value keeps compilers from contracting the
  product and the sum into one operation with one rounding.

  Args:
    x: A quantized kernel without stacked axes.
    blocks: int [n], which blocks along `in`; None is all of them in order.

  Returns:
    [n, out].
  """
  scales = x.scales if blocks is None else x.scales[blocks]
  if x.scales2 is None:
    return scales
  count, out = x.scales.shape
  if blocks is None:
    blocks = jnp.arange(count)
  place = jnp.arange(out)[None] * count + blocks[:, None]
  product = jnp.asarray(formats.DYNAMIC)[scales]
  product = product * x.scales2[place // NESTED_BLOCK]
  product = jnp.maximum(product, jnp.finfo(jnp.float32).min)
  return product + x.offset
