"""Number formats of quantized weights, as tables, and the codes they give.

The tables and the rounding are those of bitsandbytes, so that its bytes and
ours are the same: scaling multiplies by the float32 reciprocal, and a code is
the number of midpoints below the scaled value.
"""

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

FORMATS = {'nf4': NF4}


def dynamic_map() -> np.ndarray:
  """Returns the 256 levels of the signed 8-bit dynamic format, ascending.

  Seven decades, from 1e-6 to 1, hold 1, 2, 4, … 64 levels of each sign: the
  midpoints of equally spaced boundaries in [0.1, 1]. Zero and one are added.

  Returns:
    float32 [256].

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, section 2.2; the rounding is that of
    `create_dynamic_map` in bitsandbytes.
  """
  levels = [np.float32(0), np.float32(1)]
  for decade in range(7):
    edges = _boundaries(2**decade + 1)
    means = (edges[1:] + edges[:-1]) / np.float32(2)
    scaled = (np.float32(10.0 ** (decade - 6)) * means).astype(np.float32)
    levels += [*scaled, *-scaled]
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


def midpoints(levels: np.ndarray) -> np.ndarray:
  """Returns the float32 midpoints of neighboring levels."""
  return (levels[1:] + levels[:-1]) / np.float32(2)


def nearest(x: jax.Array, levels: np.ndarray) -> jax.Array:
  """Returns the uint8 index of the level nearest to each value.

  Args:
    x: float32 of any shape. A value on a midpoint takes the lower level.
    levels: Ascending, at most 256.

  Returns:
    uint8 of the shape of `x`.
  """
  thresholds = midpoints(levels)
  if len(levels) <= 16:  # few compares fuse better than a search
    return sum((x > t).astype(jnp.uint8) for t in thresholds)
  return jnp.searchsorted(jnp.asarray(thresholds), x).astype(jnp.uint8)


def reciprocal(absmax: jax.Array) -> jax.Array:
  """Returns 1 / absmax, and zero for a block of zeros."""
  return jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)
