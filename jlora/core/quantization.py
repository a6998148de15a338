"""The way into quantized weights: which kernels, and how."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import formats, targets, tree
from jlora.core.axes import Axes, Roles, to_matrices
from jlora.core.quantized import NESTED_BLOCK, QuantizedArray, is_quantized
from jlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
  """Which leaves are quantized, and how.

  Attributes:
    format: Number format of the codes: 'nf4', 'fp4', 'int4' or 'int8'.
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
    if self.format not in tuple(formats.FORMATS):
      known = ', '.join(map(repr, formats.FORMATS))
      raise ConfigError(f'quant.format {self.format!r} is none of {known}')
    size = self.block_size
    if not isinstance(size, int) or size < 2 or size % 2:
      raise ConfigError(
        f'quant.block_size is {size!r}; it must be even and positive, such as'
        ' 64'
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


def quantize(params: tree.Params, spec: QuantSpec) -> Any:
  """Replaces the leaves that `spec` means by QuantizedArrays.

  Args:
    params: Nested dict of float arrays, or of ShapeDtypeStructs.
    spec: Which leaves, and how.

  Returns:
    A tree of the same structure. Each layer or expert of a stacked leaf is
    quantized alone.

  Raises:
    ConfigError: A pattern matches nothing, a leaf that is no kernel or no
      float, or only some layers of a stacked leaf.
  """
  leaves = tree.arrays_by_path(params, is_quantized)
  chosen = select_whole(leaves, spec)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    if name not in chosen:
      return leaf
    return quantize_leaf(leaf, chosen[name], spec, path=name)

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)


def select_whole(
  leaves: Mapping[str, Any], spec: QuantSpec
) -> dict[str, Roles]:
  """Returns the roles of the kernels that `spec` means, by path.

  Args:
    leaves: Array-like leaves by path.
    spec: Which of them.

  Raises:
    ConfigError: As in `quantize`.
  """
  chosen = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  for path, target in chosen.items():
    if not target.chosen.all():
      raise ConfigError(
        f'quant.targets and quant.exclude leave {target.chosen.sum()} of the'
        f' {target.chosen.size} layers of {path!r}, which are one array and'
        ' are quantized together; match the whole path, or none of it'
      )
  return {path: target.roles for path, target in chosen.items()}


def quantize_leaf(
  leaf: Any, roles: Roles, spec: QuantSpec, *, path: str = ''
) -> QuantizedArray:
  """Returns one kernel as a QuantizedArray; one that already is, unchanged.

  Args:
    leaf: Kernel of any float dtype, or a ShapeDtypeStruct.
    roles: Roles of its axes, which may lie in any order.
    spec: Number format, block size and dtype.
    path: What an error calls it.
  """
  if is_quantized(leaf):
    return leaf
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ConfigError(
      f'{repr(path) if path else "a leaf"} of dtype {leaf.dtype} cannot be'
      ' quantized, which takes floats; exclude it'
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
  matrices = to_matrices(kernel, roles)
  matrices = matrices.reshape(-1, *matrices.shape[-2:])
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
    order=roles.order,
  )


def _quantize_matrix(kernel: jax.Array, spec: QuantSpec) -> tuple[Any, ...]:
  """Returns codes, scales, scales2 and offset of one [in, out] kernel."""
  packed, absmax = quantize_blocks(kernel, spec)
  if not spec.double_quant:
    return packed, absmax, None, None
  # The barrier keeps sums over the kernel apart from those over its blocks,
  # which a part of the kernel knows nothing of: the same bits either way.
  return packed, *quantize_absmax(jax.lax.optimization_barrier(absmax))


@functools.partial(jax.jit, static_argnames='spec')
def quantize_blocks(
  kernel: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
  """Returns the codes of a kernel, or of whole blocks of it, and their absmax.

  Args:
    kernel: [in, out] of any float dtype.
    spec: Number format and block size.

  Returns:
    The packed codes, and the absmax, float32 [in / block, out], as
    `QuantizedArray` has them.
  """
  size, out = kernel.shape
  padding = -size % spec.block_size
  kernel = jnp.pad(kernel.astype(jnp.float32), ((0, padding), (0, 0)))
  blocks = kernel.reshape(-1, spec.block_size, out)
  absmax = jnp.abs(blocks).max(axis=1)
  scaled = blocks * formats.reciprocal(absmax)[:, None]
  number_format = formats.FORMATS[spec.format]
  codes = number_format.encode(scaled).reshape(-1, out)
  return number_format.pack(codes), absmax


def quantize_absmax(
  absmax: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the scales of one kernel in 8 bits, their scales and their offset.

  Args:
    absmax: float32 [in / block, out] of the whole kernel.

  Returns:
    `scales`, `scales2` and `offset` as `QuantizedArray` has them.
  """
  offset = absmax.mean()
  flat = (absmax - offset).T.reshape(-1)
  blocks = jnp.pad(flat, (0, -flat.size % NESTED_BLOCK))
  blocks = blocks.reshape(-1, NESTED_BLOCK)
  scales2 = jnp.abs(blocks).max(axis=1)
  scaled = blocks * formats.reciprocal(scales2)[:, None]
  codes = formats.nearest(scaled).reshape(-1)[: flat.size]
  return codes.reshape(absmax.shape[::-1]).T, scales2, offset
