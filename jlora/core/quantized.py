"""4-bit weights: the array that holds them, and the way in and out of it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import formats, targets, tree
from jlora.core.axes import Axes, Roles
from jlora.errors import ConfigError

NESTED_BLOCK = 256  # scales that share a second-level scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
  """Which leaves are quantized, and how.

  Attributes:
    format: Number format of the codes: 'nf4'.
    block_size: Weights along the input axis that share a scale; even.
    double_quant: Whether the scales are quantized to 8 bits in turn.
    targets: 'all-linear' or patterns over leaf paths.
    exclude: Patterns that take leaves out again.
    axes: Roles of kernels' axes, see `jlora.core.axes`.
    dtype: What the kernel is dequantized to; None keeps the leaf's dtype.

  References:
    Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, section 3.
  """

  format: str = 'nf4'
  block_size: int = 64
  double_quant: bool = True
  targets: str | tuple[str, ...] = targets.ALL_LINEAR
  exclude: tuple[str, ...] = ()
  axes: Axes = ()
  dtype: Any = None

  def __post_init__(self) -> None:
    """Checks the fields and turns lists and dicts into tuples."""
    if self.format not in formats.FORMATS:
      known = ', '.join(map(repr, formats.FORMATS))
      raise ConfigError(f'quant.format {self.format!r} is none of {known}')
    if self.block_size < 2 or self.block_size % 2:
      raise ConfigError(
        f'quant.block_size is {self.block_size}; it must be even and positive,'
        ' such as 64'
      )
    if self.dtype is not None and not _is_float(self.dtype):
      raise ConfigError(
        f'quant.dtype {self.dtype!r} is no float type; use one such as'
        " 'bfloat16', or None for the dtype of the leaf"
      )
    targets.normalize_patterns(self, 'targets', 'exclude')


def _is_float(dtype: Any) -> bool:
  try:
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    return False


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scales', 'scales2', 'offset'),
  meta_fields=('format', 'block_size', 'inputs', 'outputs', 'dtype'),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """A kernel in 4 bits, as a pytree node.

  With the kernel in matrix form [..., in, out] and codes unpacked likewise,

    kernel[..., i, o] = levels[code[..., i, o]] * absmax[..., i // block, o]

  and absmax = scales, or with double quantization, for scale block j of `in`,

    absmax[..., j, o] = dynamic[scales[..., j, o]] * scales2[..., n] + offset
    n = (o * in / block + j) // 256

  which is the order of bitsandbytes on the transposed kernel. Every field
  keeps the stacked axes, so a scan over layers slices them all.

  Attributes:
    codes: uint8 [..., in / 2, out]; the even row is the high nibble.
    scales: [..., in / block, out]; float32, or uint8 when double-quantized.
    scales2: float32 [..., ceil(in * out / (256 * block))], or None.
    offset: float32 [...]; the mean absmax, or None.
    format: Name of the number format.
    block_size: Weights along `in` that share a scale.
    inputs: True sizes of the input axes; `in` is their product, padded with
      zeros to a multiple of `block_size`.
    outputs: Sizes of the output axes.
    dtype: What the kernel is dequantized to.
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

  @property
  def stacked(self) -> tuple[int, ...]:
    """Sizes of the stacked axes."""
    return self.codes.shape[:-2]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel that this stands for."""
    return (*self.stacked, *self.inputs, *self.outputs)

  @property
  def ndim(self) -> int:
    """Number of axes of the kernel."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of weights in the kernel."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes that all fields take together."""
    fields = (self.codes, self.scales, self.scales2, self.offset)
    return sum(x.size * x.dtype.itemsize for x in fields if x is not None)

  def astype(self, dtype: Any) -> 'QuantizedArray':
    """Returns the same codes, to be dequantized to `dtype`."""
    return dataclasses.replace(self, dtype=jnp.dtype(dtype))


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf is a QuantizedArray."""
  return isinstance(leaf, QuantizedArray)


def quantize(params: tree.Params, spec: QuantSpec) -> Any:
  """Replaces the leaves that `spec` means by QuantizedArrays.

  Args:
    params: Nested dict of float arrays.
    spec: Which leaves, and how.

  Returns:
    A tree of the same structure. Each layer or expert of a stacked leaf is
    quantized alone.

  Raises:
    ConfigError: A pattern matches nothing or a leaf that is no kernel.
  """
  leaves = tree.leaves_by_path(params, is_quantized)
  chosen = targets.select(leaves, spec.targets, spec.exclude, spec.axes)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    roles = chosen.get(tree.join(path))
    return leaf if roles is None else quantize_leaf(leaf, roles, spec)

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)


