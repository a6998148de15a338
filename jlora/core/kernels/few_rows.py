"""Few rows times a 4-bit kernel that is decoded while it is multiplied.

With few rows, as in decoding, a product takes as long as its kernel takes to
move. Decoded first, each weight is read as a code, written in 16 bits and read
again; here it is read as a code, and the dense kernel is never in memory. The
values are those of `decode_matrix`, rounded to the kernel's dtype before they
are multiplied, so that only the order of a sum differs from the reference.

The grid is over blocks of the result and over parts of the axis that is summed
over, for one token gives too few blocks to fill a GPU. Even and odd rows of a
kernel share bytes, but not products: they stay apart, and nothing interleaves.

References:
  bitsandbytes' `kgemm_4bit_inference_naive` and Marlin (Frantar et al.,
  `MARLIN <https://arxiv.org/abs/2408.11743>`_) decode on the way likewise.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jlora.core import formats
from jlora.core.quantized import NESTED_BLOCK, QuantizedArray

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
PACKED_ROWS = 32  # bytes of a column that a program decodes at a time, at most
COLUMNS = (128, 64, 32)  # columns that it decodes at a time: what divides `out`
LEAST_ROWS = 16  # what tensor cores multiply at a time


class Tile(NamedTuple):
  """How one program goes through a kernel; static.

  Attributes:
    rows: Rows of the input, filled up to a power of two.
    packed: Packed rows of a step, all in one block of scales.
    columns: Columns of a step.
    steps: Steps of a program along the axis that is summed over.
    splits: Programs that share a block of the result.
    block_size: As in `QuantizedArray`.
    dtype: Of the kernel.
    precision: As in `jax.lax.dot_general`.
  """

  rows: int
  packed: int
  columns: int
  steps: int
  splits: int
  block_size: int
  dtype: Any
  precision: Any


class Source(NamedTuple):
  """What a program decodes from: arrays, or references to them.

  Attributes:
    levels: float32 [16].
    codes: As in `QuantizedArray`.
    scales: As in `QuantizedArray`.
    nested: The levels of 8-bit scales, float32 [256], `scales2` and the offset,
      float32 [1]; empty where scales are float32.
  """

  levels: Any
  codes: Any
  scales: Any
  nested: tuple[Any, ...]


def multiply(
  x: jax.Array,
  kernel: QuantizedArray,
  *,
  dtype: Any,
  precision: Any = None,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Returns `x W`, or `x W.T`, with a 4-bit kernel W of which x has few rows.

  Args:
    x: [rows, in], or [rows, out] where transposed.
    kernel: Unstacked, 4 bits, its block size a power of two from 32 on and its
      output size a multiple of 32.
    dtype: Of the result. Sums are float32 and rounded once.
    precision: As in `jax.lax.dot_general`.
    transposed: Whether the product is with the transposed kernel.
    interpret: Whether to run without a GPU, for tests.

  Returns:
    [rows, out], or [rows, in] where transposed.
  """
  tile = _tile(len(x), kernel, precision, transposed=transposed)
  x = x.astype(jnp.promote_types(x.dtype, kernel.dtype))
  run = _multiply_transposed if transposed else _multiply
  return run(x, kernel, tile, interpret=interpret).astype(dtype)


