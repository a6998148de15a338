"""NF4, and linear layers with an adapter whose derivative is written by hand.

Nothing of jlora is used here: this is what it is measured against.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
# bitsandbytes' NF4, which is that of the QLoRA paper.
LEVELS = np.array(
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


class Packed(NamedTuple):
  """A kernel [in, out] in NF4.

  Attributes:
    codes: uint8 [in / 2, out]; the even row in the high four bits.
    scales: float32 [in / BLOCK, out].
  """

  codes: Any
  scales: Any


def pack(kernel: np.ndarray) -> Packed:
  """Quantizes a kernel [in, out] in blocks along `in`.

  Args:
    kernel: Its `in` is a multiple of BLOCK.

  Raises:
    ValueError: It is not.
  """
  rows, columns = kernel.shape
  if rows % BLOCK:
    raise ValueError(
      f'a kernel has {rows} rows; this step wants a multiple of {BLOCK}'
    )
  blocks = kernel.reshape(-1, BLOCK, columns)
  scales = np.abs(blocks).max(axis=1)
  safe = np.where(scales == 0, 1, scales)
  middles = (LEVELS[1:] + LEVELS[:-1]) / 2
  codes = np.searchsorted(middles, blocks / safe[:, None]).astype(np.uint8)
  codes = codes.reshape(rows, columns)
  return Packed(codes[0::2] << 4 | codes[1::2], scales)


def unpack(packed: Packed) -> jax.Array:
  """Returns the kernel [in, out] in float32."""
  codes, scales = packed
  columns = codes.shape[1]
  pairs = jnp.stack([codes >> 4, codes & 15], axis=1)
  values = jnp.asarray(LEVELS)[pairs].reshape(-1, BLOCK, columns)
  return (values * scales[:, None]).reshape(-1, columns)


def dense(kernel: Packed | jax.Array) -> jax.Array:
  """Returns a kernel as a float32 array."""
  return unpack(kernel) if isinstance(kernel, Packed) else kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear(
  x: jax.Array,
  kernel: Packed | jax.Array,
  a: jax.Array,
  b: jax.Array,
  scale: float,
) -> jax.Array:
  """Returns `x W + scale * (x a) b`; the kernel is a constant.

  Args:
    x: [..., in].
    kernel: [in, out].
    a: [in, rank].
    b: [rank, out].
    scale: Of the adapter.
  """
  return _forward(x, kernel, a, b, scale)[0]


def _forward(
  x: jax.Array, kernel: Any, a: jax.Array, b: jax.Array, scale: float
) -> tuple[jax.Array, Any]:
  # The barriers keep XLA from fusing what comes before into the products, and
  # from keeping a decoded kernel between its two uses.
  rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
  low = rows @ a
  y = rows @ dense(kernel) + scale * (low @ b)
  return y.reshape(*x.shape[:-1], -1), (x, low, kernel, a, b)


def _backward(
  scale: float, saved: Any, g: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
  x, low, kernel, a, b = saved
  rows, g = (v.reshape(-1, v.shape[-1]) for v in (x, g))
  g, kernel = jax.lax.optimization_barrier((g, kernel))
  low_g = scale * (g @ b.T)
  dx = jax.lax.optimization_barrier(g @ dense(kernel).T + low_g @ a.T)
  return dx.reshape(x.shape), None, rows.T @ low_g, scale * (low.T @ g)


linear.defvjp(_forward, _backward)