def quantize_leaf(leaf: jax.Array, roles: Roles, spec: QuantSpec) -> Any:
  """Returns one kernel as a QuantizedArray; one that already is, unchanged.

  Args:
    leaf: Kernel of any float dtype, or a ShapeDtypeStruct.
    roles: Roles of its axes.
    spec: Number format, block size and dtype.
  """
  if is_quantized(leaf):
    return leaf
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ConfigError(
      f'a leaf of dtype {leaf.dtype} cannot be quantized; exclude it'
    )
  run = functools.partial(_quantize_stack, roles=roles, spec=spec)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.eval_shape(run, leaf)
  return run(leaf)


@functools.partial(jax.jit, static_argnames=('roles', 'spec'))
def _quantize_stack(
  kernel: jax.Array, roles: Roles, spec: QuantSpec
) -> QuantizedArray:
  stacked, inputs, outputs = roles.split(kernel.shape)
  matrices = kernel.reshape(-1, math.prod(inputs), math.prod(outputs))
  one = functools.partial(_quantize_matrix, spec=spec)
  fields = jax.lax.map(one, matrices)  # a layer at a time: little scratch
  fields = jax.tree.map(lambda x: x.reshape(*stacked, *x.shape[1:]), fields)
  return QuantizedArray(
    *fields,
    format=spec.format,
    block_size=spec.block_size,
    inputs=inputs,
    outputs=outputs,
    dtype=jnp.dtype(spec.dtype or kernel.dtype),
  )


def _quantize_matrix(kernel: jax.Array, spec: QuantSpec) -> tuple[Any, ...]:
  """Returns codes, scales, scales2 and offset of one [in, out] kernel."""
  size, out = kernel.shape
  padding = -size % spec.block_size
  kernel = jnp.pad(kernel.astype(jnp.float32), ((0, padding), (0, 0)))
  blocks = kernel.reshape(-1, spec.block_size, out)
  absmax = jnp.abs(blocks).max(axis=1)
  scaled = blocks * formats.reciprocal(absmax)[:, None]
  codes = formats.nearest(scaled, formats.FORMATS[spec.format])
  pairs = codes.reshape(-1, 2, out)
  packed = pairs[:, 0] << 4 | pairs[:, 1]
  if not spec.double_quant:
    return packed, absmax, None, None
  return packed, *_quantize_scales(absmax)


def _quantize_scales(
  absmax: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns 8-bit scales [in / block, out], their scales and their offset."""
  offset = absmax.mean()
  flat = (absmax - offset).T.reshape(-1)
  blocks = jnp.pad(flat, (0, -flat.size % NESTED_BLOCK))
  blocks = blocks.reshape(-1, NESTED_BLOCK)
  scales2 = jnp.abs(blocks).max(axis=1)
  scaled = blocks * formats.reciprocal(scales2)[:, None]
  codes = formats.nearest(scaled, formats.DYNAMIC).reshape(-1)[: flat.size]
  return codes.reshape(absmax.shape[::-1]).T, scales2, offset


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
  decode: Callable[[QuantizedArray], jax.Array] = decode_matrix
  for _ in x.stacked:
    decode = jax.vmap(decode)
  return decode(x.astype(dtype or x.dtype)).reshape(x.shape)


def decode_matrix(x: QuantizedArray) -> jax.Array:
  """Returns an unstacked kernel as [in, out] in `x.dtype`, padding removed."""
  levels = jnp.asarray(formats.FORMATS[x.format])
  half, out = x.codes.shape
  nibbles = jnp.stack([x.codes >> 4, x.codes & 15], axis=1)
  values = levels[nibbles].reshape(-1, x.block_size, out)
  kernel = values * expand_scales(x)[:, None]
  kernel = kernel.astype(x.dtype).reshape(2 * half, out)
  return kernel[: math.prod(x.inputs)]


def expand_scales(x: QuantizedArray) -> jax.Array:
  """Returns the float32 absmax [in / block_size, out] of an unstacked kernel.

  The product is rounded before the offset is added, as bitsandbytes does: a
  maximum that changes no finite value keeps compilers from contracting the
  product and the sum into one operation with one rounding.
  """
  if x.scales2 is None:
    return x.scales
  count, out = x.scales.shape
  order = jnp.arange(out)[None] * count + jnp.arange(count)[:, None]
  scales2 = x.scales2[order // NESTED_BLOCK]
  product = jnp.asarray(formats.DYNAMIC)[x.scales] * scales2
  product = jnp.maximum(product, jnp.finfo(jnp.float32).min)
  return product + x.offset