def _tile(
  rows: int, kernel: QuantizedArray, precision: Any, *, transposed: bool
) -> Tile:
  size, out = kernel.codes.shape
  packed = min(PACKED_ROWS, kernel.block_size // 2)
  columns = next(n for n in COLUMNS if out % n == 0)
  summed, made = size // packed, out // columns
  if transposed:
    summed, made = made, summed
  # Sums of the parts are to be few bytes beside the codes.
  length = out if transposed else 2 * size
  wanted = min(-(-PROGRAMS // made), max(1, length // (32 * rows)))
  splits = max(n for n in range(1, min(wanted, summed) + 1) if summed % n == 0)
  return Tile(
    rows=max(LEAST_ROWS, 1 << (rows - 1).bit_length()),
    packed=packed,
    columns=columns,
    steps=summed // splits,
    splits=splits,
    block_size=kernel.block_size,
    dtype=kernel.dtype,
    precision=precision,
  )


def _source(kernel: QuantizedArray) -> Source:
  levels = jnp.asarray(formats.FORMATS[kernel.format].levels)
  nested = ()
  if kernel.scales2 is not None:
    offset = kernel.offset.reshape(1)
    nested = (jnp.asarray(formats.DYNAMIC), kernel.scales2, offset)
  return Source(levels, kernel.codes, kernel.scales, nested)


def _multiply(
  x: jax.Array, kernel: QuantizedArray, tile: Tile, *, interpret: bool
) -> jax.Array:
  """Returns float32 [rows, out]."""
  rows, size = x.shape
  packed, out = kernel.codes.shape
  x = jnp.pad(x, ((0, tile.rows - rows), (0, 2 * packed - size)))
  planes = x.reshape(tile.rows, packed, 2).transpose(2, 0, 1)
  parts = pl.pallas_call(
    functools.partial(_run, tile=tile),
    out_shape=jax.ShapeDtypeStruct((tile.splits, rows, out), jnp.float32),
    grid=(out // tile.columns, tile.splits),
    interpret=interpret,
    compiler_params=_COMPILER,
    name='few_rows',
  )(planes, _source(kernel))
  return parts.sum(0)


def _multiply_transposed(
  x: jax.Array, kernel: QuantizedArray, tile: Tile, *, interpret: bool
) -> jax.Array:
  """Returns float32 [rows, in]."""
  rows, packed = len(x), len(kernel.codes)
  x = jnp.pad(x, ((0, tile.rows - rows), (0, 0)))
  shape = tile.splits, 2, rows, packed
  parts = pl.pallas_call(
    functools.partial(_run_transposed, tile=tile),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    grid=(packed // tile.packed, tile.splits),
    interpret=interpret,
    compiler_params=_COMPILER,
    name='few_rows_transposed',
  )(x, _source(kernel))
  planes = parts.sum(0)
  y = planes.transpose(1, 2, 0).reshape(rows, 2 * packed)
  return y[:, : math.prod(kernel.inputs)]


# One stage: with more, Triton would also copy the look-ups to shared memory.
_COMPILER = triton.CompilerParams(num_warps=4, num_stages=1)


def _run(x_ref: Any, source: Source, y_ref: Any, *, tile: Tile) -> None:
  """Makes one block of columns, from one part of the rows of the kernel."""
  column = pl.program_id(0) * tile.columns
  split = pl.program_id(1)

  def step(i: jax.Array, total: jax.Array) -> jax.Array:
    row = (split * tile.steps + i) * tile.packed
    for plane, kernel in enumerate(_decode(source, row, column, tile)):
      x = x_ref[plane, :, pl.ds(row, tile.packed)]
      total += _dot(x, kernel, tile)
    return total

  total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
  total = jax.lax.fori_loop(0, tile.steps, step, total)
  _store(y_ref, (split,), total, column)


def _run_transposed(
  x_ref: Any, source: Source, y_ref: Any, *, tile: Tile
) -> None:
  """Makes the even and odd rows of one block, from one part of the columns."""
  row = pl.program_id(0) * tile.packed
  split = pl.program_id(1)

  def step(i: jax.Array, totals: tuple[jax.Array, ...]) -> Any:
    column = (split * tile.steps + i) * tile.columns
    x = x_ref[:, pl.ds(column, tile.columns)]
    kernels = _decode(source, row, column, tile)
    pairs = zip(totals, kernels, strict=True)
    return tuple(total + _dot(x, kernel.T, tile) for total, kernel in pairs)

  total = jnp.zeros((tile.rows, tile.packed), jnp.float32)
  totals = jax.lax.fori_loop(0, tile.steps, step, (total, total))
  for plane, total in enumerate(totals):
    _store(y_ref, (split, plane), total, row)


def _decode(
  source: Source, row: jax.Array, column: jax.Array, tile: Tile
) -> tuple[jax.Array, jax.Array]:
  """Returns the even and the odd rows of a tile, [packed, columns] each."""
  packed = source.codes[pl.ds(row, tile.packed), pl.ds(column, tile.columns)]
  absmax = _absmax(source, 2 * row // tile.block_size, column, tile)[None]
  high, low = (
    (source.levels[codes.astype(jnp.int32)] * absmax).astype(tile.dtype)
    for codes in (packed >> 4, packed & 15)
  )
  return high, low


def _absmax(
  source: Source, block: jax.Array, column: jax.Array, tile: Tile
) -> jax.Array:
  """Returns what `expand_scales` has for one block of some columns."""
  scales = source.scales[block, pl.ds(column, tile.columns)]
  if not source.nested:
    return scales
  dynamic, scales2, offset = source.nested
  count = source.scales.shape[0]
  place = (column + jnp.arange(tile.columns)) * count + block
  product = dynamic[scales.astype(jnp.int32)] * scales2[place // NESTED_BLOCK]
  # As there, this keeps product and sum from becoming one operation.
  product = jnp.maximum(product, jnp.finfo(jnp.float32).min)
  return product + offset[0]


def _dot(x: jax.Array, kernel: jax.Array, tile: Tile) -> jax.Array:
  return jnp.dot(
    x,
    kernel.astype(x.dtype),
    precision=tile.precision,
    preferred_element_type=jnp.float32,
  )


def _store(
  y_ref: Any, place: tuple[Any, ...], total: jax.Array, column: jax.Array
) -> None:
  """Writes a block from a column on, without the rows that fill it up."""
  rows = jnp.arange(len(total))[:, None]
  columns = column + jnp.arange(total.shape[1])[None]
  rows, columns = jnp.broadcast_arrays(rows, columns)
  at = y_ref.at[*place, rows, columns]
  triton.store(at, total, mask=rows < y_ref.shape[-2])
