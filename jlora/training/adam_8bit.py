"""Adam whose moments take a byte each."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.core import formats

BLOCK = 256  # entries that share a scale
SMALLEST = 4096  # entries of a leaf; moments of a smaller one stay float32


class Adam8bitState(NamedTuple):
  """What `scale_by_adam_8bit` keeps; every tree is shaped like the parameters.

  Attributes:
    count: int32, updates so far.
    mu: First moments: uint8 codes in the shape of each leaf, or float32.
    nu: Second moments likewise.
    mu_scales: float32 [blocks] of each leaf; one that is not used where `mu`
      is float32.
    nu_scales: Likewise, of `nu`.
  """

  count: jax.Array
  mu: Any
  nu: Any
  mu_scales: Any
  nu_scales: Any


def scale_by_adam_8bit(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Returns Adam whose moments are quantized in blocks between updates.

  An update is that of `optax.scale_by_adam` on the moments as they are decoded;
  what it makes of them is rounded to the nearest of 256 dynamic levels, times
  the largest of the block. They take 2.03 bytes a weight instead of 8.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the root of the second moment.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_; block size, levels and the smallest
    leaf are those of `bitsandbytes.optim.Adam8bit`.
  """

  def init(params: Any) -> Adam8bitState:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    mu, mu_scales = _encode_all(zeros, signed=True)
    nu, nu_scales = _encode_all(zeros, signed=False)
    return Adam8bitState(jnp.int32(0), mu, nu, mu_scales, nu_scales)

  def update(
    updates: Any, state: Adam8bitState, params: Any = None
  ) -> tuple[Any, Adam8bitState]:
    del params
    count = optax.safe_increment(state.count)
    mu = _decode_all(state.mu, state.mu_scales, formats.DYNAMIC)
    nu = _decode_all(state.nu, state.nu_scales, formats.DYNAMIC_UNSIGNED)
    mu = optax.tree.update_moment(updates, mu, b1, 1)
    nu = optax.tree.update_moment(updates, nu, b2, 2)
    mu_hat = optax.tree.bias_correction(mu, b1, count)
    nu_hat = optax.tree.bias_correction(nu, b2, count)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
    mu, mu_scales = _encode_all(mu, signed=True)
    nu, nu_scales = _encode_all(nu, signed=False)
    return updates, Adam8bitState(count, mu, nu, mu_scales, nu_scales)

  return optax.GradientTransformation(init, update)


def _encode_all(tree: Any, *, signed: bool) -> tuple[Any, Any]:
  """Returns codes and scales of every leaf, in trees shaped like it."""
  leaves, structure = jax.tree.flatten(tree)
  encoded = [_encode(leaf, signed) for leaf in leaves]
  codes, scales = zip(*encoded, strict=True) if encoded else ((), ())
  unflatten = structure.unflatten
  return unflatten(codes), unflatten(scales)


def _encode(x: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
  if x.size < SMALLEST:
    return x, jnp.zeros(1, jnp.float32)  # Orbax keeps no empty array
  blocks = _blocks(x)
  absmax = jnp.abs(blocks).max(axis=-1)
  scaled = blocks * formats.reciprocal(absmax)[..., None]
  codes = formats.nearest(scaled, signed=signed)
  return _whole(codes, x.shape), absmax.reshape(-1)


def _blocks(x: jax.Array) -> jax.Array:
  """Returns the entries [..., BLOCK] of a leaf, in order, the last padded.

  Axes that no block crosses are kept, so that devices which hold parts of a
  leaf encode them where they lie.
  """
  for axes in (1, 2):
    if math.prod(x.shape[-axes:]) % BLOCK == 0:
      return x.reshape(*x.shape[:-axes], -1, BLOCK)
  return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _whole(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the leaf of a shape that `_blocks` has cut."""
  size = math.prod(shape)
  if blocks.size == size:
    return blocks.reshape(shape)
  return blocks.reshape(-1)[:size].reshape(shape)


def _decode_all(codes: Any, scales: Any, levels: np.ndarray) -> Any:
  def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    if codes.dtype != jnp.uint8:  # a small leaf, kept as it is
      return codes
    blocks = jnp.asarray(levels)[_blocks(codes)]
    scales = scales.reshape(*blocks.shape[:-1], 1)
    return _whole(blocks * scales, codes.shape)

  return jax.tree.map(decode, codes, scales)
