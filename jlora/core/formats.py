"""Number formats of quantized weights, as tables, and the codes they give.

The tables and the rounding are those of bitsandbytes, so that its bytes and
ours are the same: scaling multiplies by the float32 reciprocal, and the code
is that of the level behind as many midpoints as lie below the scaled value.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of a normal distribution, normalized to [-1, 1], with an exact zero.
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)

# A sign, two bits of exponent and one of mantissa, by code: not ascending, and
# with two zeros.
FP4 = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([FP4, 0 - FP4])


# Evenly spaced and symmetric: code 0 lies beyond -1 and is never given. Those
# of int8 are a product, exact at both ends, so that arithmetic gives the same.
INT4 = (np.arange(16, dtype=np.float32) - np.float32(8)) / np.float32(7)
INT8_STEP = np.float32(1 / 127)
INT8 = (np.arange(256, dtype=np.float32) - np.float32(128)) * INT8_STEP


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
  """How codes of four bits, two to a byte, stand for values in [-1, 1].

  Attributes:
    levels: float32, the value of each code; one is exactly zero.
    bits: Bits of a code.
  """

  levels: np.ndarray
  bits: int = 4

  @property
  def codes_per_byte(self) -> int:
    """How many codes a byte holds."""
    return 8 // self.bits

  @property
  def ascending(self) -> np.ndarray:
    """The uint8 codes in the order of their levels; of equals, as they come."""
    return np.argsort(self.levels, kind='stable').astype(np.uint8)

  def encode(self, x: jax.Array) -> jax.Array:
    """Returns the uint8 codes of the levels nearest to float32 values.

    Codes are summed up from level to level, around the end of a byte where
    the next one is smaller: compares fuse better than a search or a table.

    Args:
      x: Values in [-1, 1]; one on a midpoint takes the lower level.
    """
    order = self.ascending
    thresholds = midpoints(self.levels[order])
    steps = [
      jnp.where(x > threshold, step, np.uint8(0))
      for threshold, step in zip(thresholds, np.diff(order), strict=True)
    ]
    return sum(steps, start=order[0])

  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns the float32 values that codes stand for."""
    return jnp.asarray(self.levels)[codes]

  def select(self, codes: jax.Array) -> jax.Array:
    """Returns what `decode` does, without a table.

    Each bit of the codes halves the levels that are left: 15 selects, which a
    TPU fuses with what is before and behind. Its look-ups are not.
    """
    values = [np.float32(level) for level in self.levels]
    for bit in range(self.bits):
      is_set = (codes >> bit & 1).astype(bool)
      pairs = zip(values[::2], values[1::2], strict=True)
      values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]

  def pack(self, codes: jax.Array) -> jax.Array:
    """Returns uint8 [in, out] codes as [in / 2, out]; the even row is high."""
    pairs = codes.reshape(-1, 2, codes.shape[1])
    return pairs[:, 0] << 4 | pairs[:, 1]

  def planes(self, packed: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the codes of the even and of the odd rows, [in / 2, out] each."""
    return packed >> 4, packed & 15

  def unpack(self, packed: jax.Array) -> jax.Array:
    """Returns the [in, out] codes that were packed."""
    return interleave(self.planes(packed))

  def unpack_rows(self, packed: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the [n, out] codes of the rows that int [n] names."""
    shift = jnp.where(rows % 2 == 0, 4, 0).astype(jnp.uint8)
    return packed[rows // 2] >> shift[:, None] & 15


class ByteFormat(Format):
  """Evenly spaced codes of eight bits: arithmetic in place of the table."""

  def encode(self, x: jax.Array) -> jax.Array:
    """Returns the uint8 codes of the nearest numbers; ties to even ones."""
    return (jnp.round(x * 127) + 128).astype(jnp.uint8)

  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns the float32 values that codes stand for, those of `levels`."""
    return (codes.astype(jnp.float32) - 128) * INT8_STEP

  def pack(self, codes: jax.Array) -> jax.Array:
    """Returns the codes as they are."""
    return codes

  def unpack(self, packed: jax.Array) -> jax.Array:
    """Returns the codes as they are."""
    return packed

  def unpack_rows(self, packed: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the [n, out] codes of the rows that int [n] names."""
    return packed[rows]


def interleave(planes: Sequence[jax.Array]) -> jax.Array:
  """Returns n arrays [rows, out] as [n * rows, out], a row of each in turn."""
  return jnp.stack(planes, axis=1).reshape(-1, planes[0].shape[1])


FORMATS = {
  'nf4': Format(NF4),
  'fp4': Format(FP4),
  'int4': Format(INT4),
  'int8': ByteFormat(INT8, bits=8),
}


def dynamic_map(*, signed: bool = True) -> np.ndarray:
  """Returns the 256 levels of the 8-bit dynamic format, ascending.

  Seven decades, from 1e-6 to 1, hold 1, 2, 4, … 64 levels of each sign, or
  twice as many without a sign: the midpoints of equally spaced boundaries in
  [0.1, 1]. Zero and one are added.

  Args:
    signed: Whether there are negative levels.

  Returns:
    float32 [256].

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, section 2.2; the rounding is that of
    `create_dynamic_map` in bitsandbytes.
  """
  levels = [np.float32(0), np.float32(1)]
  for decade in range(7):
    edges = _boundaries(2 ** (decade + (not signed)) + 1)
    means = (edges[1:] + edges[:-1]) / np.float32(2)
    scaled = (np.float32(10.0 ** (decade - 6)) * means).astype(np.float32)
    levels += [*scaled, *-scaled] if signed else [*scaled]
  return np.sort(np.array(levels, np.float32))


def _boundaries(count: int) -> np.ndarray:
  """float32 linspace(0.1, 1, count), rounded once, symmetric as in torch."""
  start, stop = float(np.float32(0.1)), 1.0
  step = float(np.float32((stop - start) / (count - 1)))
  index = np.arange(count)
  rising = start + step * index
  falling = stop - step * (count - 1 - index)
  return np.where(index < count // 2, rising, falling).astype(np.float32)


DYNAMIC = dynamic_map()
DYNAMIC_UNSIGNED = dynamic_map(signed=False)


def midpoints(levels: np.ndarray) -> np.ndarray:
  """Returns the float32 midpoints of neighboring levels."""
  return (levels[1:] + levels[:-1]) / np.float32(2)


def nearest(x: jax.Array, *, signed: bool = True) -> jax.Array:
  """Returns the uint8 index of the dynamic level nearest to each value.

  The index is computed from the decade that a value lies in, and compared with
  the midpoints on both sides: XLA fuses this with what is before and behind. A
  binary search is eight passes over its bounds, forty bytes a value.

  Args:
    x: float32 of any shape in [-1, 1]. A value on a midpoint takes the lower
      level.
    signed: Whether of `DYNAMIC`, else of `DYNAMIC_UNSIGNED`.

  Returns:
    uint8 of the shape of `x`.
  """
  levels = DYNAMIC if signed else DYNAMIC_UNSIGNED
  bounds = np.concatenate([[-np.inf], midpoints(levels), [np.inf]])
  bounds, size = jnp.asarray(bounds, jnp.float32), jnp.abs(x)
  starts = 10.0 ** np.arange(-6, 0)  # of the second decade and those above
  decade = sum((size > start).astype(jnp.int32) for start in starts)
  count = (1 if signed else 2) << decade  # levels in it
  scale = jnp.asarray(10.0 ** np.arange(6, -1, -1), jnp.float32)[decade]
  place = ((size * scale - 0.1) / 0.9 * count).astype(jnp.int32)
  rank = count - (not signed) + jnp.clip(place, 0, count - 1)
  rank = jnp.where(size > 0, rank, 0)
  index = jnp.where(x < 0, -rank, rank) + np.argmin(np.abs(levels))
  # A byte is what XLA then keeps between two fusions, where it makes two.
  index = index.astype(jnp.uint8).astype(jnp.int32)
  index += (x > bounds[index + 1]).astype(jnp.int32)
  index -= (x <= bounds[index]).astype(jnp.int32)
  return index.astype(jnp.uint8)


def reciprocal(absmax: jax.Array) -> jax.Array:
  """Returns 1 / absmax, and zero for a block of zeros.

  Numbers below the smallest normal one have no finite reciprocal, or are
  flushed to zero: they count as zeros.
  """
  is_normal = absmax >= jnp.finfo(jnp.float32).tiny
  return jnp.where(is_normal, 1 / jnp.where(is_normal, absmax, 1), 0)
